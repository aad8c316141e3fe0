"""The public names of the package."""

from __future__ import annotations

import pytest

import kelix_rt


@pytest.mark.parametrize("name", kelix_rt.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(kelix_rt, name) is not None


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Motor'"):
        _ = kelix_rt.Motor
