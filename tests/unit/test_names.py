"""A name means one thing: of files, and of public classes."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import qbatch

PACKAGE = Path(qbatch.__file__).parent
ROOT = Path(__file__).parents[2]
_OF_EVERY_PACKAGE = {"__init__.py", "__main__.py", "conftest.py"}


def files() -> Iterator[Path]:
    for path in PACKAGE.iterdir():
        yield from path.rglob("*.py") if path.is_dir() else [path]
    for name in ("tests", "benchmarks", "examples", "docs"):
        yield from (ROOT / name).rglob("*.py")


def repeated(names: Iterator[tuple[str, Path]]) -> dict[str, list[str]]:
    places: defaultdict[str, list[str]] = defaultdict(list)
    for name, path in names:
        places[name].append(str(path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)))
    return {name: where for name, where in places.items() if len(where) > 1}


def classes() -> Iterator[tuple[str, Path]]:
    for path in files():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, path


def test_no_two_files_have_one_name() -> None:
    assert repeated((path.name, path) for path in files() if path.name not in _OF_EVERY_PACKAGE) == {}


def test_no_two_public_classes_have_one_name() -> None:
    assert repeated(classes()) == {}
