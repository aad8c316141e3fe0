"""Kelix-Tok: the visual tokenizer, trained to be read.

The stages of the report: 1 aligns the quantizer (vision transformer frozen), 2 trains everything on
understanding, 3 anneals. In front of them stands a warm-up on close-ups with continuous features,
in place of the pretrained NaViT that K-means takes its features from; the reader, pretrained in the
report too, starts from nothing and learns from stage 1 on. A second addition: linear maps give a
token's pixels and name what lies there, because a transformer this small, trained this briefly,
would otherwise learn to see too late.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, repeat
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
from kelix_rt.train.pictures import ALL_SCENES, scene_of
from kelix_rt.train.quantizer import SimVQ, code_usage, fuse, normalise
from kelix_rt.train.reading import Reader, reader_config
from kelix_rt.train.recipe import Recipe
from kelix_rt.train.states import load_modules, write_whole
from kelix_rt.train.token_labels import LabelHead
from kelix_rt.train.token_pixels import PaintHead, PixelHead, token_paint, token_pixels
from kelix_rt.train.views import PictureBatch, Views
from kelix_rt.train.vision_start import new_vision_tokenizer, whiten_patches
from kelix_rt.train.world import Split, draw, make_scene
from kelix_rt.train.world_scene import Scene, strange
from kelix_rt.weights import split_weights

STAGES = ("warmup", "1", "2", "3")
CONTINUOUS = "warmup"  # the stage without a quantizer
QUIET = "3"  # the stage with twins
TWIN_WEIGHT = 3.0
PAINT_WEIGHT = 10.0
STRANGE = 1 / 3  # share of scenes whose things have no name for their colour or for their shape
ADAPTERS = ("merger.", "aligner.", "encoder.", "z_", "up_projectors")  # trained in stage 1
FEATURES_PER_CENTRE = 20
WHITENED = 150  # pictures whose patches the patch embedding starts from
READER_LAYERS = 3
# Questions asked of a picture, and whether a caption follows.
TASKS = {"1": (0, True), "2": (4, True), "3": (5, False)}


@dataclass
class TokenizerTrainer:
    """Everything the stages need, with the modules they train. out: where checkpoints go.

    device: where the modules are. text: with the special token <|im_end|>. start: weights of the
    model that the first stage begins with; without them its patches are whitened.
    """

    recipe: Recipe
    config: TokenizerConfig
    text: TextTokenizer
    images: ImageProcessor
    out: Path
    device: torch.device | str = "cpu"
    start: Mapping[str, Tensor] = field(default_factory=dict)
    model: VisionTokenizer = field(init=False)
    quantizer: SimVQ = field(init=False)
    reader: Reader = field(init=False)
    pixels: PixelHead = field(init=False)
    paint: PaintHead = field(init=False)
    labels: LabelHead = field(init=False)
    sight: LabelHead = field(init=False)

    def __post_init__(self) -> None:
        sizes, seed = self.recipe.sizes, self.recipe.seed
        self.views = Views(self.images, self.text)
        self.model = new_vision_tokenizer(self.config, self.device, seed)
        self.quantizer = SimVQ(self.config).to(self.device)
        own = reader_config(
            self.text.vocab_size, self.config.output_dim, READER_LAYERS, sizes.max_positions
        )
        self.reader = Reader(own, seed).to(self.device)
        patch = self.config.vision_config.patch_size
        self.pixels = PixelHead(self.config.output_dim, patch).to(self.device)
        self.paint = PaintHead(self.config.output_dim).to(self.device)
        self.labels = LabelHead(self.config.output_dim).to(self.device)
        self.sight = LabelHead(4 * self.config.vision_config.hidden_size).to(self.device)
        self._recent: list[Tensor] = []
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All that a checkpoint holds."""
        return {
            "model": self.model,
            "quantizer": self.quantizer,
            "reader": self.reader,
            "pixels": self.pixels,
            "paint": self.paint,
            "labels": self.labels,
            "sight": self.sight,
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
        count, sizes = self.recipe.tokenizer[name].batch, self.recipe.sizes
        endless = (scene_of(rng.randrange(ALL_SCENES), self.recipe.seed) for _ in repeat(None))
        if name == CONTINUOUS:
            mixed = (strange(s, rng) if rng.random() < STRANGE else s for s in endless)
            return self.views.close_ups(mixed, count, sizes.side, rng)
        side = rng.choice((sizes.side, *sizes.other_sides))
        scenes = list(islice(endless, count))
        strangers = [strange(scene, rng) for scene in islice(endless, round(count * STRANGE))]
        twins = name == QUIET
        return self.views.pictures(scenes, strangers, side, TASKS[name], rng, twins)

    def losses(self, batch: PictureBatch, continuous: bool) -> dict[str, Tensor]:
        """loss = text (next token) + labels + pixels + paint + sight + vq + twins.

        sight: labels read from the vision transformer itself. While `continuous` it learns from
        them alone; through a merger that has yet to learn it sees little but noise.
        paint: the colour of what is drawn, linear in the codes, so that it is not known only
        together with the shape.
        twins: tokens of the same pixels should have the same codes, wherever they lie and whatever
        lies beside them; what depends on that is noise to a language model that writes codes.

        Without text where nothing is read, without vq while `continuous`, without twins where there
        are none.
        """
        patches, covered = batch.patches.to(self.device), batch.covered.to(self.device)
        layout = self.model.layout(patches, batch.grids)
        labels = batch.labels.to(self.device)
        hidden = self._hidden(patches, layout)
        seen = hidden[layout.merge_order].view(len(labels), -1)
        merged = self.model.merge(hidden.detach() if continuous else hidden, layout)
        z = self.model.project(merged)
        losses = {"sight": self.sight(seen, labels)}
        if continuous:
            vectors = normalise(z, self.model)
        else:
            quantized = self.quantizer(z, self.model)
            vectors, losses["vq"] = quantized.vectors, quantized.loss
            if len(batch.twins):
                losses["twins"] = TWIN_WEIGHT * quantized.twin_loss(batch.twins.to(self.device))
            self._recent.append(quantized.codes)
        fused = fuse(vectors, self.model)
        if batch.readings:
            tokens = [length // 4 for length in layout.lengths[: len(batch.readings)]]
            losses["text"] = self.reader(fused[: sum(tokens)], tokens, batch.readings)
        wanted = token_pixels(torch.cat((patches, covered), dim=1), layout.merge_order)
        scaled = F.rms_norm(fused, fused.shape[1:])
        losses["pixels"] = self.pixels(scaled, wanted)
        paint = token_paint(patches, covered, layout.merge_order)
        losses["paint"] = PAINT_WEIGHT * self.paint(scaled, *paint)
        losses["labels"] = self.labels(scaled, labels)
        self._latest = scaled.detach(), seen.detach(), labels
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
            config=self.recipe.facts(batch=stage.batch),
            on_log=self._measures,
            **options,
        )
        for module in modules.values():
            module.eval()
        return result

    def _unfreeze(self, name: str) -> None:
        for module in self.modules.values():
            module.requires_grad_(True)
        if name == CONTINUOUS:
            self.quantizer.requires_grad_(False)
            self.reader.requires_grad_(False)
        if name == "1":
            for key, parameter in self.model.named_parameters():
                parameter.requires_grad_(key.startswith(ADAPTERS))

    def _start_from(self, name: str) -> None:
        order = STAGES.index(name)
        if order == 0 and self.start:
            self.model.load_state_dict(self.start, strict=False)
            return
        if order == 0:
            scenes = [scene_of(index, self.recipe.seed) for index in range(WHITENED)]
            patches = torch.cat([self.patches(scene)[0] for scene in scenes])
            whiten_patches(self.model, patches, self.recipe.seed)
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
            layout = self.model.layout(patches, grid)
            found.append(self.model.merge(self._hidden(patches, layout), layout))
            index += 1
        return torch.cat(found)

    def patches(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """Patches of a scene at the side that drawings have, on the device, and their grid."""
        patches, grid = self.images.patchify(draw(scene, self.recipe.sizes.side))
        return patches.to(self.device), grid

    def _hidden(self, patches: Tensor, layout: PatchLayout) -> Tensor:
        return self.model.encode_patches(self.model.embed_patches(patches, layout), layout)

    def label_accuracy(self) -> dict[str, float]:
        """Share of labels right by kind, in the batch of the last call of `losses`.

        From the fused embeddings, and as "seen <kind>" from the vision transformer.
        """
        if self._latest is None:
            return {}
        fused, seen, labels = self._latest
        sight = {f"seen {kind}": share for kind, share in self.sight.right(seen, labels).items()}
        return self.labels.right(fused, labels) | sight

    def _measures(self, step: int) -> dict[str, float]:
        """Share of labels right in the last batch; least utilisation and perplexity among the
        sub-codebooks since the last logged step."""
        found = self.label_accuracy()
        if self._recent:
            used, perplexity = code_usage(torch.cat(self._recent), self.config.codes_per_book)
            self._recent.clear()
            found |= {"utilisation": float(used.min()), "perplexity": float(perplexity.min())}
        return found
