"""The text that a search measures on is not the one that its answer is judged by."""

from __future__ import annotations

import re

import pytest

from qbatch.core.search.shared_run import shared_run
from qbatch.worker.measuring import EVAL_TEXTS
from qbatch.worker.searching import DEFAULT_SEARCH_TEXT

# A word is at least one token, mostly, so what shares no run of so few words shares none of 13 tokens.
SHORT_RUN = 6


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@pytest.mark.parametrize("name", EVAL_TEXTS)
def test_the_search_text_shares_no_passage_with_an_evaluation_text(name: str) -> None:
    own, other = (words(file.read_text(encoding="utf-8")) for file in (DEFAULT_SEARCH_TEXT, EVAL_TEXTS[name]))
    assert shared_run(own, other, SHORT_RUN) is None
    assert len(own) > 2500


def test_a_shared_run_is_found_wherever_it_lies() -> None:
    passage = list(range(13))
    first, second = [*range(50, 60), *passage, 99], [7, *passage]
    assert shared_run(first, second) == tuple(passage)
    assert shared_run(first, passage[:12]) is None
    assert shared_run([], second) is None
