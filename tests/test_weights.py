from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kelix_rt.checkpoint import Checkpoint
from kelix_rt.errors import WeightError
from kelix_rt.models import dit_weights, language_weights, load, vision_weights
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.weights import Source, load_weights, split_weights


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Linear(3, 4)
        self.flat = nn.Parameter(torch.empty(2, 6))
        self.register_buffer("table", torch.empty(2, 3))
        self.register_buffer("scratch", torch.empty(9), persistent=False)


MAP = {
    "qk.weight": Source(("q.weight", "k.weight")),
    "qk.bias": Source(("q.bias", "k.bias")),
    "flat": Source(("conv",), reshape=(2, 6)),
    "table": Source(("big",), rows=slice(1, 3)),
}


def stored() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "q.weight": torch.randn(1, 3), "k.weight": torch.randn(3, 3),
        "q.bias": torch.randn(1), "k.bias": torch.randn(3),
        "conv": torch.randn(2, 3, 1, 2), "big": torch.randn(5, 3),
    }  # fmt: skip


def make(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> tuple[Toy, Checkpoint]:
    save_file(tensors, str(tmp_path / "model.safetensors"))
    with torch.device("meta"):
        toy = Toy()
    return toy, Checkpoint(tmp_path)


def test_fusions_rows_and_reshapes(tmp_path: Path) -> None:
    tensors = stored()
    toy, checkpoint = make(tmp_path, tensors)
    seen: list[tuple[str, int]] = []
    report = load_weights(toy, checkpoint, MAP, on_tensor=lambda n, b: seen.append((n, b)))
    assert torch.equal(toy.qk.weight, torch.cat([tensors["q.weight"], tensors["k.weight"]]))
    assert torch.equal(toy.qk.bias, torch.cat([tensors["q.bias"], tensors["k.bias"]]))
    assert torch.equal(toy.flat, tensors["conv"].view(2, 6))
    assert torch.equal(toy.get_buffer("table"), tensors["big"][1:3])
    assert not any(parameter.requires_grad for parameter in toy.parameters())
    assert [name for name, _ in seen] == list(MAP)
    assert report.loaded_bytes == sum(size for _, size in seen) == 4 * (12 + 4 + 12 + 6)


def test_dtype_is_cast_or_kept(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in stored().items()}
    tensors["q.bias"] = tensors["q.bias"].float()  # the commonest dtype wins
    toy, checkpoint = make(tmp_path, tensors)
    load_weights(toy, checkpoint, MAP)
    assert {p.dtype for p in toy.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        toy = Toy()
    load_weights(toy, checkpoint, MAP, dtype=torch.float16)
    assert {p.dtype for p in toy.parameters()} == {torch.float16}


def test_prefix_and_leftovers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {f"part.{name}": tensor for name, tensor in stored().items()}
    extra = {"part.old.x": torch.zeros(1), "part.new": torch.zeros(1), "other": torch.zeros(1)}
    toy, checkpoint = make(tmp_path, tensors | extra)
    with caplog.at_level(logging.WARNING):
        report = load_weights(toy, checkpoint, MAP, prefix="part.", unused=(r"old\..*",))
    assert report.unused_known == ("part.old.x",)
    assert report.unknown == ("part.new",)
    assert len(caplog.records) == 1
    assert "part.new" in caplog.text


def test_all_missing_names_are_listed(tmp_path: Path) -> None:
    tensors = stored()
    del tensors["q.bias"], tensors["big"]
    toy, checkpoint = make(tmp_path, tensors)
    with pytest.raises(WeightError, match=r"missing 2 tensors: \['big', 'q\.bias'\]"):
        load_weights(toy, checkpoint, MAP)
    assert toy.qk.weight.is_meta, "nothing may be loaded before the names are checked"


@pytest.mark.parametrize(
    ("name", "shape"),
    [("k.weight", (2, 3)), ("k.weight", (3, 4)), ("conv", (3, 2, 1, 3)), ("big", (2, 3))],
)
def test_misshapen_tensors_are_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    toy, checkpoint = make(tmp_path, stored() | {name: torch.zeros(shape)})
    with pytest.raises(WeightError, match=rf"{name}.*must give shape"):
        load_weights(toy, checkpoint, MAP)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(tmp_path: Path, value: float) -> None:
    tensors = stored()
    tensors["k.weight"][1, 1] = value
    toy, checkpoint = make(tmp_path, tensors)
    with pytest.raises(WeightError, match=r"k\.weight holds NaN or infinity"):
        load_weights(toy, checkpoint, MAP)


def test_overflow_of_the_cast_is_noticed(tmp_path: Path) -> None:
    tensors = stored()
    tensors["conv"][0, 0, 0, 0] = 1e6
    toy, checkpoint = make(tmp_path, tensors)
    with pytest.raises(WeightError, match=r"conv holds NaN or infinity as torch\.float16"):
        load_weights(toy, checkpoint, MAP, dtype=torch.float16)


def test_mapping_must_cover_the_module(tmp_path: Path) -> None:
    toy, checkpoint = make(tmp_path, stored())
    partial = {name: source for name, source in MAP.items() if name != "flat"}
    with pytest.raises(WeightError, match=r"without source \['flat'\]"):
        load_weights(toy, checkpoint, partial)


def test_splitting_undoes_loading(tmp_path: Path) -> None:
    tensors = stored()
    toy, checkpoint = make(tmp_path, tensors)
    load_weights(toy, checkpoint, MAP)
    parts = {
        "qk.weight": ((1, 3), (3, 3)),
        "qk.bias": ((1,), (3,)),
        "flat": ((2, 3, 1, 2),),
    }
    table = {name: replace(source, parts=parts.get(name)) for name, source in MAP.items()}
    with pytest.raises(WeightError, match=r"table uses rows slice\(1, 3"):
        split_weights(toy, table)
    table["table"] = Source(("big",), rows=slice(0, 2))
    found = split_weights(toy, table)
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        expected = tensors[name] if name != "big" else tensors["big"][1:3]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("part", ["llm/tiny_a", "llm/tiny_b", "dit/tiny_release", "dit/tiny_alt"])
def test_released_layouts_come_back(golden: Path, part: str) -> None:
    checkpoint, model = Checkpoint(golden / part), load(golden / part)
    if isinstance(model, KelixLM):
        model.visual_tokenizer = None
        found = split_weights(model, language_weights.weight_map(model.config))
    else:
        assert isinstance(model, KelixDiT)
        found = split_weights(model, dit_weights.weight_map(model.config))
    assert len(found) > 40
    for name, tensor in found.items():
        expected = checkpoint.read(name)
        assert torch.equal(tensor, expected[: len(tensor)]), name
        assert tensor.shape == expected.shape or "position_embedding" in name


def test_a_tokenizer_comes_back(golden: Path) -> None:
    for part in ("tok_a", "tok_b"):
        path = golden / "tokenizer" / part
        model = VisionTokenizer.from_pretrained(path)
        mapping = vision_weights.weight_map(model.config, model.up_projectors is not None)
        checkpoint = Checkpoint(path, vision_weights.renames(""))
        for name, tensor in split_weights(model, mapping).items():
            assert torch.equal(tensor, checkpoint.read(name)), name
