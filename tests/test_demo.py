"""The demo runs and repeats itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kelix_rt import demo

IMAGES = ("codes.png", "drawing.png", "reconstruction.png")


def test_the_demo_writes_the_same_images_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        demo.main(["--out", str(tmp_path / name), "--device", "cpu"])
    out = capsys.readouterr().out
    assert all(f"Q: {question}" in out for question in demo.QUESTIONS)
    for name in IMAGES:
        assert str(tmp_path / "first" / name) in out
        first, second = (
            np.asarray(Image.open(tmp_path / run / name)) for run in ("first", "second")
        )
        assert np.array_equal(first, second)
        assert first.std() > 0
    for stage in ("load the models", "picture -> codes", "prompt -> codes -> image"):
        assert stage in out


def test_the_picture_of_codes_has_a_stripe_per_code() -> None:
    codes = np.array([[0, 31], [31, 0], [0, 0], [31, 31]])
    picture = np.asarray(demo.code_picture(codes, rows=2, columns=2, books=32))
    assert picture.shape == (24, 24, 3)
    colours = picture[::12, ::6].reshape(-1, 3)  # blocks 0 1 | 2 3, two stripes each
    low, high = colours[0], colours[1]
    assert np.abs(low.astype(int) - high.astype(int)).max() > 100
    expected = np.where(codes.reshape(-1, 1) == 0, low, high)
    assert np.array_equal(colours, expected)
