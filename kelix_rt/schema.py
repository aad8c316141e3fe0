"""Frozen dataclasses read from JSON objects with checks; the base of every model config."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar

from kelix_rt.errors import ConfigError

T = TypeVar("T", bound="JsonConfig")


class JsonConfig:
    """Base of a dataclass read from a JSON object; errors name the field by its dotted path."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def from_json(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
        """Reads `data`; missing fields take their defaults, `__class__` is ignored.

        `where` is the path of `data` in its file, used in errors. Raises ConfigError for unknown
        or missing fields, wrong types, and values that the config rejects.
        """
        label = where or cls.__name__
        if not isinstance(data, Mapping):
            raise ConfigError(f"{label} must be a JSON object, got {data!r}")
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(set(data) - set(known) - {"__class__"})
        if unknown:
            raise ConfigError(f"{label} has unknown fields: {', '.join(unknown)}")
        prefix = f"{where}." if where else ""
        for name, field in known.items():
            if name not in data and field.default is MISSING and field.default_factory is MISSING:
                raise ConfigError(f"{prefix}{name} is required and is missing")
        hints = typing.get_type_hints(cls)
        values = {
            name: _convert(value, hints[name], prefix + name)
            for name, value in data.items()
            if name in known
        }
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{prefix}{error}") from None

    def require(self, condition: bool, field: str, rule: str) -> None:
        """Raises ConfigError `field must rule, got value` unless `condition` holds."""
        if condition:
            return
        value: Any = self
        for name in field.split("."):
            value = getattr(value, name)
        raise ConfigError(f"{field} must {rule}, got {value!r}")

    def require_positive(self, names: str) -> None:
        """Requires each of these numeric fields (names between spaces) to be above zero."""
        for name in names.split():
            self.require(getattr(self, name) > 0, name, "be positive")


def _convert(value: Any, hint: Any, label: str) -> Any:
    if is_dataclass(hint):
        return typing.cast(type[JsonConfig], hint).from_json(value, label)
    if not _matches(value, hint):
        raise ConfigError(f"{label} must be of type {_describe(hint)}, got {value!r}")
    return tuple(value) if isinstance(value, list) else value


def _matches(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, list | tuple)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
