"""The parameter types of the command line: what they accept and what they refuse."""

from __future__ import annotations

import math

import click
import pytest

from qbatch.commands.parameter_types import (
    Age,
    Amount,
    Bits,
    ByteSize,
    Duration,
    Name,
    Patterns,
    Schemes,
    Since,
    TimeLimit,
)


@pytest.mark.parametrize(
    ("typed", "patterns"),
    [
        ("down_proj", ["down_proj"]),
        (" down_proj, model.layers.0 ,", ["down_proj", "model.layers.0"]),
        (r"layers\.\d{1,2}\.mlp,lm_head", [r"layers\.\d{1,2}\.mlp", "lm_head"]),
        ("(q,[k,v])_proj,[a,b],fc", ["(q,[k,v])_proj", "[a,b]", "fc"]),
    ],
)
def test_a_comma_within_brackets_is_the_pattern_s_own(typed: str, patterns: list[str]) -> None:
    assert Patterns().convert(typed, None, None) == tuple(patterns)


@pytest.mark.parametrize("typed", ["lm_head, [fc", "(a,b", "*"])
def test_an_invalid_pattern_is_refused(typed: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a valid regular expression"):
        Patterns().convert(typed, None, None)


def test_who_misspells_a_scheme_is_told_of_searches_too() -> None:
    with pytest.raises(click.BadParameter, match=r"'nf5' is not a known scheme; .*, none and auto$"):
        Schemes().convert("nf5", None, None)


def test_nan_is_refused_by_every_bounded_option() -> None:
    assert Amount(min=0).convert("1.02", None, None) == 1.02
    for typed in ("nan", "-1", "much", "inf", "1e400"):
        with pytest.raises(click.BadParameter):
            Amount(min=0).convert(typed, None, None)


@pytest.mark.parametrize(
    "kind", [Amount(min=0), Bits(), Duration(), Name(), ByteSize(), TimeLimit()], ids=lambda kind: kind.name
)
@pytest.mark.parametrize("typed", ["9" * 400, "9" * 5000, "x" * 100_000], ids=["400", "5000", "100000"])
def test_a_very_long_value_is_shortened_in_the_message(kind: click.ParamType[object], typed: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        kind.convert(typed, None, None)
    assert len(caught.value.message) < 200 or isinstance(kind, Amount), "click's own quotes what was typed"


@pytest.mark.parametrize(
    ("typed", "limit_s"), [("90s", 90.0), ("1d", 86400.0), ("3650d", 3650 * 86400.0), ("none", math.inf)]
)
def test_a_time_limit_may_be_none(typed: str, limit_s: float) -> None:
    assert TimeLimit().convert(typed, None, None) == limit_s
    for beyond in ("3651d", "0", "-1s"):
        with pytest.raises(click.BadParameter, match="is not a valid duration"):
            TimeLimit().convert(beyond, None, None)


@pytest.mark.parametrize("kind", [Age(), Since()], ids=lambda kind: kind.name)
def test_an_age_has_a_unit(kind: Age) -> None:
    """``prune --older-than 30`` by someone who means days would remove what is half a minute old."""
    assert kind.convert("30d", None, None) == 30 * 86400.0
    with pytest.raises(click.BadParameter, match=r"'30' is not a valid age.* \(use 90s, 15m, 2h or 1d"):
        kind.convert("30", None, None)
    assert Duration().convert("30", None, None) == 30.0


def test_a_name_fits_its_column() -> None:
    assert Name().convert("ü" * 200, None, None) == "ü" * 200
    with pytest.raises(click.BadParameter, match="this one has 201"):
        Name().convert("ü" * 201, None, None)


@pytest.mark.parametrize("typed", ["", " ", "nightly ", "\tnightly"])
def test_a_name_is_what_is_left_of_it_on_a_command_line(typed: str) -> None:
    with pytest.raises(click.BadParameter, match="must not be empty, and must not begin or end with a space"):
        Name().convert(typed, None, None)
    assert Name().convert("every night", None, None) == "every night"


@pytest.mark.parametrize("typed", ["a\nb", "a\x1b[2Jb", "a\u2028b", "a\u202eb", "a\x00b"])
def test_a_name_controls_no_terminal(typed: str) -> None:
    with pytest.raises(click.BadParameter, match="must have no control characters or line breaks") as caught:
        Name().convert(typed, None, None)
    assert typed not in caught.value.message
