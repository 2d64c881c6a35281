"""The figures of further evaluation texts, beside those of the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qbatch.core.exponential import exponential
from qbatch.core.measured.quality_figures import FurtherText
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.formats import NOTHING, printable
from qbatch.views.groups import Group
from qbatch.views.quality_bounds import QUALITY_COSTS, QualityCost


def text_table(group: Group) -> Iterable[tuple[str, list[str]]]:
    """Yield (title, a cell for each row) for each further text and each loss of quality that any row has."""
    names = dict.fromkeys(name for row in group.rows for name in _texts(row))
    for name in names:
        for cost in QUALITY_COSTS:
            cells = [_cell(_texts(row).get(name), cost) for row in group.rows]
            if any(cell != NOTHING for cell in cells):
                yield printable(f"{cost.name} on {name}"), cells


def text_lines(row: ResultRow) -> Iterable[tuple[str, str]]:
    """Yield the figures of each further text of ``row`` as (title, text)."""
    for name, text in _texts(row).items():
        known = [
            f"{cost.name} {cost.show_with(value, cost.error_on_text(text.quality))}"
            for cost in QUALITY_COSTS
            if (value := cost.on_text(text.quality)) is not None
        ]
        if text.perplexity.mean_nll is not None:
            known.append(f"perplexity {exponential(text.perplexity.mean_nll):.2f}")
        yield f"on {name}", ", ".join(known) or text.quality.reason or text.perplexity.reason or NOTHING


def _texts(row: ResultRow) -> Mapping[str, FurtherText]:
    return row.details.more_texts or {}


def _cell(text: FurtherText | None, cost: QualityCost) -> str:
    value = None if text is None else cost.on_text(text.quality)
    return NOTHING if value is None else cost.show(value)
