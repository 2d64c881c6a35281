"""bitsandbytes' rows are what they were before methods had a seam: one recorded value at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from tests.unit.bnb_contract import RECORDED, SCHEMES, record

recorded: dict[str, Any] = json.loads(RECORDED.read_text())


@cache
def today() -> dict[str, Any]:
    return dict(json.loads(json.dumps(record())))


def differences(was: Any, now: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ; floats may by what processors round differently."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from differences(was.get(key), now.get(key), f"{where}/{key}")
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for number, (one, other) in enumerate(zip(was, now, strict=True)):
            yield from differences(one, other, f"{where}/{number}")
    elif isinstance(was, float) and isinstance(now, float):
        if now != pytest.approx(was, rel=1e-5):
            yield f"{where} was {was} and is {now}"
    elif was != now:
        yield f"{where} was {was!r} and is {now!r}"


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("part", ["schemes", "rows", "words", "written"])
def test_a_bitsandbytes_row_is_what_it_was(part: str, name: str) -> None:
    assert list(differences(recorded[part].get(name), today()[part].get(name))) == []


def test_bits_ask_for_the_schemes_that_they_asked_for() -> None:
    assert list(differences(recorded["grids"], today()["grids"])) == []
