"""How an engine's parts are chosen from paths and options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kelix_rt.errors import ConfigError, WeightError
from kelix_rt.loading import choose_device, choose_dtype, find_drawing, load_parts


def test_auto_takes_what_there_is() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device("auto").type == expected
    assert choose_dtype("auto") is None


@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16])
def test_dtypes_go_by_name_or_value(given: str | torch.dtype) -> None:
    assert choose_dtype(given) == torch.bfloat16


@pytest.mark.parametrize("given", ["int8", torch.int64, "half precision"])
def test_other_dtypes_are_refused(given: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match="dtype must be 'auto' or one of"):
        choose_dtype(given)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="'abacus' is not a device"):
        choose_device("abacus")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a GPU"):
        choose_device("cuda:1")


def test_drawing_is_found_where_it_may_lie(tmp_path: Path) -> None:
    assert find_drawing(tmp_path, None, None) is None
    assert find_drawing(None, None, None) is None
    (tmp_path / "dit").mkdir()
    with pytest.raises(ConfigError, match="there is no vae="):
        find_drawing(tmp_path, None, None)
    pipeline = tmp_path / "pipeline"
    (pipeline / "vae").mkdir(parents=True)
    assert find_drawing(tmp_path, None, pipeline) == (tmp_path / "dit", pipeline / "vae")
    (pipeline / "config.json").touch()
    assert find_drawing(tmp_path, None, pipeline) == (tmp_path / "dit", pipeline)


def test_a_dit_is_no_language_model(golden: Path) -> None:
    with pytest.raises(ConfigError, match="must hold a Kelix language model"):
        load_parts(golden / "e2e_dit" / "dit", None, None, "cpu", "auto", {})


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="neither an existing path nor a hub id"):
        load_parts(tmp_path / "nothing", None, None, "cpu", "auto", {})


def test_half_precision_engines_run(golden: Path) -> None:
    parts = load_parts(golden / "llm" / "tiny_a", None, None, "cpu", "bfloat16", {"num_pages": 4})
    assert parts.runner.kv.k.dtype == torch.bfloat16
    assert parts.runner.kv.num_pages == 4
    assert next(parts.runner.model.parameters()).dtype == torch.bfloat16
