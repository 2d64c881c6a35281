"""What was and was not quantized in a checkpoint, as a part of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbatch.views.audit_text import audit_lines, audit_warnings, loader_lines
from qbatch.views.formats import NOTHING
from qbatch.views.report.judged_group import JudgedGroup
from qbatch.views.report.report_table import RowLabel
from qbatch.views.units import show_percent


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """``lines``: titles and texts; ``loaders``: the same for what other libraries make of the checkpoint."""

    label: RowLabel
    quantized: str
    warnings: Sequence[str]
    lines: Sequence[tuple[str, str]]
    loaders: Sequence[tuple[str, str]]


def audit_entries(groups: Iterable[JudgedGroup]) -> list[AuditEntry]:
    """An entry for each quantized row."""
    return [
        AuditEntry(
            label=RowLabel.of(judged, row),
            quantized=NOTHING if row.quantized_fraction is None else show_percent(row.quantized_fraction),
            warnings=list(audit_warnings(row)),
            lines=list(audit_lines(row)),
            loaders=list(loader_lines(row)),
        )
        for judged in groups
        for row in judged.group.rows
        if not row.is_baseline
    ]
