"""The two builds of the harness, made once per test run."""

from __future__ import annotations

import shutil

import pytest

from tests.simt.build import Build, build


def require_compiler() -> None:
    for tool in ("cmake", "g++", "addr2line"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} not found: the harness is built with it")


@pytest.fixture(scope="session")
def simt() -> Build:
    """The plain build."""
    require_compiler()
    return build(sanitize=False)


@pytest.fixture(scope="session")
def sanitized() -> Build:
    """The build with the address and undefined-behaviour sanitizers."""
    require_compiler()
    return build(sanitize=True)
