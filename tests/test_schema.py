from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from kelix_rt.errors import ConfigError
from kelix_rt.schema import JsonConfig


@dataclass(frozen=True)
class Inner(JsonConfig):
    size: int = 4

    def __post_init__(self) -> None:
        self.require_positive("size")


@dataclass(frozen=True)
class Outer(JsonConfig):
    inner: Inner
    ratio: float = 0.5
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    names: tuple[str | None, ...] = ()


def test_defaults_and_values() -> None:
    read = Outer.from_json({"inner": {}, "ratio": 2, "names": ["x", None], "__class__": "Outer"})
    assert read == Outer(Inner(), ratio=2, names=("x", None))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": {}, "extra": 1}, "unknown fields: extra"),
        ({"inner": {"width": 1}}, "inner has unknown fields: width"),
        ({}, "inner is required"),
        ({"inner": {"size": 0}}, r"inner\.size must be positive, got 0"),
        ({"inner": {"size": 1.5}}, r"inner\.size must be of type int"),
        ({"inner": {"size": True}}, r"inner\.size must be of type int"),
        ({"inner": 3}, "inner must be a JSON object"),
        ({"inner": {}, "flag": 1}, "flag must be of type bool"),
        ({"inner": {}, "kind": "c"}, "kind must be of type Literal"),
        ({"inner": {}, "limit": "x"}, r"limit must be of type int \| None"),
    ],
)
def test_errors_name_the_field(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Outer.from_json(data)
