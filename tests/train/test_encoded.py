from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kelix_rt.train import encoded as module
from kelix_rt.train.encoded import Batch, encoded, fingerprint


class Stop(Exception):
    """Stands for the power cut."""


def batches(made: list[int], stop_at: int | None = None) -> list[Batch]:
    """Five batches of two names, which note their numbers when they are made."""

    def make(number: int) -> Tensor:
        if number == stop_at:
            raise Stop
        made.append(number)
        return torch.full((2, 3), float(number))

    return [("ab"[number % 2], lambda number=number: make(number)) for number in range(5)]


def test_batches_of_a_name_stand_end_to_end_and_are_made_once(tmp_path: Path) -> None:
    made: list[int] = []
    model = nn.Linear(2, 2)
    for _ in range(2):
        found = encoded(tmp_path / "x.safetensors", {"side": 3}, model, lambda: batches(made))
        assert found["a"][::2, 0].tolist() == [0, 2, 4] and found["b"][::2, 0].tolist() == [1, 3]
    assert made == [0, 1, 2, 3, 4]
    encoded(tmp_path / "x.safetensors", {"side": 4}, model, lambda: batches(made))
    with torch.no_grad():
        model.bias += 1
    encoded(tmp_path / "x.safetensors", {"side": 4}, model, lambda: batches(made))
    assert made == 3 * [0, 1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_interrupted_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY_SECONDS", 0.0)
    model, made = nn.Linear(2, 2), list[int]()
    with pytest.raises(Stop):
        encoded(tmp_path / "x.safetensors", {}, model, lambda: batches(made, stop_at=3))
    found = encoded(tmp_path / "x.safetensors", {}, model, lambda: batches(made))
    assert made == [0, 1, 2, 3, 4]
    assert found["a"][::2, 0].tolist() == [0, 2, 4] and found["b"][::2, 0].tolist() == [1, 3]
    with pytest.raises(Stop):
        encoded(tmp_path / "y.safetensors", {}, model, lambda: batches([], stop_at=3))
    again: list[int] = []
    encoded(tmp_path / "y.safetensors", {"other": 1}, model, lambda: batches(again))
    assert again == [0, 1, 2, 3, 4]


def test_fingerprints_see_every_weight() -> None:
    model = nn.Linear(3, 2)
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.bias[1] += 1e-3
    assert fingerprint(model) != before
