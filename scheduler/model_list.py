"""Read a list of models."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from qbatch.core.domain import SourceRef
from qbatch.core.errors import UnsafeSource, UsageError
from qbatch.core.folder_hint import not_a_folder, where_the_model_is
from qbatch.core.roots import refuse_outside_roots
from qbatch.core.sources import looks_like_path, parse_source
from qbatch.scheduler.likely_folders import LikelyFolders

# A path may contain a '#', so only one that follows white space starts a comment.
_COMMENT = re.compile(r"(?:^|(?<=\s))#")
_ESCAPED = re.compile(r"(?:^|(?<=\s))\\#")
# The longest path that Linux accepts.
_LONGEST = 4095

TakeFolder = Callable[[str, str], bool]
"""Asked with the name of a model of the hub and that of a folder that is spelt much like it: whether that is meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListProblem:
    """Why an entry of a list cannot be used. ``line`` is 0 for one that was not in a file."""

    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}" if self.line else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelList:
    """The models of a list, each once, with the numbers of their lines. ``problems`` are the entries that are none."""

    sources: tuple[SourceRef, ...]
    lines: Mapping[SourceRef, int]
    problems: tuple[ListProblem, ...]


def read_models(
    lines: Iterable[str],
    *,
    named: Iterable[str] = (),
    check_folders: bool,
    roots: Sequence[Path] | None,
    take_folder: TakeFolder | None = None,
) -> ModelList:
    """Parse ``named`` models and those of a list, one per line: a hub id, optionally with ``@revision``, or a folder.

    In a list ``#`` starts a comment at the beginning of a line and after white space; there, ``\\#`` is a ``#`` of the
    name. Duplicates are dropped. A folder must be in one of ``roots`` (None: anywhere).
    With ``check_folders``, for workers that see this file system, it must exist and contain a config.json. A hub id
    that is spelt much like a folder here is a problem, unless ``take_folder`` decides. Raises UsageError if there is
    neither a model nor a problem.
    """
    sources: dict[tuple[str, str | None], SourceRef] = {}
    at: dict[SourceRef, int] = {}
    problems: list[ListProblem] = []
    likely = LikelyFolders()
    for number, text, line in chain(((0, word.strip(), word) for word in named), _entries(lines)):
        try:
            source = _meant(_parse(text), likely, take_folder)
            if source.is_folder:
                _check_place(source, roots)
            if check_folders and source.is_folder:
                _check_folder(source, line, likely)
        except UsageError as error:
            problems.append(ListProblem(line=number, text=str(error)))
            continue
        except OSError as error:
            problems.append(ListProblem(line=number, text=f"{source.name}: {error.strerror}"))
            continue
        # Links to the same folder are the same model.
        location = os.path.realpath(source.location) if source.is_folder else source.location
        kept = sources.setdefault((location, source.revision), source)
        at.setdefault(kept, number)
    if not sources and not problems:
        raise UsageError("no models: name some, or list them in a file for --models")
    return ModelList(sources=tuple(sources.values()), lines=at, problems=tuple(problems))


def _meant(source: SourceRef, likely: LikelyFolders, take_folder: TakeFolder | None) -> SourceRef:
    """``source``, or the folder that was meant. Whoever writes a revision means the hub."""
    folder = None if source.is_folder or source.revision is not None else likely.near(source.name)
    if folder is None:
        return source
    if take_folder is None:
        raise UsageError(
            f"there is no folder {source.name}; did you mean {folder}? For the model {source.name} of the hub, write "
            f"{source.name}@main"
        )
    return parse_source(folder) if take_folder(source.name, folder) else source


def _entries(lines: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    """The number of each line that names a model, its model, and its text."""
    for number, line in enumerate(lines, start=1):
        # Some editors start a file with a byte order mark.
        text = _COMMENT.split(line.removeprefix("\ufeff"), maxsplit=1)[0].strip()
        if text:
            yield number, _ESCAPED.sub("#", text), line.strip()


def _parse(text: str) -> SourceRef:
    if len(text) > _LONGEST:
        raise UsageError(f"the name of a model may have at most {_LONGEST} characters; this one has {len(text)}")
    # It may be a path that workers elsewhere see differently, so it is judged later.
    if not looks_like_path(text) and _is_file(text):
        raise UsageError(not_a_folder(text))
    return parse_source(text)


def _is_file(text: str) -> bool:
    try:
        return "\0" not in text and Path(text).is_file()
    except OSError:  # a folder above is not accessible, or the name is too long: not a file that anybody meant
        return False


def _check_place(source: SourceRef, roots: Sequence[Path] | None) -> None:
    try:
        refuse_outside_roots(Path(source.location), roots)
    except UnsafeSource as error:
        raise UsageError(f"{source.name}: {error}") from error


def _check_folder(source: SourceRef, line: str, likely: LikelyFolders) -> None:
    folder = Path(source.location)
    if folder.is_file():
        raise UsageError(not_a_folder(source.name))
    if not folder.is_dir():
        is_cut = line != source.name and Path(line).expanduser().is_dir()
        meant = None if is_cut else likely.near(source.name)
        hint = " (write \\# for a # of its name)" if is_cut else f"; did you mean {meant}?" if meant else ""
        raise UsageError(f"no such folder: {source.name}{hint}")
    if not (folder / "config.json").is_file():
        raise UsageError(f"{source.name} has no config.json{where_the_model_is(folder)}")
