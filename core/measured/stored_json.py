"""Dataclasses that are stored as JSON: read without ever failing, and written without losing anything.

What is stored may come from an older version, which did not know a field, or from a newer one, which knows more. Absent
is the field's default (None, or an empty part), as is a value of another type than the field's; what is not known is
kept, and is there again when the part is written.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

# What a reader gives for a value of the wrong type; None may be right.
_WRONG = object()
_WHERE_KNOWN = "written where it is known"
_BESIDE = "written where this field is known"
LEFT_OUT: Mapping[str, Any] = types.MappingProxyType({_WHERE_KNOWN: True})
"""Metadata of a field that is not written where it is not known, in place of null."""

Reader = Callable[[Any], Any]


def written_beside(name: str) -> Mapping[str, Any]:
    """Metadata of a field that is written, null where it is not known, wherever field ``name`` is known."""
    return {_BESIDE: name}


def left_out() -> Any:
    return field(default=None, metadata=LEFT_OUT)


def beside(name: str) -> Any:
    return field(default=None, metadata=written_beside(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A part of what is stored. ``read_from`` is the mapping that it was read from; None where it was made here, also
    out of another one (``dataclasses.replace``)."""

    read_from: Mapping[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Raises TypeError where a field without a default is absent or of the wrong type."""
        if not isinstance(value, Mapping):
            return cls()
        read = {name: reader(value[name]) for name, reader in _layout(cls).readers.items() if name in value}
        part = cls(**{name: item for name, item in read.items() if item is not _WRONG})
        object.__setattr__(part, "read_from", value)
        return part

    def to_json(self) -> dict[str, Any]:
        """What was read is as it was. Of what was made here neither infinity nor NaN: JSON has none."""
        if self.read_from is not None:
            return dict(self.read_from)
        return {name: as_json(getattr(self, name)) for name in self.written_order() if self._is_written(name)}

    @classmethod
    def written_order(cls) -> tuple[str, ...]:
        """The names of the fields, in the order in which they are written."""
        return field_names(cls)

    @property
    def stored(self) -> Mapping[str, Any]:
        """All that it was read from, known and unknown; empty where it was made here."""
        return self.read_from or {}

    @property
    def is_known(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.stored) or any(_is_known(getattr(self, name)) for name in field_names(type(self)))

    def unknown(self) -> dict[str, Any]:
        """What was stored under names that are no field's."""
        return {name: value for name, value in self.stored.items() if name not in _layout(type(self)).readers}

    def _is_written(self, name: str) -> bool:
        rule = _layout(type(self)).rules[name]
        if _BESIDE in rule:
            return _is_known(getattr(self, rule[_BESIDE]))
        return _WHERE_KNOWN not in rule or _is_known(getattr(self, name))


def as_json(value: Any) -> Any:
    """``value`` of a field as JSON has it."""
    if isinstance(value, Stored):
        return value.to_json() if value.is_known or value.read_from is not None else None
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value


def field_names(cls: type[Stored]) -> tuple[str, ...]:
    """The names of what ``cls`` stores."""
    return tuple(_layout(cls).readers)


def _is_known(value: Any) -> bool:
    return value.is_known if isinstance(value, Stored) else value is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Of a class, by field: what reads it, and when it is written."""

    readers: Mapping[str, Reader]
    rules: Mapping[str, Mapping[str, Any]]


def _layout(cls: Any) -> _Layout:
    return _layout_once(cls)


@functools.cache
def _layout_once(cls: type[Stored]) -> _Layout:
    hints, stored = get_type_hints(cls), [one for one in fields(cls) if one.init]
    return _Layout(
        readers={one.name: _reader(hints[one.name]) for one in stored},
        rules={one.name: one.metadata for one in stored},
    )


def _reader(hint: Any) -> Reader:
    """What makes of a JSON value one of type ``hint``, or _WRONG."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (_reader(one) for one in arguments if one is not type(None))
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        return functools.partial(_tuple, _reader(arguments[0]))
    if origin is not None and issubclass(origin, Mapping):
        return functools.partial(_mapping, _reader(arguments[1]))
    return _plain_reader(hint)


def _plain_reader(hint: Any) -> Reader:
    if hint is Any:
        return lambda value: value
    if issubclass(hint, Stored):
        return lambda value: hint.from_json(value) if isinstance(value, Mapping) else _WRONG
    if issubclass(hint, Enum):
        members = {member.value: member for member in hint}
        return lambda value: members.get(value, _WRONG) if isinstance(value, str) else _WRONG
    if hint is float:
        return lambda value: value if isinstance(value, int | float) and not isinstance(value, bool) else _WRONG
    if hint is int:
        return _integer
    return lambda value: value if isinstance(value, hint) else _WRONG


def _integer(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else _WRONG


def _tuple(reader: Reader, value: Any) -> Any:
    """Whole or not at all: of a part nothing true could be said."""
    if not isinstance(value, list | tuple):
        return _WRONG
    items = tuple(reader(item) for item in value)
    return _WRONG if _WRONG in items else items


def _mapping(reader: Reader, value: Any) -> Any:
    """Without the entries of the wrong type."""
    if not isinstance(value, Mapping):
        return _WRONG
    read = {key: reader(item) for key, item in value.items()}
    return {key: item for key, item in read.items() if item is not _WRONG}
