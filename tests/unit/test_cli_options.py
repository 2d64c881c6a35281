"""What the command line's own types make of what is typed."""

from __future__ import annotations

import click
import pytest

from cli_options import Amount, Patterns


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
def test_what_is_no_pattern_is_refused(typed: str) -> None:
    with pytest.raises(click.BadParameter, match="is no regular expression"):
        Patterns().convert(typed, None, None)


def test_not_a_number_is_within_no_bounds() -> None:
    assert Amount(min=0).convert("1.02", None, None) == 1.02
    for typed in ("nan", "-1", "much"):
        with pytest.raises(click.BadParameter):
            Amount(min=0).convert(typed, None, None)
