"""Each group of layers with everything that a search found of it, and with the errors of its weights beside that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qbatch.core.search.finished_search import FinishedSearch
from qbatch.core.search.sensitivity import GroupSensitivity
from qbatch.views.formats import Column, render
from qbatch.views.search_figures import show_estimate
from qbatch.views.units import show_percent
from qbatch.views.wrapped_text import wrap

_TITLE = (
    "KL gained by each group at 16 bits, the best per byte first; beside it the relative error of its weights: "
    "quantized, and rounded to evenly spaced levels between the smallest and the largest. That says nothing of the "
    "output."
)
_COLUMNS: tuple[Column, ...] = (
    Column(key="group", title="group", wraps=True),
    Column(key="derivative", title="by derivative", show=show_estimate),
    Column(key="measured", title="measured", show=show_estimate),
    Column(key="quantized", title="error", show=show_percent),
    Column(key="four", title="16 levels", show=show_percent, spare=True),
    Column(key="eight", title="256 levels", show=show_percent, spare=True),
)


def group_lines(found: FinishedSearch, width: int) -> Iterable[str]:
    """A title that says what the columns are, and a line for each group."""
    yield from wrap(_TITLE, width)
    yield from render([_row(each) for each in found.sensitivity.groups], _COLUMNS, "table").splitlines()


def _row(each: GroupSensitivity) -> dict[str, Any]:
    errors = each.weight_errors
    return {
        "group": each.group.name,
        "derivative": each.derivative,
        "measured": each.measured,
        "quantized": errors.quantized,
        "four": errors.min_max_4_bits,
        "eight": errors.min_max_8_bits,
    }
