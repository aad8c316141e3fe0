from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kelix_rt.errors import ConfigError
from kelix_rt.train import states
from kelix_rt.train.loop import StageResult, TrainingError, learning_rate, run_stage


class Stop(Exception):
    """Stands for the power cut."""


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def noisy_loss(model: nn.Linear, stop_at: int | None = None, bad_at: int | None = None) -> Any:
    def loss(step: int) -> dict[str, Tensor]:
        if step == stop_at:
            raise Stop
        x = torch.randn(8, 4)  # the data depends on the generator alone
        value = (model(x) - x[:, :3]).square().mean()
        return {
            "loss": value * float("nan") if step == bad_at else value,
            "step": torch.tensor(1.0),
        }

    return loss


def run(model: nn.Linear, out: Path, steps: int = 20, **options: Any) -> StageResult:
    loss_options = {key: options.pop(key) for key in ("stop_at", "bad_at") if key in options}
    settings = {"lr": 0.05, "warmup": 3, "log_every": 5, "save_every_seconds": 0.0, **options}
    return run_stage(
        "fit",
        modules={"model": model},
        parameters=model.parameters(),
        loss_fn=noisy_loss(model, **loss_options),
        steps=steps,
        out=out,
        **settings,
    )


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "fit.jsonl").read_text().splitlines()]


def test_loss_falls_and_is_logged(tmp_path: Path) -> None:
    result = run(make_model(), tmp_path, steps=60)
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == list(range(5, 61, 5))
    assert logged[-1]["loss"] < 0.3 * logged[0]["loss"]
    assert result.metrics["loss"] == logged[-1]["loss"]
    assert result.resumed_from == 0


def test_an_interrupted_stage_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, broken = make_model(), make_model()
    run(whole, tmp_path / "whole")
    with pytest.raises(Stop):
        run(broken, tmp_path / "broken", stop_at=13)
    resumed = nn.Linear(4, 3)
    result = run(resumed, tmp_path / "broken")
    assert result.resumed_from == 13
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    last = [{k: v for k, v in lines(tmp_path / n)[-1].items() if k != "steps_per_second"}
            for n in ("whole", "broken")]  # fmt: skip
    assert last[0] == last[1]
    assert [line["step"] for line in lines(tmp_path / "broken")] == [5, 10, 15, 20]


def test_lines_after_the_last_checkpoint_are_dropped(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(make_model(), tmp_path, stop_at=13, save_every_seconds=0.0)
    with open(tmp_path / "fit.jsonl", "a") as file:
        file.write('{"stage": "fit", "step": 15}\n{"stage": "fi')
    run(make_model(), tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [5, 10, 15, 20]


def test_a_finished_stage_is_only_loaded(tmp_path: Path) -> None:
    first = make_model()
    run(first, tmp_path)
    second = nn.Linear(4, 3)
    assert run(second, tmp_path, stop_at=0).resumed_from == 20
    assert torch.equal(first.weight, second.weight)


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 7 gave loss nan.*last good checkpoint is"):
        run(make_model(), tmp_path, bad_at=7)
    kept = torch.load(tmp_path / "fit.pt", weights_only=True)
    assert kept["step"] == 7
    assert all(torch.isfinite(t).all() for t in kept["modules"]["model"].values())


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_model(), tmp_path)
    before = (tmp_path / "fit.pt").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states.os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left on device; the last good one is kept"):
        states.write_whole(tmp_path / "fit.pt", b"new")
    assert (tmp_path / "fit.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_a_picture_that_cannot_be_written_stops_with_the_reason(tmp_path: Path) -> None:
    def full(step: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError, match=r"stage fit: step 5 cannot be shown: .*No space"):
        run(make_model(), tmp_path, on_log=full)
    assert torch.load(tmp_path / "fit.pt", weights_only=True)["step"] == 4


def test_one_process_trains_a_stage(tmp_path: Path) -> None:
    refused = pytest.raises(TrainingError, match=r"fit\.pt: another process trains this stage")
    with states.only_writer(tmp_path / "fit.pt"), refused:
        run(make_model(), tmp_path)
    assert run(make_model(), tmp_path).resumed_from == 0


def test_writers_do_not_share_a_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that writes while another is about to rename leaves it what it wrote."""
    file, replace = tmp_path / "x", os.replace

    def late(partial: Path, path: Path) -> None:
        monkeypatch.setattr(states.os, "replace", replace)
        monkeypatch.setattr(states.os, "getpid", lambda: 7)
        states.write_whole(path, b"theirs")
        assert partial.read_bytes() == b"ours"
        replace(partial, path)

    monkeypatch.setattr(states.os, "replace", late)
    states.write_whole(file, b"ours")
    assert file.read_bytes() == b"ours" and [*tmp_path.iterdir()] == [file]


def test_a_stage_that_is_not_finished_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(make_model(), tmp_path, stop_at=13)
    assert states.steps_done(tmp_path / "fit.pt") == 13
    assert states.steps_done(tmp_path / "none.pt") == 0
    with pytest.raises(ConfigError, match=r"fit\.pt stopped at step 13 of 20; finish that stage"):
        states.load_modules(tmp_path / "fit.pt", {"model": make_model()})


def test_another_world_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "WORLD_VERSION", 0)
    run(make_model(), tmp_path)
    with pytest.raises(ConfigError, match=r"fit\.pt: world_version.*world 0"):
        run(make_model(), tmp_path)
    with pytest.raises(ConfigError, match="world_version"):
        states.load_modules(tmp_path / "fit.pt", {"model": make_model()})


@pytest.mark.parametrize("change", [{"lr": 0.1}, {"steps": 30}, {"config": {"width": 8}}])
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    run(make_model(), tmp_path)
    with pytest.raises(ConfigError, match=rf"other settings \({next(iter(change))} "):
        run(make_model(), tmp_path, **change)


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    run(make_model(), tmp_path)
    with pytest.raises(ConfigError, match="no module 'other'"):
        states.load_modules(tmp_path / "fit.pt", {"other": make_model()})
    with pytest.raises(ConfigError, match="another shape"):
        states.load_modules(tmp_path / "fit.pt", {"model": nn.Linear(2, 2)})
    (tmp_path / "fit.pt").write_bytes(b"half a file")
    with pytest.raises(ConfigError, match="cannot be read"):
        run(make_model(), tmp_path)
    with pytest.raises(ConfigError, match="run the stage that writes it first"):
        states.load_modules(tmp_path / "none.pt", {})


def test_rates_rise_and_fall() -> None:
    rates = [learning_rate(step, 100, 1.0, 10, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_stage_without_parameters_is_refused(tmp_path: Path) -> None:
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        run(model, tmp_path)
