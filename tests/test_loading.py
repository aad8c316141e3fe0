"""How an engine's parts are chosen from paths and options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kelix_rt import Engine, EngineConfig
from kelix_rt.assets import BUNDLED
from kelix_rt.errors import ConfigError, WeightError
from kelix_rt.loading import find_drawing, load_parts


def test_drawing_is_found_where_it_may_lie(tmp_path: Path) -> None:
    assert find_drawing(tmp_path, None, None) is None
    assert find_drawing(None, None, None) is None
    (tmp_path / "dit").mkdir()
    assert find_drawing(tmp_path, None, None) is None  # as the release bundles it
    with pytest.raises(ConfigError, match="there is no vae="):
        find_drawing(None, tmp_path, None)
    pipeline = tmp_path / "pipeline"
    (pipeline / "vae").mkdir(parents=True)
    assert find_drawing(tmp_path, None, pipeline) == (tmp_path / "dit", pipeline / "vae")
    with pytest.raises(ConfigError, match=r"dit=.*pipeline: holds no config.json and no sub"):
        find_drawing(tmp_path, pipeline, pipeline)
    (pipeline / "config.json").touch()
    assert find_drawing(tmp_path, None, pipeline) == (tmp_path / "dit", pipeline)
    assert find_drawing(tmp_path, None, None, wanted=False) is None
    with pytest.raises(ConfigError, match="drawing=False leaves DiT and VAE out, but dit="):
        find_drawing(tmp_path, None, pipeline, wanted=False)


def test_an_engine_that_is_not_to_draw_leaves_the_dit_alone() -> None:
    for drawing in (True, False):
        engine = Engine.from_pretrained(BUNDLED, device="cpu", drawing=drawing)
        booked = Engine.plan(BUNDLED, EngineConfig(drawing=drawing), device="cpu").rows()
        assert (engine.runner.render is not None) == ("image DiT" in dict(booked)) == drawing
    with pytest.raises(ConfigError, match="drawing needs the image DiT"):
        engine.generate_image("draw a red circle.")


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
