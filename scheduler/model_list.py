"""list.txt → sources."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from qbatch.core.domain import SourceRef
from qbatch.core.errors import UnsafeSource, UsageError
from qbatch.core.roots import check_place
from qbatch.core.sources import parse_source

_SHOWN_PROBLEMS = 5
# Of a path that the kernel takes.
_LONGEST = 4095


def read_model_list(lines: Iterable[str], *, check_folders: bool, roots: Sequence[Path] | None) -> list[SourceRef]:
    """One model a line: a hub id or a folder, ``@revision`` after an id; blank lines and ``#`` comments are skipped.

    A model named twice is taken once. A folder must lie in one of ``roots`` (None: anywhere); with ``check_folders``
    (where the workers see this file system) it must exist and hold a config.json. Raises UsageError naming every line
    that cannot be used, and for an empty list.
    """
    sources: dict[tuple[str, str | None], SourceRef] = {}
    problems: list[str] = []
    for number, text in _entries(lines):
        try:
            source = _parse(text)
            if source.is_folder:
                _check_place(source, roots)
            if check_folders and source.is_folder:
                _check_folder(source)
        except UsageError as error:
            problems.append(f"line {number}: {error}")
            continue
        except OSError as error:
            problems.append(f"line {number}: {source.name}: {error.strerror}")
            continue
        # Links to one folder lead to one model.
        place = os.path.realpath(source.location) if source.is_folder else source.location
        sources.setdefault((place, source.revision), source)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        raise UsageError("; ".join(problems[:_SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else ""))
    if not sources:
        raise UsageError("the list names no model")
    return list(sources.values())


def _entries(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        # Some editors begin a file with a byte order mark.
        text = line.removeprefix("\ufeff").strip()
        # A path may hold a '#': only one after a blank begins a comment.
        if text and not text.startswith("#"):
            yield number, text.split(" #", 1)[0].split("\t#", 1)[0].strip()


def _parse(text: str) -> SourceRef:
    if len(text) > _LONGEST:
        raise UsageError(f"a model's place has {_LONGEST} characters at most, and this one has {len(text)}")
    return parse_source(text)


def _check_place(source: SourceRef, roots: Sequence[Path] | None) -> None:
    try:
        check_place(Path(source.location), roots)
    except UnsafeSource as error:
        raise UsageError(f"{source.name}: {error}") from error


def _check_folder(source: SourceRef) -> None:
    folder = Path(source.location)
    if not folder.is_dir():
        raise UsageError(f"no such folder: {source.name}")
    if not (folder / "config.json").is_file():
        raise UsageError(f"{source.name} has no config.json")
