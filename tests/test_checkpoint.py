from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from kelix_rt.assets import bundled
from kelix_rt.checkpoint import Checkpoint, resolve
from kelix_rt.errors import WeightError

TENSORS = {"a": torch.arange(6.0).view(3, 2), "b": torch.ones(4, dtype=torch.bfloat16)}


def save(path: Path, *names: str) -> None:
    save_file({name: TENSORS[name] for name in names}, str(path))


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    file = directory / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def check(checkpoint: Checkpoint) -> None:
    assert sorted(checkpoint.names()) == ["a", "b"]
    assert checkpoint.shape("a") == (3, 2)
    assert checkpoint.dtype("b") == torch.bfloat16
    assert torch.equal(checkpoint.read("a"), TENSORS["a"])
    assert torch.equal(checkpoint.read("a", slice(1, 3)), TENSORS["a"][1:])


def test_single_file_beside_other_safetensors(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a", "b")
    save_file({"c": torch.zeros(1)}, str(tmp_path / "fixtures.safetensors"))
    check(Checkpoint(tmp_path))
    check(Checkpoint(tmp_path / "model.safetensors"))


def test_files_under_other_names(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"no \.safetensors file"):
        Checkpoint(tmp_path)
    save(tmp_path / "one.safetensors", "a")
    save(tmp_path / "two.safetensors", "b")
    check(Checkpoint(tmp_path))


@pytest.mark.parametrize("first", [0, 1])
def test_numbered_shards_without_index(tmp_path: Path, first: int) -> None:
    save(tmp_path / f"model-{first:05d}-of-00002.safetensors", "a")
    save(tmp_path / f"model-{first + 1:05d}-of-00002.safetensors", "b")
    check(Checkpoint(tmp_path))


def test_index(tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", "a")
    save(tmp_path / "two.safetensors", "b")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    check(Checkpoint(tmp_path))


def test_index_that_lists_what_no_shard_holds(tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", "a")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(WeightError, match=r"\['b'\]"):
        Checkpoint(tmp_path)


def test_lost_shard(tmp_path: Path) -> None:
    save(tmp_path / "model-00001-of-00003.safetensors", "a")
    save(tmp_path / "model-00003-of-00003.safetensors", "b")
    with pytest.raises(WeightError, match="incomplete"):
        Checkpoint(tmp_path)
    write_index(tmp_path, {"a": "gone.safetensors"})
    with pytest.raises(WeightError, match=r"gone\.safetensors"):
        Checkpoint(tmp_path)


def test_a_tensor_stored_twice(tmp_path: Path) -> None:
    save(tmp_path / "model-00001-of-00002.safetensors", "a")
    save(tmp_path / "model-00002-of-00002.safetensors", "a", "b")
    with pytest.raises(WeightError, match="a is stored twice"):
        Checkpoint(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save(file, "a", "b")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(WeightError, match=r"model\.safetensors cannot be read"):
        Checkpoint(tmp_path)


def test_renames(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a", "b")
    checkpoint = Checkpoint(tmp_path, renames=[(r"^a$", "layer.a")])
    assert "layer.a" in checkpoint
    assert torch.equal(checkpoint.read("layer.a"), TENSORS["a"])
    with pytest.raises(WeightError, match="'a'"):
        checkpoint.read("a")


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(WeightError, match="neither"):
        resolve("x" * 300)
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "kelix-tiny"
    own.mkdir()
    assert resolve("./kelix-tiny") == resolve(Path("kelix-tiny")) == own  # not the bundled one
    assert resolve("kelix-tiny") == bundled("kelix-tiny") != own
    with pytest.raises(WeightError, match="neither an existing path nor a hub id"):
        resolve(tmp_path / "no" / "such" / "place")
    with pytest.raises(WeightError, match="neither"):
        resolve("word")


@pytest.mark.parametrize("progress", [True, False])
def test_resolve_downloads_hub_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: bool
) -> None:
    asked, patterns = [], []

    def download(repo: str, **options: object) -> str:
        asked.append((repo, options["tqdm_class"]))
        patterns.append(options["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("owner/model", progress) == tmp_path
    repo, bar = asked[0]
    assert repo == "owner/model"
    assert (bar is None) == progress

    resolve("owner/pipeline", part="vae")
    files = ["config.json", "diffusion_pytorch_model.safetensors", "vae/config.json"]
    others = ["scheduler/config.json", "text_encoder/model.safetensors"]
    assert list(filter_repo_objects(files + others, allow_patterns=patterns[1])) == files
    assert list(filter_repo_objects(others, allow_patterns=patterns[0])) == others

    def offline(repo: str, **options: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(WeightError, match="owner/model: download from the hub failed: no route"):
        resolve("owner/model", progress)
