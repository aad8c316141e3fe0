"""Kelix-Tok: the visual tokenizer, trained to be read.

The stages of the report: 1 aligns the quantizer (vision transformer and reader frozen), 2 trains
everything on understanding, 3 anneals. In front of them stands a warm-up with continuous features,
in place of the pretrained NaViT that K-means takes its features from. A second addition: linear
maps of the fused embedding give a token's pixels and name what lies there, because a transformer
this small, trained this briefly, would otherwise learn to see too late.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt.config import TokenizerConfig
from kelix_rt.models.vision_layout import PatchLayout
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.models.vision_weights import weight_map
from kelix_rt.processing import ImageProcessor, TextTokenizer
from kelix_rt.train.ahead import Ahead, workers_for
from kelix_rt.train.loop import StageResult, run_stage
from kelix_rt.train.pictures import scene_of
from kelix_rt.train.quantizer import SimVQ, code_usage, fuse, normalise
from kelix_rt.train.reading import Reader, Reading, read_scene, reader_config
from kelix_rt.train.recipe import Recipe
from kelix_rt.train.states import load_modules, write_whole
from kelix_rt.train.token_labels import LabelHead, token_labels
from kelix_rt.train.world import Split, draw, make_scene
from kelix_rt.train.world_scene import Scene
from kelix_rt.weights import split_weights

STAGES = ("warmup", "1", "2", "3")
CONTINUOUS = "warmup"  # the stage without a quantizer
ADAPTERS = ("merger.", "aligner.", "encoder.", "z_", "up_projectors")  # trained in stage 1
FEATURES_PER_CENTRE = 20
READER_LAYERS = 3
# Questions asked of a picture, and whether a caption follows.
TASKS = {"warmup": (3, True), "1": (0, True), "2": (4, True), "3": (5, False)}


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of a step: patches [n, 3, P, P], grids int64 [B, 3], what is read from each.

    labels: int64 [n / 4, 5], see `token_labels`.
    """

    patches: Tensor
    grids: Tensor
    labels: Tensor
    readings: Sequence[Reading]


def new_vision_tokenizer(
    config: TokenizerConfig, device: torch.device | str, seed: int
) -> VisionTokenizer:
    """A tokenizer with random weights: normal by fan-in, residual branches scaled by their number.

    Its codebooks are not set: `SimVQ` has them while it is trained.
    """
    model = VisionTokenizer(config)
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * max(1, config.vision_config.num_hidden_layers)) ** -0.5
    for name, parameter in model.named_parameters():
        if name == "z_weight" or (parameter.dim() < 2 and name.endswith("weight")):
            nn.init.ones_(parameter)
        elif name == "z_bias" or parameter.dim() < 2:
            nn.init.zeros_(parameter)
        else:
            std = 0.02 if name == "positions" else parameter.shape[-1] ** -0.5
            if name.endswith(("attention.output.weight", "down.weight")):
                std *= depth
            if name == "up_projectors":
                std *= 0.05 * config.n_q_tokens**-0.5  # fused embeddings as large as text's
            nn.init.normal_(parameter, std=std, generator=generator)
    return model.to(device)


