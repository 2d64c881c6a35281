"""Read a list of models."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from qbatch.core.domain import SourceRef
from qbatch.core.errors import UnsafeSource, UsageError
from qbatch.core.folder_hint import where_the_model_is
from qbatch.core.roots import refuse_outside_roots
from qbatch.core.sources import parse_source

_SHOWN_PROBLEMS = 5
# A path may contain a '#', so only one that follows white space starts a comment.
_COMMENT = re.compile(r"(?:^|(?<=\s))#")
_ESCAPED = re.compile(r"(?:^|(?<=\s))\\#")
# The longest path that Linux accepts.
_LONGEST = 4095


def read_model_list(
    lines: Iterable[str], *, named: Iterable[str] = (), check_folders: bool, roots: Sequence[Path] | None
) -> list[SourceRef]:
    """Parse ``named`` models and those of a list, one per line: a hub id, optionally with ``@revision``, or a folder.

    In a list ``#`` starts a comment at the beginning of a line and after white space; there, ``\\#`` is a ``#`` of the
    name. Duplicates are dropped. A folder must be in one of ``roots`` (None: anywhere).
    With ``check_folders``, for workers that see this file system, it must exist and contain a config.json. Raises
    UsageError if there is no model, or for unusable ones, of which it names the first few.
    """
    sources: dict[tuple[str, str | None], SourceRef] = {}
    problems: list[str] = []
    for place, text, line in chain((("", word.strip(), word) for word in named), _entries(lines)):
        try:
            source = _parse(text)
            if source.is_folder:
                _check_place(source, roots)
            if check_folders and source.is_folder:
                _check_folder(source, line)
        except UsageError as error:
            problems.append(f"{place}{error}")
            continue
        except OSError as error:
            problems.append(f"{place}{source.name}: {error.strerror}")
            continue
        # Links to the same folder are the same model.
        location = os.path.realpath(source.location) if source.is_folder else source.location
        sources.setdefault((location, source.revision), source)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        raise UsageError("; ".join(problems[:_SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else ""))
    if not sources:
        raise UsageError("no models: name some, or list them in a file for --models")
    return list(sources.values())


def _entries(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """What a message says before a line that names a model, its model, and its text."""
    for number, line in enumerate(lines, start=1):
        # Some editors start a file with a byte order mark.
        text = _COMMENT.split(line.removeprefix("\ufeff"), maxsplit=1)[0].strip()
        if text:
            yield f"line {number}: ", _ESCAPED.sub("#", text), line.strip()


def _parse(text: str) -> SourceRef:
    if len(text) > _LONGEST:
        raise UsageError(f"the name of a model may have at most {_LONGEST} characters; this one has {len(text)}")
    return parse_source(text)


def _check_place(source: SourceRef, roots: Sequence[Path] | None) -> None:
    try:
        refuse_outside_roots(Path(source.location), roots)
    except UnsafeSource as error:
        raise UsageError(f"{source.name}: {error}") from error


def _check_folder(source: SourceRef, line: str) -> None:
    folder = Path(source.location)
    if not folder.is_dir():
        is_cut = line != source.name and Path(line).expanduser().is_dir()
        raise UsageError(f"no such folder: {source.name}" + (" (write \\# for a # of its name)" if is_cut else ""))
    if not (folder / "config.json").is_file():
        raise UsageError(f"{source.name} has no config.json{where_the_model_is(folder)}")
