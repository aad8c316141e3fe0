"""Shared by all benchmarks: two threads, the mid-size checkpoint, one results table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints import write_language_model

THREADS = 2


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def mid_size_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Kelix-LLM of about 390 MB in float32."""
    return write_language_model(tmp_path_factory.mktemp("checkpoints") / "mid_size")
