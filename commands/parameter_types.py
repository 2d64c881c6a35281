"""The types of the command line's parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from qbatch.commands.completion import complete_list
from qbatch.core.byte_units import GIB, KIB, MIB
from qbatch.core.control_characters import escape_controls
from qbatch.core.domain import LATEST, find_id
from qbatch.core.errors import UsageError
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.methods.registry import Method, find_method
from qbatch.core.recovery import RecoveryKind
from qbatch.core.search.bound import AUTO

Value = TypeVar("Value")


class Duration(click.ParamType[float]):
    """A duration such as 90, 90s, 15m, 2h or 1d, as a number of seconds. At most ten years."""

    name = "duration"
    _WHAT, _EXAMPLES = "duration", "90s, 15m, 2h or 1d"
    _MOST = 3650 * 86400.0
    _UNITS: Mapping[str, float] = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value).strip())
        seconds = float(match[1]) * self._UNITS.get(match[2], 0.0) if match is not None else 0.0
        if not 0 < seconds <= self._MOST:
            said = f"{_shorten(value)} is not a valid {self._WHAT} (use {self._EXAMPLES}; at most ten years)"
            self.fail(said, param, ctx)
        return seconds


class Age(Duration):
    """A duration with its unit: someone who means days and types ``30`` must not lose what is half a minute old."""

    name = "age"
    _WHAT = "age"
    _UNITS: Mapping[str, float] = {unit: seconds for unit, seconds in Duration._UNITS.items() if unit}


class Since(Age):
    """A duration, or a local date or time such as 2026-11-28 or 2026-11-28T09:30: how many seconds ago that was."""

    name = "since"
    _WHAT = "age or date"
    _EXAMPLES = f"{Age._EXAMPLES}, or a date such as 2026-11-28"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            moment = datetime.fromisoformat(str(value).strip())
        except ValueError:
            return super().convert(value, param, ctx)
        seconds = (datetime.now(UTC) - moment.astimezone(UTC)).total_seconds()
        if seconds <= 0:
            self.fail(f"{_shorten(value)} is in the future", param, ctx)
        return seconds


class TimeLimit(Duration):
    """A duration in seconds, or ``none``, which is infinity."""

    name = "time limit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return math.inf if value == "none" else super().convert(value, param, ctx)


class Name(click.ParamType[str]):
    """A name for a batch that fits its database column and can stand for it on the command line."""

    name = "name"
    _LONGEST = 200

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if len(text) > self._LONGEST:
            self.fail(f"a name may have at most {self._LONGEST} characters; this one has {len(text)}", param, ctx)
        if not text or text != text.strip():
            self.fail("a name must not be empty, and must not begin or end with a space", param, ctx)
        if escape_controls(text) != text:
            self.fail(f"a name must have no control characters or line breaks: {_shorten(text)}", param, ctx)
        if text == LATEST or find_id(text) is not None:
            self.fail(f"{text} already means a batch or a job: use another name", param, ctx)
        return text


class Bits(click.ParamType[tuple[int, ...]]):
    """A comma-separated list of bit widths."""

    name = "bits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(re.fullmatch(r"[0-9]{1,3}", part) for part in parts):
            self.fail(f"{_shorten(value)} is not a list of bit widths (use 4,8)", param, ctx)
        return tuple(map(int, parts))


class Schemes(click.ParamType[tuple[str, ...]]):
    """A comma list of methods by name or alias, and of ``auto``: each a ``Method``, or ``AUTO``."""

    name = "schemes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = [part.strip() for part in str(value).split(",")]
        try:
            return tuple(AUTO if name == AUTO else find_method(name) for name in names)
        except UsageError as error:
            self.fail(f"{error} and {AUTO}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        return complete_list([*(method.value for method in Method), AUTO], incomplete)


class Recoveries(click.ParamType[tuple[RecoveryKind, ...]]):
    """A comma list of kinds of adapters."""

    name = "recoveries"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[RecoveryKind, ...]:
        if isinstance(value, tuple):
            return value
        names = [part.strip() for part in str(value).split(",")]
        if unknown := [name for name in names if name not in [*RecoveryKind]]:
            self.fail(f"{_shorten(unknown[0])} is not a kind of adapter (use {' or '.join(RecoveryKind)})", param, ctx)
        return tuple(map(RecoveryKind, names))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        return complete_list([kind.value for kind in RecoveryKind], incomplete)


class ColumnNames(click.ParamType[tuple[str, ...]]):
    """A comma list of columns of results."""

    name = "columns"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        from qbatch.views.result_columns import chosen_columns

        if isinstance(value, tuple):
            return value
        names = tuple(part.strip() for part in str(value).split(","))
        try:
            chosen_columns(names)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return names


class Parts(click.ParamType[frozenset[MeasuredPart]]):
    """A comma list of the parts of a measurement."""

    name = "parts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[MeasuredPart]:
        if isinstance(value, frozenset):
            return value
        known = {part.value: part for part in MeasuredPart}
        names = [name.strip() for name in str(value).split(",")]
        for name in names:
            if name not in known:
                self.fail(f"{_shorten(name)} cannot be measured (use {', '.join(known)})", param, ctx)
        return frozenset({MeasuredPart.SIZE, *(known[name] for name in names)})

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        return complete_list([part.value for part in MeasuredPart], incomplete)


class Amount(click.FloatRange):
    """A finite number within a range. NaN is refused here because it passes every comparison with a bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{_shorten(value)} is not a finite number", param, ctx)
        return number


class Patterns(click.ParamType[tuple[str, ...]]):
    """A comma-separated list of names or regular expressions. A comma within brackets belongs to the expression."""

    name = "patterns"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        patterns = tuple(part.strip() for part in _split_outside_brackets(str(value)) if part.strip())
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                self.fail(f"{pattern!r} is not a valid regular expression: {error}", param, ctx)
        return patterns


def _split_outside_brackets(text: str) -> list[str]:
    parts: list[str] = []
    for piece in text.split(","):
        if parts and not _is_balanced(parts[-1]):
            parts[-1] += f",{piece}"
        else:
            parts.append(piece)
    return parts


def _is_balanced(pattern: str) -> bool:
    plain = re.sub(r"\\.", "", pattern)
    return all(plain.count(opening) == plain.count(closing) for opening, closing in ("()", "[]", "{}"))


class Counts(click.ParamType[tuple[int, ...]]):
    """A comma-separated list of whole numbers, each at least ``least``."""

    name = "counts"

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        # int() alone would also accept 1_000 and the digits of other scripts.
        if not all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) >= self._least for part in parts):
            self.fail(f"{value!r} is not a comma-separated list of whole numbers of at least {self._least}", param, ctx)
        return tuple(int(part) for part in parts)


class ByteSize(click.ParamType[int]):
    """500MB, 5GB (powers of ten, as transformers reads them), 2GiB: bytes."""

    name = "size"
    _MOST = 2**63 - 1
    _UNITS: Mapping[str, int] = {
        "": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": KIB, "MIB": MIB, "GIB": GIB
    }  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", str(value).strip().upper())
        size = float(match[1]) * self._UNITS[match[2] or ""] if match is not None else 0.0
        if not 1 <= size <= self._MOST:
            self.fail(f"{_shorten(value)} is not a valid size (use 500MB, 5GB or 2GiB)", param, ctx)
        return int(size)


def joined(lists: Iterable[Iterable[Value]]) -> tuple[Value, ...]:
    """What an option that takes lists was given, however often it was repeated."""
    return tuple(value for listed in lists for value in listed)


def _shorten(value: Any) -> str:
    """The repr of what was typed, shortened so that the error message fits on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
