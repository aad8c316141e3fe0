"""Shared fixtures: where the golden data lies, a fixed number of threads, seeded random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings

# Nothing here imports the package before a test needs it: the harness of tests/simt puts operators
# of its own in the place of those that kelix_rt.ops loads.
if TYPE_CHECKING:
    from kelix_rt import Engine
    from tests.queues import LateQueue, Load

# The same examples in every run, and no deadline that a busy machine would miss.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of the golden checkpoints and outputs (float32, CPU, made by the reference)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def _plain_arithmetic() -> None:
    """The models of the tests are too small to gain from a second thread; float32 is float32."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random numbers do not depend on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads engines that overlap as on a GPU, over a device that does nothing before its time."""
    from kelix_rt import Engine
    from tests.queues import LateQueue, as_on_a_gpu

    def loaded(path: Path | str, **options: Any) -> tuple[Engine, LateQueue]:
        queue = LateQueue()
        with monkeypatch.context() as patch:
            as_on_a_gpu(patch, queue)
            return Engine.from_pretrained(path, device="cpu", **options), queue

    return loaded
