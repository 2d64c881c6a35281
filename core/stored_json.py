"""Dataclasses that are stored as JSON. Reading never fails for optional fields, and writing loses nothing.

Stored JSON may be from an older version, without some fields, or from a newer one, with more. A field that is absent or
has the wrong type gets its default (None, or an empty part). Unknown entries are kept, and are written back.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

# What a reader returns for a value of the wrong type. None may be a valid value.
_WRONG = object()
_ONLY_IF_KNOWN = "written only if it is known"
_IF_OTHER_KNOWN = "written if this other field is known"
OMITTED_IF_UNKNOWN: Mapping[str, Any] = types.MappingProxyType({_ONLY_IF_KNOWN: True})
"""Metadata of a field that is omitted if it is not known, instead of written as null."""

Reader = Callable[[Any], Any]


def when_known(name: str) -> Mapping[str, Any]:
    """Metadata of a field that is written if the field ``name`` is known, as null if it is not known itself."""
    return {_IF_OTHER_KNOWN: name}


def omitted_if_unknown() -> Any:
    return field(default=None, metadata=OMITTED_IF_UNKNOWN)


def omitted_unless(name: str) -> Any:
    return field(default=None, metadata=when_known(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A part of the stored JSON. ``read_from`` is the mapping that it was read from; None if it was created in this
    process, including copies with ``dataclasses.replace``."""

    read_from: Mapping[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read a part from JSON. Raises TypeError if a field without a default is absent or has the wrong type."""
        if not isinstance(value, Mapping):
            return cls()
        read = {name: reader(value[name]) for name, reader in _layout(cls).readers.items() if name in value}
        part = cls(**{name: item for name, item in read.items() if item is not _WRONG})
        object.__setattr__(part, "read_from", value)
        return part

    def to_json(self) -> dict[str, Any]:
        """The part as JSON. A part that was read is returned unchanged. In others, NaN and infinity become null, since
        JSON cannot express them."""
        if self.read_from is not None:
            return dict(self.read_from)
        return {name: as_json(getattr(self, name)) for name in self.written_order() if self._is_written(name)}

    @classmethod
    def written_order(cls) -> tuple[str, ...]:
        """The names of the fields, in the order in which they are written."""
        return field_names(cls)

    @property
    def stored(self) -> Mapping[str, Any]:
        """All entries that the part was read from, known and unknown; empty if it was created in this process."""
        return self.read_from or {}

    @property
    def is_known(self) -> bool:
        """Whether any field or entry is known."""
        return bool(self.stored) or any(_is_known(getattr(self, name)) for name in field_names(type(self)))

    def unknown(self) -> dict[str, Any]:
        """The stored entries whose names are not fields."""
        return {name: value for name, value in self.stored.items() if name not in _layout(type(self)).readers}

    def _is_written(self, name: str) -> bool:
        rule = _layout(type(self)).rules[name]
        if _IF_OTHER_KNOWN in rule:
            return _is_known(getattr(self, rule[_IF_OTHER_KNOWN]))
        return _ONLY_IF_KNOWN not in rule or _is_known(getattr(self, name))


def as_json(value: Any) -> Any:
    """Convert the ``value`` of a field to JSON."""
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
    """The names of the fields that ``cls`` stores."""
    return tuple(_layout(cls).readers)


def _is_known(value: Any) -> bool:
    return value.is_known if isinstance(value, Stored) else value is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """The reader of each field of a class, and the metadata that says when it is written."""

    readers: Mapping[str, Reader]
    rules: Mapping[str, Mapping[str, Any]]


def _layout(cls: Any) -> _Layout:
    return _layout_once(cls)


@functools.cache
def _layout_once(cls: type[Stored]) -> _Layout:
    hints, stored = get_type_hints(cls), [each for each in fields(cls) if each.init]
    return _Layout(
        readers={each.name: _reader(hints[each.name]) for each in stored},
        rules={each.name: each.metadata for each in stored},
    )


def _reader(hint: Any) -> Reader:
    """A function that converts a JSON value to the type ``hint``, and returns _WRONG if that is impossible."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (_reader(argument) for argument in arguments if argument is not type(None))
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
    """Convert a list. If any item is wrong, the whole list is, because a partial list would be misleading."""
    if not isinstance(value, list | tuple):
        return _WRONG
    items = tuple(reader(item) for item in value)
    return _WRONG if _WRONG in items else items


def _mapping(reader: Reader, value: Any) -> Any:
    """Convert a mapping, and drop entries of the wrong type."""
    if not isinstance(value, Mapping):
        return _WRONG
    read = {key: reader(item) for key, item in value.items()}
    return {key: item for key, item in read.items() if item is not _WRONG}
