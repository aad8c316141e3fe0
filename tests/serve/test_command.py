"""`kelix serve`: what it starts, and what it says without its packages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from kelix_rt.cli import main


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return int(ended.value.code or 0)


def test_it_serves_what_the_model_has(
    golden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr("uvicorn.run", lambda app, **options: started.append(options))
    model, parts = golden / "llm" / "tiny_a", golden / "e2e_dit"
    drawing = ("--dit", parts / "dit", "--vae", parts / "vae")
    for options, told in (((), "no drawing"), (drawing, "chat and drawing")):
        assert run("serve", "-m", model, *options, "--port", 81, "--device", "cpu") == 0
        assert told in capsys.readouterr().err
    assert [each["port"] for each in started] == [81, 81]


def test_absent_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run("serve") == 2
    assert "pip install -e '.[serve]'" in " ".join(capsys.readouterr().err.split())
