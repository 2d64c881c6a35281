"""What `show` says of a search: it fits the terminal, and of a large model not everything unless that is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qbatch.views import formats
from qbatch.views.group_errors import group_lines
from qbatch.views.search_figures import frontier_table, search_lines, sensitivity_lines
from tests.found import a_search

WIDTH = 80
MANY = a_search(tuple(0.1 / (1 + number) for number in range(100)))


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "terminal_width", lambda: WIDTH)


def test_of_a_short_frontier_each_mixture_is_shown() -> None:
    lines = frontier_table(a_search(), {3: "j7"}, in_full=False)
    assert [line.split()[0] for line in lines[2:]] == list("01234")
    assert [line.split()[-1] for line in lines[2:]] == ["–", "–", "–", "j7", "–"], "at 80 columns too"


def test_of_a_long_one_those_that_were_published_and_their_neighbours() -> None:
    lines = frontier_table(MANY, {41: "j7"}, in_full=False)
    numbers = [line.split()[0] for line in lines[2:-1]]
    assert {"0", "40", "41", "42", "99"} <= set(numbers)
    assert (len(numbers) < 15, lines[-1]) == (True, f"and {100 - len(numbers)} more (--all)")
    assert len(frontier_table(MANY, {41: "j7"}, in_full=True)) == 102


def test_of_many_layers_the_most_sensitive_are_shown() -> None:
    lines = sensitivity_lines(MANY, WIDTH, in_full=False)
    assert (len(lines), lines[-1]) == (11, "and 91 more groups (--all)")
    assert lines[2].split()[0] == "model.layers.0.a"
    assert len(sensitivity_lines(MANY, WIDTH, in_full=True)) == 101


def test_a_group_is_listed_with_its_errors_and_those_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(map(len, group_lines(a_search(), WIDTH))) <= WIDTH
    monkeypatch.setattr(formats, "terminal_width", lambda: 120)
    lines = list(group_lines(a_search(), 120))
    head = next(number for number, line in enumerate(lines) if line.startswith("group "))
    assert " ".join(lines[:head]).endswith("That says nothing of the output.")
    titles = ["group", "by", "derivative", "measured", "error", "16", "levels", "256", "levels"]
    assert lines[head].split() == titles
    first, last = " ".join(lines[head + 2].split()), " ".join(lines[-1].split())
    assert first.endswith("5.0e-02 ± 1.0e-03 2.5e-02 ± 1.0e-03 10.0 % 20.0 % 1.0 %")
    assert last.endswith("1.0e-02 ± 1.0e-03 – 10.0 % 20.0 % 1.0 %")


def test_why_two_orders_are_not_compared_is_said() -> None:
    found = a_search()
    few = replace(found.sensitivity, rank_correlation=None, compared_groups=2)
    said = dict(search_lines(replace(found, sensitivity=few)))
    assert said["rank correlation"] == "unknown: gains were measured of 2 of 4 groups, too few to rank"
    known = replace(found.sensitivity, rank_correlation=0.987, compared_groups=3)
    assert "0.99 between" in dict(search_lines(replace(found, sensitivity=known)))["rank correlation"]
    none = replace(few, why_no_derivative="no memory")
    assert "rank correlation" not in dict(search_lines(replace(found, sensitivity=none)))


def test_a_wide_table_of_layers_is_split() -> None:
    found = a_search((0.1, 0.05, 0.04, 0.03, 0.02, 0.01))
    wide = [
        replace(each, group=replace(each.group, layer="model.layers.0", name=f"model.layers.0.{'x' * 30}{number}"))
        for number, each in enumerate(found.sensitivity.groups)
    ]
    found = replace(found, sensitivity=replace(found.sensitivity, groups=tuple(wide)))
    lines = sensitivity_lines(found, WIDTH, in_full=True)
    assert max(map(len, lines)) <= WIDTH
    assert lines.count("") == 2, "three tables for five columns"
    assert sensitivity_lines(found, WIDTH, in_full=False)[0].startswith("the most per byte")
