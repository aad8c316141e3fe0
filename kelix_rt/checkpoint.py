"""Read access to the safetensors files of a checkpoint, and finding the checkpoint itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kelix_rt.assets import BUNDLED, bundled
from kelix_rt.errors import WeightError

Renames = Sequence[tuple[str, str]]

_STEMS = ("model", "diffusion_pytorch_model")
_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.py", "*.model")
_KINDS = ("json", "safetensors")
_HUB_TOP = ("config.json", *(f"{stem}*.{kind}" for stem in _STEMS for kind in _KINDS))
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Checkpoint:
    """The tensors of one directory (or one .safetensors file), opened lazily and by name.

    A directory holds `model.safetensors`, or an index next to its shards, or shards numbered from 0
    or 1 without an index (`diffusion_pytorch_model` likewise); other .safetensors files are read
    where there is none of these. `renames` are (regular expression, replacement) pairs turning
    stored names of older checkpoints into today's. Raises WeightError for absent, damaged or
    contradictory files.
    """

    def __init__(self, path: str | Path, renames: Renames = ()) -> None:
        self.path = Path(path)
        self._files: dict[str, Any] = {}
        self._stored: dict[str, str] = {}
        index: dict[str, str] = {}
        for file in _find_files(self.path, index):
            handle = _open(file)
            for stored in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                name = _rename(stored, renames)
                if name in self._files:
                    raise WeightError(f"{self.path}: tensor {name} is stored twice")
                self._files[name] = handle
                self._stored[name] = stored
        lost = sorted(set(index) - set(self._stored.values()))
        if lost:
            raise WeightError(f"{self.path}: the index lists tensors no shard holds: {lost}")

    def names(self) -> tuple[str, ...]:
        """All tensor names, after renaming."""
        return tuple(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor; nothing is read but the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        code = self._slice(name).get_dtype()
        if code not in _DTYPES:
            raise WeightError(f"{self.path}: {name} has dtype {code}, which is not supported")
        return _DTYPES[code]

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor on the CPU, or only these rows of it (the others are not read)."""
        if rows is None:
            tensor: torch.Tensor = self._handle(name).get_tensor(self._stored[name])
        else:
            tensor = self._slice(name)[rows]
        return tensor

    def _handle(self, name: str) -> Any:
        if name not in self._files:
            raise WeightError(f"{self.path}: missing 1 tensors: {[name]}")
        return self._files[name]

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(self._stored[name])


def _rename(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise WeightError(f"{file} cannot be read as safetensors: {error}") from error


def _find_files(path: Path, index: dict[str, str]) -> list[Path]:
    """Files to open, in order; fills `index` (tensor -> file) where the directory has one."""
    if path.is_file():
        return [path]
    for stem in _STEMS:
        single = path / f"{stem}.safetensors"
        if single.is_file():
            return [single]
        listing = path / f"{stem}.safetensors.index.json"
        if listing.is_file():
            index.update(_read_index(listing))
            return [path / file for file in sorted(set(index.values()))]
        shards = sorted(path.glob(f"{stem}-*-of-*.safetensors"))
        if shards:
            _check_numbering(path, stem, shards)
            return shards
    others = sorted(path.glob("*.safetensors"))
    if not others:
        raise WeightError(f"{path} holds no .safetensors file; its weights must lie there")
    return others


def _read_index(listing: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(listing.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightError(f"{listing} must hold a JSON object with a weight_map") from error
    return {str(name): str(file) for name, file in weight_map.items()}


def _check_numbering(path: Path, stem: str, shards: Sequence[Path]) -> None:
    matches = [re.fullmatch(rf"{stem}-(\d+)-of-(\d+)", shard.stem) for shard in shards]
    numbers = sorted(int(m[1]) for m in matches if m)
    totals = {int(m[2]) for m in matches if m}
    complete = len(totals) == 1 and numbers in (
        list(range(max(totals))),
        list(range(1, max(totals) + 1)),
    )
    if not complete:
        raise WeightError(f"{path}: shards are incomplete: {[shard.name for shard in shards]}")


def resolve(model: str | Path, progress: bool = True, part: str | None = None) -> Path:
    """The local directory of `model`, absolute: the string "kelix-tiny", which ships with the
    package, a path, or a Hugging Face hub id, which is downloaded.

    progress: show huggingface_hub's own progress bars. part: of a hub id download only the model
    at its top and this subfolder, where it is a whole pipeline. Raises WeightError when it is none
    of them, or when the download fails.
    """
    own = bundled(model)
    if own is not None:
        return own
    path = Path(model).expanduser()
    if _exists(path):
        return path.absolute()
    if not _HUB_ID.fullmatch(str(model)):
        raise WeightError(
            f"{model} is neither an existing path nor a hub id (owner/name) nor {BUNDLED}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    bar = None if progress else Quiet
    wanted = list(_HUB_FILES)
    if part is not None:  # "*" alone takes in subfolders
        wanted = [*_HUB_TOP, *(f"{part}/*.{kind}" for kind in _KINDS)]
    try:
        return Path(snapshot_download(str(model), allow_patterns=wanted, tqdm_class=bar))
    except Exception as error:  # the hub client raises many unrelated types
        raise WeightError(f"{model}: download from the hub failed: {error}") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system
        return False
