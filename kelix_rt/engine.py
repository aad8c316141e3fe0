"""The public face: chat, draw, encode, reconstruct, and raw blocks, on top of the loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kelix_rt.errors import CapacityError, ConfigError, InputError
from kelix_rt.intake import checked_options, copied, cut_drawing, reported_rows
from kelix_rt.loaded import LoadedEngine
from kelix_rt.processing import ChatProcessor, ImageProcessor, PositionMarkers
from kelix_rt.processing.sources import ImageSource
from kelix_rt.reply import ReplyText
from kelix_rt.request import (
    BlockEvent,
    BlockOutput,
    ChatOutput,
    Event,
    ImageCodes,
    ImageOutput,
    Output,
    Prompt,
    RenderParams,
    RequestDone,
    RequestFailed,
    SamplingParams,
    TextDelta,
    Timings,
    Usage,
)

Messages = Items[Mapping[str, Any]]
PromptLike = Prompt | Items[int] | np.ndarray | Tensor


class Engine(LoadedEngine):
    """A Kelix checkpoint ready to serve. Make one with `from_pretrained`.

    Every call may run next to others: requests of all calls share the same steps. Not
    thread-safe: one thread calls all methods, or calls take turns; a call while another thread is
    inside a step raises KelixError.
    """

    @cached_property
    def images(self) -> ImageProcessor:
        """Resizes images and cuts them into patches as the checkpoint says."""
        patch = self.config.tokenizer_config.vision_config.patch_size
        return ImageProcessor.from_pretrained(self._files, patch_size=patch)

    @cached_property
    def processor(self) -> ChatProcessor:
        """Messages to prompt ids. ConfigError when the directory holds no tokenizer."""
        template = self._marker_template
        markers = PositionMarkers(*self.config.marker_ids, template) if template else None
        return ChatProcessor(
            self.text,
            self.images,
            self.config.qwen_config,
            markers,
            self.options.allow_files,
            self.max_positions,
        )

    @property
    def _marker_template(self) -> str | None:
        """The position markers' text; None or "" where images have none."""
        chosen = self.options.position_markers
        return self.images.position_markers if chosen is None else chosen

    def warm_up(self, *, tune_tokens: Items[int] = ()) -> None:
        """Loads now what otherwise comes with the first use: text tokenizer and autoencoder.

        On a GPU also records the CUDA graphs that are not there yet. tune_tokens: sizes of images
        in tokens for which the forms of the encoder's search for codes are timed, so that encoding
        takes the fastest (`ops.tune_nearest_codes`); without them it takes the kernel. Raises
        ConfigError or WeightError as the first use would.
        """
        if self.has_text:
            _ = self.text
        if self.runner.render is not None:
            _ = self.runner.render.vae.module
        self.runner.capture_graphs()
        if tune_tokens:
            encode = self.runner.encode_stage()
            encode.tokenizer.tune(tune_tokens, encode.mode)

    def chat(
        self,
        messages: str | Messages,
        sampling: SamplingParams | None = None,
        *,
        template_options: Mapping[str, Any] | None = None,
    ) -> ChatOutput:
        """Answers OpenAI-style messages, which may hold images, or a plain question.

        template_options: what the checkpoint's chat template reads besides the messages, such as
        {"enable_thinking": False}. Raises InputError for messages that cannot be used, ConfigError
        without a tokenizer.
        """
        output = self._run_one(self.add_chat(messages, sampling, template_options=template_options))
        return ChatOutput(
            self._reply_text(output.blocks),
            output.blocks,
            output.usage,
            output.finish_reason,
            output.timings,
        )

    def add_chat(
        self,
        messages: str | Messages,
        sampling: SamplingParams | None = None,
        *,
        template_options: Mapping[str, Any] | None = None,
    ) -> int:
        """Queues the answer to messages, as `chat` takes them, and returns the request's number.

        On a GPU their pictures are read and resized beside the steps of other requests: a PIL image
        must stay open and unchanged until then, lists and mappings are copied. Messages that cannot
        be used fail their request alone: what `chat` raises is in its RequestFailed.
        Raises ConfigError without a tokenizer.
        """
        _ = self.processor  # what it is made of is loaded here
        options = copied(template_options)
        prompt = partial(self.chat_prompt, copied(messages), template_options=options)
        return self._add_later(prompt, sampling)

    def chat_prompt(
        self, messages: str | Messages, *, template_options: Mapping[str, Any] | None = None
    ) -> Prompt:
        """The prompt `chat` runs, for add_request and stream."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        encoded = self.processor.encode(messages, **checked_options(template_options))
        if not encoded.images:
            return Prompt(encoded.ids)
        pixels, grids = zip(*encoded.images, strict=True)
        return Prompt(encoded.ids, pixel_values=torch.cat(pixels), image_grid_thw=torch.cat(grids))

    def generate_image(
        self,
        prompt: str | PromptLike,
        *,
        sampling: SamplingParams | None = None,
        render: RenderParams | None = None,
    ) -> ImageOutput:
        """Draws an image of a description, or after a prompt (`chat_prompt` makes one of messages).

        sampling: None is greedy, as the release draws. Raises ConfigError without an image DiT, or
        for a description without a tokenizer.
        """
        render = RenderParams() if render is None else render
        request = self.add_request(self.drawing_prompt(prompt), sampling, render=render)
        return self._image(request)

    def drawing_prompt(self, prompt: str | PromptLike) -> PromptLike:
        """Prompt ids that make the model draw: those of a description, or given ones.

        Given ids are cut behind their first assistant header, as the release does, where the
        checkpoint has a tokenizer; `add_request` takes them whole. Raises InputError where images
        would be cut off with them.
        """
        if isinstance(prompt, str):
            return Prompt(self.processor.encode_image_prompt(prompt))
        given = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        if not self.has_text:
            return given
        return cut_drawing(given, self.processor.image_prompt)

    def encode_image(
        self, image: ImageSource, *, size: tuple[int, int] | None = None
    ) -> ImageCodes:
        """Visual codes of an image (PIL, path, bytes or data URL); size: (height, width) wanted.

        Raises InputError for what is not one image.
        """
        if isinstance(image, list | tuple):
            raise InputError(f"encode_image: takes one image, got a list of {len(image)}")
        stage = self.runner.encode_stage()
        pixels, grid = self.images.preprocess(image, size=size)
        frames, rows, columns = grid[0].tolist()
        # Copied outside inference mode: free to be changed.
        codes = stage.cached_codes(pixels, grid)[0].clone().to(self.runner.device)
        return ImageCodes(codes, (frames, rows, columns))

    def reconstruct(
        self,
        image: ImageSource,
        *,
        prompt: str | PromptLike | None = None,
        size: tuple[int, int] | None = None,
        render: RenderParams | None = None,
    ) -> ImageOutput:
        """Encodes an image and draws it again from its codes, without generating any block.

        prompt: what stands in front of the image; None is vision_start alone. size: (height,
        width) the image is encoded at; the released DiT was trained on 504 x 504.
        """
        self.runner.render_stage()
        codes = self.encode_image(image, size=size)
        return self._image(self.add_reconstruction(codes, prompt, render))

    def add_reconstruction(
        self,
        image: ImageCodes,
        prompt: str | PromptLike | None = None,
        render: RenderParams | None = None,
    ) -> int:
        """Queues the drawing of an image from its codes and returns the request's number.

        Position markers stand in front of its rows where prompts and drawings have them. Raises
        what add_request raises.
        """
        if not isinstance(image, ImageCodes):
            raise InputError(f"add_reconstruction: image must be ImageCodes, got {type(image)}")
        template = self._marker_template
        layout = self.processor.image_ids(image.grid) if template else None
        start = self.runner.vision_start
        before = Prompt([start]) if prompt is None else self.drawing_prompt(prompt)
        blocks = self.runner.image_blocks(image.codes, layout)
        return self.add_forced_image(before, blocks, render or RenderParams())

    def generate(
        self, prompts: Items[PromptLike], sampling: SamplingParams | None = None
    ) -> list[Output]:
        """Answers prompts together; outputs in their order.

        Raises InputError or CapacityError, and runs nothing, when one of them cannot be served. A
        request that fails on the way gives an Output with finish_reason "error".
        """
        if not isinstance(prompts, list | tuple):
            raise InputError(f"generate: prompts must be a list, got a {type(prompts).__name__}")
        if self.has_text:
            _ = self.text  # one that cannot be read costs no answers
        numbers: list[int] = []
        try:
            for prompt in prompts:
                numbers.append(self.add_request(prompt, sampling))
        except BaseException:
            self.discard(numbers)
            raise
        return [self._as_output(event) for event in self.run_to_end(numbers)]

    def stream(
        self,
        prompt: str | Messages | PromptLike,
        sampling: SamplingParams | None = None,
        *,
        render: RenderParams | None = None,
    ) -> Iterator[Event]:
        """Events of one request as they happen; leaving the iterator early aborts it.

        prompt: messages, a plain question, or a prompt; with `render`, a description or a prompt as
        `generate_image` takes them. Text comes as TextDelta where the checkpoint has a tokenizer;
        the last event is RequestDone or RequestFailed. Input errors are raised by the first next().
        """
        if render is not None:
            number = self.add_request(
                self.drawing_prompt(prompt),  # type: ignore[arg-type]
                sampling,
                render=render,
            )
        elif isinstance(prompt, str) or (
            isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Mapping)
        ):
            number = self.add_chat(prompt, sampling)
        else:
            number = self.add_request(prompt, sampling)  # type: ignore[arg-type]
        reply = None
        if render is None and self.has_text:
            reply = ReplyText(self.text, self.config.qwen_config)
        begun = False
        for event in self.collect(number):
            if not begun and isinstance(event, RequestFailed):
                _raise_of_input(event.error)
            begun = True
            piece = ""
            if reply is not None and isinstance(event, BlockEvent):
                piece = reply.push(event.ids[0])
            elif reply is not None and isinstance(event, RequestDone):
                piece = reply.finish()
            if piece:
                yield TextDelta(event.request_id, piece)
            yield event

    def generate_blocks(
        self,
        prompt_ids: Items[int] | np.ndarray | Tensor,
        image_ids: np.ndarray | Tensor | None = None,
        sampling: SamplingParams | None = None,
        return_hidden: bool = False,
    ) -> BlockOutput:
        """The model without text: ids in, ids out.

        prompt_ids: [S] ids with image placeholders, or whole rows [S, N+1]. image_ids: [n, N] ids
        of the unified vocabulary for the placeholders. Returns ids int64 [S+n, N+1], image rows of
        the prompt as [image_token_id x N, Q], and on demand the hidden states [S+n-1, D].
        """
        request = self.add_request(
            Prompt(prompt_ids, image_ids), sampling, return_hidden=return_hidden
        )
        sequence = self._requests[request]
        output = self._run_one(request)
        rows = sequence.rows[: sequence.length]
        placed = sequence.placed if np.ndim(prompt_ids) == 1 else None
        report = rows.copy() if placed is None else reported_rows(rows, placed, self.config)
        return BlockOutput(torch.from_numpy(report), output.hidden)

    def _reply_text(self, blocks: np.ndarray) -> str:
        return ReplyText(self.text, self.config.qwen_config).decode(blocks[:, 0].tolist())

    def _as_output(self, event: RequestDone | RequestFailed) -> Output:
        if isinstance(event, RequestDone):
            output = event.output
            return (
                replace(output, text=self._reply_text(output.blocks)) if self.has_text else output
            )
        nothing = np.empty((0, self.config.num_codes + 1), dtype=np.int64)
        return Output(event.request_id, nothing, "error", Usage(), Timings(), error=event.error)

    def _image(self, request: int) -> ImageOutput:
        image = self._run_one(request).image
        assert image is not None
        return image

    def _run_one(self, request: int) -> Output:
        """Runs one request to its end and raises what it failed with."""
        (event,) = self.run_to_end([request])
        if isinstance(event, RequestFailed):
            raise event.error
        return event.output


def _raise_of_input(error: Exception) -> None:
    if isinstance(error, InputError | CapacityError | ConfigError):
        raise error
