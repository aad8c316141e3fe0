"""The visual tokenizer: image patches -> parallel codes, and codes -> fused embeddings.

Packed vision transformer (NaViT), 2x2 merger, N parallel vector quantizers (SimVQ). The codebooks
do not depend on the image: they are projected and normalised once, when the weights are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kelix_rt import ops
from kelix_rt.checkpoint import Checkpoint
from kelix_rt.config import KelixConfig, TokenizerConfig, read_config
from kelix_rt.errors import ConfigError, InputError
from kelix_rt.models.products import Linear, product
from kelix_rt.models.vision_layers import LayerNorm, PatchMerger, VisionLayer
from kelix_rt.models.vision_layout import (
    PatchLayout,
    check_patches,
    read_grids,
    resample_positions,
)
from kelix_rt.models.vision_weights import (
    CODE_EPS,
    UNUSED,
    codebook_names,
    project_codebooks,
    renames,
    stored_up_projectors,
    weight_map,
)
from kelix_rt.weights import OnTensor, float_dtype, load_weights, require_names

Mode = Literal["exact", "reference"]


class VisionTokenizer(nn.Module):
    """Images -> codes. Build it on the meta device and fill it with `load`, or `from_pretrained`.

    Codes are int64 [T, N]: T tokens (2x2 patches each, in raster order, images one after another)
    by N sub-codebooks, each local to its sub-codebook.
    """

    codebooks: Tensor
    exact_norms: Tensor
    reference_norms: Tensor

    def __init__(self, config: TokenizerConfig, with_up_projectors: bool = True) -> None:
        super().__init__()
        self.config = config
        vision = config.vision_config
        width, books = vision.hidden_size, (config.n_q_tokens, config.code_dim)
        self.patch_embedding = Linear(vision.num_channels * vision.patch_size**2, width)
        self.positions: nn.Parameter | None = None
        if vision.has_learnable_position_embedding:
            self.positions = nn.Parameter(torch.empty(vision.grid**2, width))
        self.layers = nn.ModuleList(VisionLayer(vision) for _ in range(vision.num_hidden_layers))
        self.final_norm = LayerNorm(width, vision.layer_norm_eps)
        self.merger = PatchMerger(width, config.llm_hidden_size)
        self.aligner: nn.Linear | None = None
        if config.pre_llm_align:
            self.aligner = Linear(config.llm_hidden_size, config.llm_hidden_size)
        self.encoder = Linear(config.llm_hidden_size, books[0] * books[1])
        self.z_weight = nn.Parameter(torch.empty(books))
        self.z_bias = nn.Parameter(torch.empty(books))
        self.up_projectors: nn.Parameter | None = None
        if with_up_projectors:
            shape = (books[0], config.output_dim, books[1])
            self.up_projectors = nn.Parameter(torch.empty(shape))
        norms = (books[0], config.codes_per_book)
        shapes = {"codebooks": (*norms, books[1]), "exact_norms": norms, "reference_norms": norms}
        for name, size in shapes.items():
            self.register_buffer(name, torch.empty(size), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        prefix: str = "",
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        on_tensor: OnTensor | None = None,
    ) -> VisionTokenizer:
        """Loads a tokenizer directory, or the tokenizer inside a language model's directory.

        prefix: in front of the stored names ("visual_tokenizer." in a language model). dtype: None
        keeps the checkpoint's own. on_tensor: called with (name, bytes) per tensor. Raises
        ConfigError or WeightError.
        """
        config = read_config(path)
        if isinstance(config, KelixConfig):
            config = config.tokenizer_config
        if not isinstance(config, TokenizerConfig):
            raise ConfigError(
                f"VisionTokenizer: {path} must hold a KeyeTokenizerConfig or a KeyeARConfig, got "
                f"{type(config).__name__}"
            )
        checkpoint = Checkpoint(path, renames(prefix))
        with torch.device("meta"):
            model = cls(config, stored_up_projectors(config, checkpoint, prefix))
        model.load(checkpoint, prefix, torch.device(device), dtype, on_tensor)
        return model.eval()

    def load(
        self,
        checkpoint: Checkpoint,
        prefix: str,
        device: torch.device,
        dtype: torch.dtype | None = None,
        on_tensor: OnTensor | None = None,
    ) -> None:
        """Fills the parameters and computes the codebooks. Raises WeightError."""
        mapping = weight_map(self.config, self.up_projectors is not None)
        raw = [prefix + name for name in codebook_names(self.config)]
        direct = [prefix + name for source in mapping.values() for name in source.names]
        require_names(checkpoint, [*direct, *raw])
        dtype = float_dtype(checkpoint, direct) if dtype is None else dtype
        load_weights(
            self,
            checkpoint,
            mapping,
            prefix=prefix,
            device=device,
            dtype=dtype,
            unused=UNUSED,
            on_tensor=on_tensor,
        )
        self.set_codebooks(project_codebooks(self.config, checkpoint, prefix, device, dtype))
        if on_tensor is not None:
            on_tensor("codebooks", self.codebooks.nbytes)

    def set_codebooks(self, codebooks: Tensor) -> None:
        """Sets the code vectors [N, K, code_dim], projected and normalised, and their norms."""
        norms = (ops.codebook_norms(codebooks, reference) for reference in (False, True))
        names = ("codebooks", "exact_norms", "reference_norms")
        for name, tensor in zip(names, (codebooks, *norms), strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.z_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return self.z_weight.dtype

    def encode(self, pixel_values: Tensor, image_grid_thw: Tensor, mode: Mode = "exact") -> Tensor:
        """Codes int64 [T, N] of packed patches.

        pixel_values: [N, C, P, P] floating, patches of all images in raster order, cast to the
        model's dtype first. image_grid_thw: [images, 3] integers (frames, rows, columns) in
        patches. mode: "reference" repeats the release's roundings of the distances
        (`ops.nearest_codes`). Raises InputError naming the tensor that does not fit.
        """
        layout = self.layout(pixel_values, image_grid_thw)
        hidden = self.encode_patches(self.embed_patches(pixel_values, layout), layout)
        return self.quantize(self.project(self.merge(hidden, layout)), mode)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """`encode` in exact mode."""
        return self.encode(pixel_values, image_grid_thw)

    def layout(self, pixel_values: Tensor, image_grid_thw: Tensor) -> PatchLayout:
        """Checks both inputs and lays out the packed sequence. Raises InputError."""
        vision = self.config.vision_config
        grids = read_grids(image_grid_thw)
        check_patches(pixel_values, grids, vision.num_channels, vision.patch_size)
        return PatchLayout.of(grids, vision.rope_theta, vision.head_dim, self.dtype, self.device)

    def embed_patches(self, pixel_values: Tensor, layout: PatchLayout) -> Tensor:
        """[N, C, P, P] -> [N, D]: linear patch embedding plus resampled learned positions."""
        x = self.flat_patches(pixel_values)
        if self.positions is None:
            return x
        sizes = {(rows, columns) for _, rows, columns in layout.grids}
        tables = {size: resample_positions(self.positions, *size) for size in sizes}
        return x + torch.cat([tables[h, w].repeat(t, 1) for t, h, w in layout.grids])

    def flat_patches(self, pixel_values: Tensor) -> Tensor:
        """[N, C, P, P] -> [N, D]: the patch embedding alone."""
        return self.patch_embedding(pixel_values.to(self.device, self.dtype).flatten(1))

    def encode_patches(self, x: Tensor, layout: PatchLayout) -> Tensor:
        """[N, D] -> [N, D]: all transformer layers and the final norm."""
        for layer in self.layers:
            x = layer(x, layout)
        return self.final_norm(x)

    def merge(self, x: Tensor, layout: PatchLayout) -> Tensor:
        """[N, D] -> [T, E]: the merger, before the aligner."""
        return self.merger(x, layout)

    def project(self, x: Tensor) -> Tensor:
        """[T, E] -> [T, N, code_dim]: aligner (where there is one) and encoder projection."""
        if self.aligner is not None:
            x = self.aligner(x)
        return self.encoder(x).view(x.shape[0], self.config.n_q_tokens, self.config.code_dim)

    def quantize(self, z: Tensor, mode: Mode = "exact") -> Tensor:
        """[T, N, code_dim] -> int64 [T, N]: the nearest code of every sub-codebook."""
        norms, reference = self._norms(mode)
        return ops.nearest_codes(
            z, self.codebooks, norms, self.z_weight, self.z_bias, CODE_EPS, reference
        )

    def tune(self, tokens: Sequence[int], mode: Mode = "exact") -> None:
        """Times the forms of the search in the codebooks; `quantize` then takes the fastest.

        tokens: the numbers of tokens to choose for (`ops.tune_nearest_codes`).
        """
        norms, reference = self._norms(mode)
        ops.tune_nearest_codes(
            self.codebooks, norms, self.z_weight, self.z_bias, reference, tokens=tokens
        )

    def _norms(self, mode: Mode) -> tuple[Tensor, bool]:
        """The codes' squared lengths in that mode, and whether it is the reference's."""
        if mode not in ("exact", "reference"):
            raise InputError(f"encode: mode must be 'exact' or 'reference', got {mode!r}")
        reference = mode == "reference"
        return self.reference_norms if reference else self.exact_norms, reference

    def global_ids(self, codes: Tensor, vocab_size: int) -> Tensor:
        """Codes [T, N] -> ids of the language model [T, N]: vocab_size + code + (i * S) // N.

        vocab_size: number of text ids, in front of the codes. Raises ConfigError where the id
        ranges of the sub-codebooks overlap.
        """
        if not self.config.has_disjoint_ids:
            raise ConfigError(
                f"global_ids: split_voc must equal n_q_tokens {self.config.n_q_tokens}, got "
                f"{self.config.split_voc}: the id ranges of the sub-codebooks overlap"
            )
        self._check_shape(codes)
        books = torch.arange(self.config.n_q_tokens, device=codes.device)
        offsets = (books * self.config.codebook_size).div(
            self.config.n_q_tokens, rounding_mode="floor"
        )
        return codes + (vocab_size + offsets)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [T, N] -> code vectors [T, N, code_dim]. Raises InputError out of range."""
        self.check_codes(codes)
        books = torch.arange(self.config.n_q_tokens, device=self.device)
        return self.codebooks[books, codes.to(self.device)]

    def embed(self, codes: Tensor) -> Tensor:
        """Codes [T, N] -> fused embeddings [T, O]: up-projected code vectors, summed or averaged.

        The language model does not use them (it embeds global ids itself), so a checkpoint may lack
        the up-projectors: InputError then.
        """
        if self.up_projectors is None:
            raise InputError("embed: the checkpoint holds no up_projectors.*, so it has no fusion")
        vectors = self.lookup(codes)
        parts = [product(vectors[:, i], weight) for i, weight in enumerate(self.up_projectors)]
        stacked = torch.stack(parts)
        return stacked.sum(0) if self.config.fusion_type == "sum" else stacked.mean(0)

    def check_codes(self, codes: Tensor) -> None:
        """Raises InputError unless codes are int64 [T, N], each local to its sub-codebook."""
        self._check_shape(codes)
        size = self.config.codes_per_book
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise InputError(
                f"codes must be local to their sub-codebook, 0 to {size - 1}, got "
                f"{int(codes.min())} to {int(codes.max())}"
            )

    def _check_shape(self, codes: Tensor) -> None:
        books = self.config.n_q_tokens
        if not isinstance(codes, Tensor):
            raise InputError(f"codes must be a torch.Tensor, got {type(codes).__name__}")
        if codes.ndim != 2 or codes.shape[1] != books or codes.dtype != torch.int64:
            raise InputError(
                f"codes must be int64 of shape [tokens, {books}], got {codes.dtype} "
                f"{list(codes.shape)}"
            )
