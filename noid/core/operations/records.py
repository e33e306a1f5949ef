"""Records as JSON and back, by the types they declare: what is kept with an operation and read by a later agent."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Return *value*, a record or anything of records, as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def from_json(record: type[T], fields: Mapping[str, Any]) -> T:
    """Return the *record* that `to_json` has written. Fields it does not know are another version's, and ignored.

    Raises:
        KeyError, TypeError, ValueError: it was written by something else.
    """
    kind: Any = record  # that a class can be a key is more than its type says
    hints = _hints(kind)
    return record(**{name: _decoded(hints[name], value) for name, value in fields.items() if name in hints})


@functools.cache
def _hints(record: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _decoded(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _decoded(next(each for each in arguments if each is not type(None)), value)
    if origin is tuple:
        return tuple(_decoded(arguments[0], item) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value)
    if hint is datetime:
        return datetime.fromisoformat(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum | Path):
        return hint(value)
    return value
