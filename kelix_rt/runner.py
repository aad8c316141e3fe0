"""Turns a step's plan into tensors, runs its stage and hands back what the host has to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

import numpy as np
import torch

from kelix_rt.batch import StepBuffer
from kelix_rt.block_steps import BlockSteps
from kelix_rt.denoise_graphs import DenoiseGraphs
from kelix_rt.device_queue import device_queue
from kelix_rt.errors import ConfigError, InputError
from kelix_rt.graphs import CudaRecorder, DecodeGraphs, GraphCounts, Recorder
from kelix_rt.memory import cache_dtype
from kelix_rt.models.backbone import PagedKV
from kelix_rt.models.condition import find_condition
from kelix_rt.offload import Offloaded
from kelix_rt.sequence import Sequence
from kelix_rt.stages.encode import EncodeStage
from kelix_rt.stages.generate import GenerateStage
from kelix_rt.stages.render import to_picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from kelix_rt._host import PagePool
    from kelix_rt.config import EngineConfig
    from kelix_rt.models.language_model import KelixLM
    from kelix_rt.stages.render import RenderStage


class Runner:
    """Owns the models, the KV tensors and the step buffers; knows nothing of queues."""

    def __init__(
        self,
        model: KelixLM,
        pool: PagePool,
        options: EngineConfig,
        *,
        max_positions: int,
        render: RenderStage | None,
    ) -> None:
        parameter = next(model.parameters())
        self.model = model
        self.device = parameter.device
        self.dtype = parameter.dtype
        qwen = model.config.qwen_config
        stored = cache_dtype(options, self.dtype)
        self.kv = PagedKV.allocate(qwen, pool.num_pages, pool.page_size, self.device, stored)
        queue = self._queue = device_queue(self.device)
        self.buffer = StepBuffer(
            pool,
            max_tokens=options.max_step_tokens,
            max_batch=options.max_batch,
            max_positions=max_positions,
            queue=queue,
        )
        self.generate = GenerateStage(model, self.kv, options.verify_head)
        self.render = render
        self.graph_counts = GraphCounts()
        self._uses_graphs = options.cuda_graphs
        self.graphs = DecodeGraphs(self.generate, self.buffer, self.graph_counts)
        self.blocks = BlockSteps(self.generate, self.buffer, self.graphs, queue, options.max_batch)
        # What was drawn for nothing must not be counted.
        self.overlaps = options.overlap and not options.verify_head
        self.denoise_graphs: DenoiseGraphs | None = None
        if render is not None:
            self.denoise_graphs = DenoiseGraphs(
                render.dit, render.max_condition_length, self.graph_counts
            )
            render.denoiser.evaluate = self.denoise_graphs.evaluate
        tokenizer = model.visual_tokenizer
        self.encode = (
            None
            if tokenizer is None
            else EncodeStage(
                tokenizer, qwen.vocab_size, options.codes_mode, options.image_cache_bytes
            )
        )
        self.max_condition_length = options.max_condition_length
        self.condition_on_special_tokens = options.condition_on_special_tokens

    @property
    def vision_start(self) -> int:
        """The id in front of an image. ConfigError when the config names none."""
        return self._special_id("vision_start_token_id")

    @property
    def vision_end(self) -> int:
        """The id behind an image. ConfigError when the config names none."""
        return self._special_id("vision_end_token_id")

    def _special_id(self, name: str) -> int:
        value: int | None = getattr(self.model.config.qwen_config, name)
        if value is None:
            raise ConfigError(f"qwen_config.{name} is null: this model cannot draw")
        return value

    def capture_graphs(self, recorder: Recorder | None = None) -> None:
        """Records the steps that serving replays; does nothing where they are, or are not wanted.

        recorder: None makes CUDA graphs. Must not be called while a step runs.
        """
        if not self._uses_graphs:
            return
        recorder = recorder or CudaRecorder(self.device)
        for graphs in (self.graphs, self.denoise_graphs):
            if graphs is not None and not graphs.is_captured:
                graphs.capture(recorder)

    def forget_graphs(self) -> None:
        """Gives the memory of recorded steps back; `capture_graphs` records them again."""
        for graphs in (self.graphs, self.denoise_graphs):
            if graphs is not None:
                graphs.forget()

    def offload(self) -> Offloaded:
        """Gives back what weights, cache and graphs take on the device, until `Offloaded.restore`.

        Weights are copied to main memory; the content of the KV cache is lost. Graphs know the old
        addresses, so they have to be captured again.
        """
        self.forget_graphs()
        modules: list[torch.nn.Module] = [self.model]
        if self.render is not None:
            self.render.denoiser.forget()
            modules += [self.render.dit, self.render.vae.module]
        tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
        return Offloaded(tensors, (self.kv.k, self.kv.v))

    def encode_stage(self) -> EncodeStage:
        """The encode stage. ConfigError when the checkpoint has no vision tokenizer."""
        if self.encode is None:
            raise ConfigError(
                "encode: the checkpoint holds no vision tokenizer (visual_tokenizer.*)"
            )
        return self.encode

    def render_stage(self) -> RenderStage:
        """The render stage. ConfigError when no image DiT was loaded."""
        if self.render is None:
            raise ConfigError(
                "drawing needs the image DiT and its VAE: pass dit= and vae= to "
                "Engine.from_pretrained, or put them in the subfolders dit/ and vae/ of the model"
            )
        return self.render

    def run_encode(self, sequence: Sequence) -> list[np.ndarray]:
        """Ids int64 [n, N] of the next images of a request.

        The vision tokenizer runs for one of them at most; those whose codes are known come along.
        """
        stage = self.encode_stage()
        found: list[np.ndarray] = []
        for pixels, grid, key in sequence.images:
            codes, encoded = stage.cached_codes(pixels, grid, key)
            found.append(stage.ids(codes).cpu().numpy())
            if encoded:
                break
        return found

    def image_blocks(self, codes: torch.Tensor, layout: Iterable[int] | None = None) -> np.ndarray:
        """Blocks int64 [n + 1, N+1] of an image of codes [T, N], vision_end being the last.

        layout: n ids with T image placeholders among the text of position markers
        (`ChatProcessor.image_ids`); None is the codes alone. Raises InputError for codes the model
        does not have, or not as many as the layout has places.
        """
        config = self.model.config
        stage = self.encode_stage()
        stage.tokenizer.check_codes(codes)
        ids = stage.ids(codes)
        first = np.array(ids[:, 0].tolist() if layout is None else list(layout))
        placed = np.full(len(first), True)
        if layout is not None:
            placed = first == config.qwen_config.image_token_id
        if placed.sum() != len(codes):
            raise InputError(
                f"image: a grid of {placed.sum()} blocks, but codes of {len(codes)}; pass the grid "
                "that encode_image returned with them"
            )
        blocks = np.full((len(first) + 1, config.num_codes + 1), config.block_end, dtype=np.int64)
        blocks[:, 0] = [*first, self.vision_end]
        blocks[:-1][placed, :-1] = ids.cpu().numpy()
        return blocks

    def condition(self, sequence: Sequence) -> torch.Tensor:
        """Hidden states [n, D] of a drawing: vision_start, the image's blocks, vision_end.

        Of the codes alone without `condition_on_special_tokens`.
        """
        first = sequence.prompt_length - 1
        rows = find_condition(
            torch.from_numpy(sequence.rows[first : sequence.length]),
            1,
            self.vision_start,
            self.vision_end,
            self.model.config.qwen_config.vocab_size,
            self.max_condition_length,
            self.condition_on_special_tokens,
        )
        assert sequence.hidden_from is not None
        hidden = self.hidden(sequence)[first - sequence.hidden_from :]
        return hidden.index_select(0, rows.positions.to(hidden.device))

    def start_render(self, sequence: Sequence) -> None:
        """Turns the blocks of a drawing into the render stage's state."""
        assert sequence.render is not None
        condition = self.condition(sequence)
        sequence.condition_length = min(len(condition), self.max_condition_length)
        sequence.render_state = self.render_stage().start(condition, sequence.render)

    def run_render(self, sequences: Items[Sequence]) -> list[tuple[Sequence, tuple[int, int]]]:
        """One denoise step of each request; (steps taken, steps in all) with it."""
        states = [(sequence, sequence.render_state) for sequence in sequences]
        self.render_stage().step([state for _, state in states])
        return [(sequence, (state.index, state.steps)) for sequence, state in states]

    def start_picture(self, sequence: Sequence) -> Callable[[], Image]:
        """Decodes a drawing whose steps are all taken; what is left to do on any thread."""
        painted = self.render_stage().pixels(sequence.render_state)
        pixels, finite = (self._queue.host_zeros(*one.shape, dtype=one.dtype) for one in painted)
        self._queue.run(lambda: pixels.copy_(painted[0], non_blocking=True))
        self._queue.run(lambda: finite.copy_(painted[1], non_blocking=True))
        copied = self._queue.mark()

        def picture() -> Image:
            copied.wait()
            return to_picture(pixels, finite)

        return picture

    def drop_render(self, sequence: Sequence) -> None:
        """Lets go of the render state of a request that has ended in whatever way."""
        if sequence.render_state is not None:
            self.render_stage().denoiser.release(sequence.render_state)
            sequence.render_state = None

    def hidden(self, sequence: Sequence) -> torch.Tensor:
        """The hidden states kept for a request, [rows, D], on the device."""
        return torch.cat(sequence.hidden_parts)
