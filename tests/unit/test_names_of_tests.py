"""A test's name fits into ``-k`` and into a report's line, and the tests that a document cites are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_LONGEST = 70


def _names() -> dict[str, set[str]]:
    """By file: the test functions in it."""
    return {
        str(path.relative_to(_ROOT)): {
            node.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
        for path in sorted((_ROOT / "tests").rglob("test_*.py"))
    }


def test_every_name_can_be_typed() -> None:
    names = _names()
    assert len(names) > 50
    assert [name for found in names.values() for name in found if len(name) > _LONGEST] == []


def test_every_test_that_the_documents_cite_is_there() -> None:
    names = _names()
    missing = []
    for document in sorted((_ROOT / "docs").rglob("*.md")):
        file = ""
        for cited, function in re.findall(
            r"`(tests/\S+?\.py)?(?:::(test_\w+))?[`\[]", document.read_text(encoding="utf-8")
        ):
            file = cited or file
            if cited and cited not in names:
                missing.append(f"{document.name}: {cited}")
            if function and function not in names.get(file, set()):
                missing.append(f"{document.name}: {file}::{function}")
    assert missing == []