class PixelHead(nn.Module):
    """A token's pixels at half resolution, as a linear map of its scaled fused embedding."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3 * patch**2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, fused: Tensor, wanted: Tensor) -> Tensor:
        """Mean squared error; fused [T, O], wanted [T, 3 * P * P] in -1..1."""
        return F.mse_loss(self.linear(fused).float(), wanted)


def token_pixels(patches: Tensor, merge_order: Tensor) -> Tensor:
    """Patches [n, 3, P, P] -> the 2x2 patches of every token at half resolution, [n / 4, 3 P P]."""
    half = F.avg_pool2d(patches.float(), 2)
    return half[merge_order].reshape(len(patches) // 4, -1)


@dataclass
class TokenizerTrainer:
    """Everything the stages need, with the modules they train. out: where checkpoints go.

    device: where the modules are. text: with the special token <|im_end|>.
    """

    recipe: Recipe
    config: TokenizerConfig
    text: TextTokenizer
    images: ImageProcessor
    out: Path
    device: torch.device | str = "cpu"
    model: VisionTokenizer = field(init=False)
    quantizer: SimVQ = field(init=False)
    reader: Reader = field(init=False)
    pixels: PixelHead = field(init=False)
    labels: LabelHead = field(init=False)

    def __post_init__(self) -> None:
        sizes, seed = self.recipe.sizes, self.recipe.seed
        self.end_id = self.text.token_id("<|im_end|>")
        self.model = new_vision_tokenizer(self.config, self.device, seed)
        self.quantizer = SimVQ(self.config).to(self.device)
        own = reader_config(
            self.text.vocab_size, self.config.output_dim, READER_LAYERS, sizes.max_positions
        )
        self.reader = Reader(own, seed).to(self.device)
        patch = self.config.vision_config.patch_size
        self.pixels = PixelHead(self.config.output_dim, patch).to(self.device)
        self.labels = LabelHead(self.config.output_dim).to(self.device)
        self._recent: list[Tensor] = []
        self._latest: tuple[Tensor, Tensor] | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All that a checkpoint holds."""
        return {
            "model": self.model,
            "quantizer": self.quantizer,
            "reader": self.reader,
            "pixels": self.pixels,
            "labels": self.labels,
        }

    def run(self, stages: Sequence[str] = STAGES, **options: Any) -> StageResult:
        """Trains the stages in order, each from the checkpoint of the one before it.

        options: further arguments of `run_stage`. Raises ConfigError where the checkpoint of an
        earlier stage is missing or does not fit.
        """
        result = None
        for name in stages:
            result = self._run(name, options)
        if result is None:
            raise ValueError("TokenizerTrainer.run: no stage was named")
        return result

    def batch(self, name: str, step: int) -> PictureBatch:
        """What step `step` learns from, on the CPU: pictures of one size with their readings."""
        rng = random.Random(f"kelix tokenizer {self.recipe.seed} {name} {step}")
        sizes = self.recipe.sizes
        side = rng.choice((sizes.side, *sizes.other_sides))
        num_questions, with_caption = TASKS[name]
        patches, grids, labels, readings = [], [], [], []
        for _ in range(self.recipe.tokenizer[name].batch):
            scene = scene_of(rng.randrange(self.recipe.pictures), self.recipe.seed)
            pixels, grid = self.images.patchify(draw(scene, side))
            patches.append(pixels)
            grids.append(grid)
            labels.append(token_labels(scene, side // self.images.factor))
            readings.append(
                read_scene(scene, self.text, self.end_id, rng, num_questions, with_caption)
            )
        return PictureBatch(torch.cat(patches), torch.cat(grids), torch.cat(labels), readings)

    def losses(self, batch: PictureBatch, continuous: bool) -> dict[str, Tensor]:
        """loss = text (next token) + labels + pixels + vq; without vq while `continuous`."""
        patches = batch.patches.to(self.device)
        layout = self.model.layout(patches, batch.grids)
        z = self.model.project(self._features(patches, layout))
        losses = {}
        if continuous:
            vectors = normalise(z, self.model)
        else:
            quantized = self.quantizer(z, self.model)
            vectors, losses["vq"] = quantized.vectors, quantized.loss
            self._recent.append(quantized.codes)
        fused = fuse(vectors, self.model)
        tokens = [length // 4 for length in layout.lengths]
        losses["text"] = self.reader(fused, tokens, batch.readings)
        wanted = token_pixels(patches, layout.merge_order)
        # Fused embeddings start as small as text's; linear heads learn from inputs around 1.
        scaled = F.rms_norm(fused, fused.shape[1:])
        losses["pixels"] = self.pixels(scaled, wanted)
        labels = batch.labels.to(self.device)
        losses["labels"] = self.labels(scaled, labels)
        self._latest = scaled.detach(), labels
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @torch.no_grad()
    def codes(self, pictures: int, split: Split = "val") -> Tensor:
        """Codes [T, N] of the first pictures of a split, at the side that drawings have."""
        self.set_codebooks()
        found = []
        for index in range(pictures):
            scene = make_scene(split, index, self.recipe.seed)
            found.append(self.model.encode(*self.patches(scene)))
        return torch.cat(found)

    @torch.no_grad()
    def set_codebooks(self) -> None:
        """Gives the model the codebooks the quantizer has now, so that it can encode."""
        self.model.set_codebooks(self.quantizer.codebooks())

    def export(self, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes config.json and model.safetensors in the released layout, without a prefix.

        Raises TrainingError when they cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        config = {"__class__": "KeyeTokenizerConfig", **asdict(self.config)}
        write_whole(directory / "config.json", json.dumps(config, indent=2).encode())
        tensors = split_weights(self.model, weight_map(self.config, True)) | self.quantizer.stored()
        stored = {name: tensor.to("cpu", dtype) for name, tensor in tensors.items()}
        write_whole(directory / "model.safetensors", save(stored, {"format": "pt"}))

    def _run(self, name: str, options: Mapping[str, Any]) -> StageResult:
        stage = self.recipe.tokenizer[name]
        self._start_from(name)
        self._unfreeze(name)
        modules = self.modules
        for module in modules.values():
            module.train()
        self._recent.clear()
        batches = Ahead(lambda step: self.batch(name, step), stage.steps, workers_for(self.device))
        result = run_stage(
            f"tokenizer-{name}",
            modules=modules,
            parameters=[p for module in modules.values() for p in module.parameters()],
            loss_fn=lambda step: self.losses(batches(step), name == CONTINUOUS),
            steps=stage.steps,
            lr=stage.lr,
            warmup=stage.warmup,
            lr_floor=stage.lr_floor,
            out=self.out,
            seed=self.recipe.seed,
            device=self.device,
            config=self.recipe.facts() | {"batch": stage.batch},
            on_log=self._measures,
            **options,
        )
        for module in modules.values():
            module.eval()
        return result

    def _unfreeze(self, name: str) -> None:
        for module in self.modules.values():
            module.requires_grad_(name != "1")
        self.quantizer.requires_grad_(name != CONTINUOUS)
        if name == "1":
            for key, parameter in self.model.named_parameters():
                parameter.requires_grad_(key.startswith(ADAPTERS))

    def _start_from(self, name: str) -> None:
        order = STAGES.index(name)
        if order == 0:
            return
        before = STAGES[order - 1]
        load_modules(self.out / f"tokenizer-{before}.pt", self.modules)
        if before == CONTINUOUS and not (self.out / f"tokenizer-{name}.pt").exists():
            self.quantizer.start(self._corpus(), self.model, self.recipe.seed)

    @torch.no_grad()
    def _corpus(self) -> Tensor:
        """Features [M, E] of training pictures, as many as K-means wants."""
        wanted = FEATURES_PER_CENTRE * self.config.codebook_size
        found: list[Tensor] = []
        index = 0
        while sum(map(len, found)) < wanted:
            scene = scene_of(index % self.recipe.pictures, self.recipe.seed)
            patches, grid = self.patches(scene)
            found.append(self._features(patches, self.model.layout(patches, grid)))
            index += 1
        return torch.cat(found)

    def patches(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """Patches of a scene at the side that drawings have, on the device, and their grid."""
        patches, grid = self.images.patchify(draw(scene, self.recipe.sizes.side))
        return patches.to(self.device), grid

    def _features(self, patches: Tensor, layout: PatchLayout) -> Tensor:
        hidden = self.model.encode_patches(self.model.embed_patches(patches, layout), layout)
        return self.model.merge(hidden, layout)

    def _measures(self, step: int) -> dict[str, float]:
        """Share of labels right in the last batch; least utilisation and perplexity among the
        sub-codebooks since the last logged step."""
        found = {} if self._latest is None else self.labels.right(*self._latest)
        if self._recent:
            used, perplexity = code_usage(torch.cat(self._recent), self.config.codes_per_book)
            self._recent.clear()
            found |= {"utilisation": float(used.min()), "perplexity": float(perplexity.min())}
        return found
