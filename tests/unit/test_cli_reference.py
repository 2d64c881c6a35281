"""docs/cli.md is generated from the commands' help, and every command and option has help."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from qbatch.cli import SECTIONS, main
from qbatch.commands.parameter_types import Bits, ColumnNames, Counts, Parts, Patterns, Recoveries, Schemes
from qbatch.core.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"
GENERATOR: dict[str, Any] = runpy.run_path(str(DOCS / "generate_cli.py"))
# Nothing is given: a reader expects that.
NO_DEFAULT = (None, False, ())


def contexts() -> list[click.Context]:
    # With the settings, because a command keeps the help option that it was first asked for.
    return list(GENERATOR["contexts"](click.Context(main, info_name="qbatch", **main.context_settings)))


def options() -> Iterator[tuple[str, click.Context, click.Option]]:
    for context in contexts():
        for option in context.command.params:
            if isinstance(option, click.Option):
                yield f"{context.command_path} {option.opts[0]}", context, option


@pytest.mark.parametrize("columns", ["40", "100", "300"])
def test_the_page_is_up_to_date(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert GENERATOR["reference"]() == (DOCS / "cli.md").read_text(encoding="utf-8"), "run `make docs`"


def test_every_command_has_help() -> None:
    assert [context.command_path for context in contexts() if not context.command.help] == []


def test_help_lists_each_command_once_in_its_group() -> None:
    (whole, *_) = contexts()
    listed = [line.split()[0] for line in whole.get_help().splitlines() if line.startswith("  ") and line[2].isalpha()]
    commands = [name for section in SECTIONS.values() for name in section]
    assert [name for name in listed if name in commands] == commands
    assert sorted(commands) == sorted(main.commands)
    assert len(SECTIONS) == 4


def test_every_option_has_help() -> None:
    assert [name for name, _, option in options() if not option.help] == []


def test_every_option_shows_its_default() -> None:
    shown = {name: (option.get_help_record(context) or ("", ""))[1] for name, context, option in options()}
    silent = [name for name, _, option in options() if has_default(option) and "[default: " not in shown[name]]
    assert silent == []


def test_no_list_is_replaced_by_a_later_one() -> None:
    """Of an option that is given twice, click keeps the last value unless the option may be repeated."""
    lists = (Bits, Schemes, Recoveries, ColumnNames, Parts, Patterns, Counts)
    names = ("--model", "--device", "--batch", "--for", "--gpus", "--tasks", "--eval-text", "--quant-type")
    once = [
        name
        for name, _, option in options()
        if not option.multiple and (isinstance(option.type, lists) or option.opts[0] in names)
    ]
    # What a job is submitted for is one kind of device.
    assert [name for name in once if name.split()[-1] != "--device"] == []
    assert {name.split()[1] for name in once} <= {"submit", "plan", "run"}


def has_default(option: click.Option) -> bool:
    """Whether leaving the option out means something that its help must say: of a pair of flags, one always holds."""
    return bool(option.secondary_opts) or option.to_info_dict()["default"] not in NO_DEFAULT


def test_every_setting_is_listed() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    variables = {f"QBATCH_{field.name.upper()}" for field in fields(Settings)} - {"QBATCH_RUNTIME_DIR"}
    assert {name for name in variables | {"XDG_RUNTIME_DIR"} if f"`{name}`" not in page} == set()
