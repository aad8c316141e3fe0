"""The Kelix language model: unified embedding, Qwen3 backbone, Block Decoder, restricted head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt import ops
from kelix_rt.config import KelixConfig, Quantization, read_config
from kelix_rt.errors import ConfigError
from kelix_rt.models.backbone import Backbone, PagedKV, StepContext
from kelix_rt.models.block_decoder import BlockDecoder, block_decoder_sizes
from kelix_rt.models.expand import expand_ids
from kelix_rt.models.language_weights import choose_head, weight_map
from kelix_rt.models.layers import int8_linear
from kelix_rt.models.products import product
from kelix_rt.quantization import quantize_int8
from kelix_rt.weights import Checkpoint, OnTensor, load_weights

if TYPE_CHECKING:
    from kelix_rt.models.vision_tokenizer import VisionTokenizer

_TOKENIZER_PREFIX = "visual_tokenizer."
_UNUSED = (r"lm_head\.weight", r"model\.model\.token_head\.final_norm\..*", r"visual_tokenizer\..*")


class KelixLM(nn.Module):
    """Blocks in, blocks out. Works on flat batches [T, N+1] whose layout a `StepContext` gives."""

    def __init__(self, config: KelixConfig) -> None:
        super().__init__()
        qwen = config.qwen_config
        self.config = config
        table = (qwen.total_vocab, qwen.embed_dim)
        self.embeddings = nn.Parameter(torch.empty(table))
        self.head = nn.Parameter(torch.empty(table))
        self.head_scale: Tensor | None
        self.register_buffer("head_scale", None, persistent=False)  # [VT], of an int8 head
        self.backbone = Backbone(qwen)
        self.block_decoder = BlockDecoder(block_decoder_sizes(config))
        self.visual_tokenizer: VisionTokenizer | None = None
        placeholder = qwen.image_token_id
        self.banned_id = -1 if placeholder is None else placeholder

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        on_tensor: OnTensor | None = None,
        quantization: Quantization = None,
    ) -> KelixLM:
        """Loads a checkpoint directory, and its visual tokenizer when it holds one.

        dtype: None keeps the checkpoint's own. on_tensor: called with (name, bytes) per tensor.
        quantization: "int8" quantises the matrices of backbone and head one by one as they are
        read.
        Raises ConfigError or WeightError.
        """
        config = read_config(path)
        if not isinstance(config, KelixConfig):
            raise ConfigError(f"KelixLM: {path} must hold a KeyeARConfig, got {type(config)}")
        checkpoint = Checkpoint(path)
        with torch.device("meta"):
            model = cls(config)
            if quantization == "int8":
                model.quantize()
        load_weights(
            model,
            checkpoint,
            weight_map(config, choose_head(checkpoint)),
            device=device,
            dtype=dtype,
            unused=_UNUSED,
            on_tensor=on_tensor,
        )
        model.prepare()
        if any(name.startswith(_TOKENIZER_PREFIX) for name in checkpoint.names()):
            from kelix_rt.models.vision_tokenizer import VisionTokenizer

            model.visual_tokenizer = VisionTokenizer.from_pretrained(
                path, _TOKENIZER_PREFIX, device, model.dtype, on_tensor
            )
        return model.eval()

    def quantize(self) -> None:
        """Turns the matrices of the backbone's layers and the head into int8, on the meta device
        too. Embeddings and Block Decoder, of which a block reads little, stay."""
        self.backbone.quantize()
        head, self.head_scale = quantize_int8(self.head.detach())
        self.head = nn.Parameter(head, requires_grad=False)

    def prepare(self) -> None:
        """Packs the Block Decoder and computes the RoPE table; once the weights are in place."""
        self.block_decoder.pack()
        self.backbone.prepare(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and hidden states."""
        return self.embeddings.dtype

    def expand(self, ids: Tensor, image_ids: Tensor | None = None) -> Tensor:
        """`expand_ids` with this model's config."""
        return expand_ids(ids, image_ids, self.config)

    def embed_blocks(self, ids: Tensor) -> Tensor:
        """[T, N+1] int64 -> [T, D]: the summed embeddings of `ops.block_embed`."""
        vocab = self.config.qwen_config.vocab_size
        return ops.block_embed(ids, self.embeddings, vocab, self.config.block_end)

    def forward(self, ids: Tensor, ctx: StepContext, kv: PagedKV) -> Tensor:
        """[T, N+1] int64 -> [T, D] residual stream before the final norm; fills kv."""
        return self.backbone(self.embed_blocks(ids), ctx, kv)

    def decode_blocks(
        self, hidden: Tensor, params: Tensor, seeds: Tensor, steps: Tensor, reference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Draws the next block of every row: ids [B, N+1] int64, logprobs [B, N+1] float32.

        hidden: [B, D] from `forward`. params, seeds, steps: as `ops.block_decode` takes them.
        reference: the released model's rule instead of ancestral sampling: the logits of all
        slots are computed along the greedy block over the whole vocabulary, and each slot is drawn
        from its own row independently (`ops.sample_blocks` with reference=True); then everything
        after the first end-of-block is end-of-block. Slots the greedy block never reaches are drawn
        uniformly. The log-probabilities are then under those rows, 0 where the end is forced.
        """
        if reference:
            return self._redraw(self.full_logits(hidden), params, seeds, steps)
        shape = self.block_decoder.shape
        config = self.config
        return ops.block_decode(
            hidden, self.block_decoder.packed, self.embeddings, self.backbone.norm, self.head,
            params, seeds, steps, config.num_codes, config.qwen_config.vocab_size,
            config.block_end, self.banned_id, shape.d_model, shape.num_heads, shape.num_layers,
            shape.ffn, config.qwen_config.norm_eps, self.head_scale,
        )  # fmt: skip

    def _redraw(
        self, logits: Tensor, params: Tensor, seeds: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, num_slots, width = logits.shape
        slots = torch.arange(num_slots, device=logits.device)
        shape = (batch, num_slots)
        ids, logprobs = ops.sample_blocks(
            logits.reshape(-1, width),
            params.reshape(-1, 4),
            seeds.unsqueeze(1).expand(shape).reshape(-1),
            steps.unsqueeze(1).expand(shape).reshape(-1),
            slots.expand(shape).reshape(-1),
            0,
            True,
        )
        ids, logprobs = ids.view(shape), logprobs.view(shape)
        ended = (ids == self.config.block_end).cumsum(-1) > 0
        forced = torch.cat((torch.zeros_like(ended[:, :1]), ended[:, :-1]), dim=-1)
        forced[:, -1] = True
        failed = ((ids < 0) & ~forced).any(-1, keepdim=True)
        ids = ids.masked_fill(forced, self.config.block_end).masked_fill(failed, -1)
        return ids, logprobs.masked_fill(forced, 0.0).masked_fill(failed, math.nan)

    def normed(self, states: Tensor) -> Tensor:
        """The backbone's final RMSNorm, which stands in front of the head."""
        return ops.rms_norm(states, self.backbone.norm, self.config.qwen_config.norm_eps)

    def head_logits(self, states: Tensor) -> Tensor:
        """[..., D] before the norm -> [..., VT] logits over the whole vocabulary, float32."""
        normed = self.normed(states)
        if self.head_scale is None:
            return product(normed, self.head).float()
        flat = int8_linear(normed.flatten(0, -2), self.head, self.head_scale)
        return flat.view(*normed.shape[:-1], -1).float()

    def full_logits(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """Whole-vocabulary logits [B, N+1, VT] float32 of every slot; image placeholder at -inf.

        ids: [B, N+1] the block to condition the slots on. None follows the greedy block of the
        unrestricted head; slots after its end-of-block then hold 0 (and -inf), a uniform row.
        """
        num_slots = self.config.num_codes + 1
        if ids is not None:
            previous = F.embedding(ids[:, :-1], self.embeddings)
            inputs = torch.cat((hidden.unsqueeze(1), previous), dim=1)
            return self._ban(self.head_logits(self.block_decoder(inputs)))
        inputs = hidden.unsqueeze(1)
        logits = hidden.new_zeros(
            (hidden.shape[0], num_slots, self.head.shape[0]), dtype=torch.float32
        )
        ended = torch.zeros(hidden.shape[0], 1, dtype=torch.bool, device=hidden.device)
        for slot in range(min(num_slots, self.config.token_decoder_config.max_length - 1)):
            row = self._ban(self.head_logits(self.block_decoder(inputs)[:, -1]))
            logits[:, slot] = row.masked_fill(ended, 0.0)
            greedy = row.argmax(-1)
            ended = ended | (greedy == self.config.block_end).unsqueeze(1)
            step = F.embedding(greedy, self.embeddings).unsqueeze(1)
            inputs = torch.cat((inputs, step), dim=1)
        return self._ban(logits)

    def _ban(self, logits: Tensor) -> Tensor:
        if self.banned_id >= 0:
            logits[..., self.banned_id] = -math.inf
        return logits

    def count_head_escapes(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """How many slots of each drawn block would have left the admissible ids: [B] int64.

        Compares the argmax of the whole head with the ids `decode_blocks` admits: at slot 0 text
        and the first sub-codebook; after a text id the end-of-block; after a code the slot's own
        sub-codebook; at slot N the end-of-block. hidden: [B, D]. ids: [B, N+1], none below 0.
        """
        qwen, end = self.config.qwen_config, self.config.block_end
        best = self.full_logits(hidden, ids).argmax(-1)
        slots = torch.arange(ids.shape[1], device=ids.device)
        own_book = (best - qwen.vocab_size).div(qwen.codes_per_book, rounding_mode="floor") == slots
        visual = ids[:, :1] >= qwen.vocab_size
        at_end = slots == self.config.num_codes
        admitted = torch.where(visual & ~at_end, own_book, best == end)
        admitted[:, 0] = best[:, 0] < qwen.vocab_size + qwen.codes_per_book
        counted = torch.where(visual, slots >= 0, slots <= 1)
        counted &= (ids[:, :1] != end) | (slots == 0)
        return (counted & ~admitted).sum(-1)

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        """The residual stream of one whole prompt [S, N+1]: L + 1 tensors [S, D].

        Item 0 holds the embeddings, item i the input of layer i, the last the output of the last
        layer before the final norm. Raises InputError above max_seq_len.
        """
        kept: list[Tensor] = []
        last = self.backbone.run_whole(self.embed_blocks(ids), kept)
        return [*kept, last]

    def teacher_inputs(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Block Decoder inputs of every position of [S, N+1] at once: [S, N+1, D].

        Position i gets its state and the embeddings of row i + 1 (the last position of row 0):
        all codes of a visual row, and for a text row its first id N times.
        """
        following = ids.roll(-1, dims=0)[:, :-1]
        visual = following[:, :1] >= self.config.qwen_config.vocab_size
        previous = torch.where(visual, following, following[:, :1])
        return torch.cat((hidden.unsqueeze(1), F.embedding(previous, self.embeddings)), dim=1)

    def teacher_forced_logits(self, ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Logits [S, N+1, VT] float32 of all slots of all positions of sequences [S, N+1].

        Slot j of position i predicts id j of row i + 1 given that row's earlier ids. lengths: of
        the sequences laid end to end in ids, None for one; the last position of each predicts
        nothing of its own. Differentiable (`Backbone.run_whole`).
        """
        hidden = self.backbone.run_whole(self.embed_blocks(ids), lengths=lengths)
        return self.head_logits(self.block_decoder(self.teacher_inputs(ids, hidden)))
