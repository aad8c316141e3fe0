"""Shared fixtures: where the golden data lies, and a fixed number of threads."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of the golden checkpoints and outputs (float32, CPU, made by the reference)."""
    return Path(__file__).parent / "golden"
