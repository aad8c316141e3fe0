"""Trained parts to a checkpoint directory in the released layout, in bfloat16."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from kelix_rt.config import KelixConfig, TokenizerConfig
from kelix_rt.errors import ConfigError
from kelix_rt.models import dit_weights, language_weights, vision_weights
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.processing import ImageProcessor
from kelix_rt.processing.images import CONFIG_NAME
from kelix_rt.train.states import TrainingError, write_whole
from kelix_rt.train.world_scene import WORLD_VERSION, require_world
from kelix_rt.weights import split_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderDC

MAX_BYTES = 24_000_000
TOKENIZER_PREFIX = "visual_tokenizer."
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_WORLD_KEY = "world_version"


@dataclass(frozen=True)
class TrainedParts:
    """What is exported.

    codebooks: the raw tensors the tokenizer's codebooks are projected from, by their stored names
    (`vision_weights.codebook_names`). text: directory of the text tokenizer's files.
    """

    language: KelixLM
    tokenizer: VisionTokenizer
    codebooks: Mapping[str, Tensor]
    images: ImageProcessor
    text: Path
    dit: KelixDiT
    vae: AutoencoderDC


def export(parts: TrainedParts, folder: Path, card: str, max_bytes: int = MAX_BYTES) -> int:
    """Writes the checkpoint to `folder`, replacing it, and returns its size in bytes.

    card: the model card (README.md). Nothing is replaced before everything is written. Raises
    ConfigError when the result is larger than max_bytes, TrainingError when it cannot be written.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "dit").mkdir(parents=True)
        _write_language(parts, partial)
        _write_drawing(parts, partial)
        for name in TEXT_FILES:
            if (parts.text / name).is_file():
                shutil.copyfile(parts.text / name, partial / name)
        write_whole(partial / "README.md", card.encode())
        sizes = {str(p.relative_to(partial)): p.stat().st_size for p in _files(partial)}
        total = sum(sizes.values())
        if total > max_bytes:
            raise ConfigError(
                f"export: the checkpoint must have at most {max_bytes} bytes, got {total}: {sizes}"
            )
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:
        raise TrainingError(f"export: {folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def stored_language(parts: TrainedParts) -> dict[str, Tensor]:
    """Tensors of language model and visual tokenizer by their released names."""
    language = copy.copy(parts.language)
    language._modules = {**language._modules, "visual_tokenizer": None}
    tensors = split_weights(language, language_weights.weight_map(language.config))
    tokenizer = parts.tokenizer
    mapping = vision_weights.weight_map(tokenizer.config, tokenizer.up_projectors is not None)
    names = set(vision_weights.codebook_names(tokenizer.config))
    if names != set(parts.codebooks):
        raise ConfigError(
            f"export: codebooks must hold {sorted(names)}, got {sorted(parts.codebooks)}"
        )
    own = split_weights(tokenizer, mapping) | dict(parts.codebooks)
    return tensors | {TOKENIZER_PREFIX + name: tensor for name, tensor in own.items()}


def own_centres(config: TokenizerConfig, codebooks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Codebook tensors in which each quantizer stores only the centres it uses.

    The release repeats the table of all centres in every quantizer; loaders take both, and here
    the copies would be a tenth of the checkpoint.
    """
    size = config.codes_per_book
    found = dict(codebooks)
    for i in range(config.n_q_tokens):
        name = f"quantizer.{i}.embedding.weight"
        found[name] = codebooks[name][size * i : size * (i + 1)].contiguous()
    return found


def require_checkpoint_world(folder: Path) -> None:
    """Raises ConfigError when an exported checkpoint belongs to another version of the world."""
    file = folder / "model.safetensors"
    try:
        with safe_open(str(file), framework="pt") as opened:
            version = (opened.metadata() or {}).get(_WORLD_KEY)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    try:
        require_world(None if version is None else int(version))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _write_language(parts: TrainedParts, folder: Path) -> None:
    config = parts.language.config
    slots = config.num_codes + 1
    decoder = replace(config.token_decoder_config, max_pos_length=slots)
    stated: KelixConfig = replace(
        config, token_decoder_config=decoder, tokenizer_config=parts.tokenizer.config
    )
    _write_json(folder / "config.json", asdict(stated) | {"__class__": "KeyeARConfig"})
    _write_tensors(folder / "model.safetensors", stored_language(parts))
    images = parts.images
    values = {f.name: getattr(images, f.name) for f in fields(images) if f.init}
    steps = {name: True for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")}
    kind = {"image_processor_type": "SiglipImageProcessor", "temporal_patch_size": 1}
    _write_json(folder / CONFIG_NAME, kind | steps | values)


def _write_drawing(parts: TrainedParts, folder: Path) -> None:
    config = asdict(parts.dit.config) | {"__class__": "SanaConfig"}
    _write_json(folder / "dit" / "config.json", config)
    tensors = split_weights(parts.dit, dit_weights.weight_map(parts.dit.config))
    _write_tensors(folder / "dit" / "model.safetensors", tensors)
    copy.deepcopy(parts.vae).to(torch.bfloat16).save_pretrained(str(folder / "vae"))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    stored = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in tensors.items()}
    write_whole(path, save(stored, {"format": "pt", _WORLD_KEY: str(WORLD_VERSION)}))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
