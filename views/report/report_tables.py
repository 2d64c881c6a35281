"""Which columns the tables of a report have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbatch.core.measured.metric import Metric, MetricColumn
from qbatch.core.measured.metrics import (
    BITS_PER_PARAM,
    COSINE_MEAN,
    DECODE,
    DISK,
    ENERGY_METRICS,
    ENERGY_PER_TOKEN,
    FORWARD,
    GRAPH_DECODE,
    KERNELS_ALONE,
    KL_FLOOR,
    KL_MEAN,
    KL_P99,
    LOAD,
    MEMORY_METRICS,
    PEAK_MEMORY,
    PER_TOKEN_P50,
    PER_TOKEN_P99,
    PERPLEXITY,
    PREFILL,
    QUANTIZE,
    RANK_CORRELATION,
    THROUGHPUT,
    TOP1,
    WEIGHTS,
)
from qbatch.views.formats import NOTHING
from qbatch.views.report.judged_group import JudgedGroup
from qbatch.views.report.report_table import (
    JudgedRow,
    ReportTable,
    TableCell,
    TableColumn,
    TableHeading,
    metric_table_column,
    report_table,
)
from qbatch.views.task_scores import task_table

_SIZE_AND_QUALITY: tuple[tuple[Metric, ...], ...] = (
    *((WEIGHTS,), (BITS_PER_PARAM,), (KL_MEAN,), (KL_FLOOR,), (KL_P99,)),
    *((TOP1,), (PERPLEXITY,), (RANK_CORRELATION,), (COSINE_MEAN,), (DISK,)),
)
_SPEED: tuple[tuple[Metric, ...], ...] = (
    *((DECODE, THROUGHPUT), (PREFILL, FORWARD), (GRAPH_DECODE,), (PER_TOKEN_P50,), (PER_TOKEN_P99,)),
    *((KERNELS_ALONE,), (LOAD,), (QUANTIZE,)),
)
_MEMORY: tuple[tuple[Metric, ...], ...] = ((PEAK_MEMORY,), *((metric,) for metric in MEMORY_METRICS))
_ENERGY: tuple[tuple[Metric, ...], ...] = ((ENERGY_PER_TOKEN,), *((metric,) for metric in ENERGY_METRICS))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTables:
    """A table has no columns where nothing of its kind was measured."""

    size_and_quality: ReportTable
    speed: ReportTable
    memory: ReportTable
    energy: ReportTable

    @property
    def relatives(self) -> list[str]:
        """What stands after the figures: ratios and marks."""
        tables = (self.size_and_quality, self.speed, self.memory, self.energy)
        return [cell.relative for table in tables for row in table.rows for cell in row.cells]

    @classmethod
    def of(cls, groups: Sequence[JudgedGroup]) -> ReportTables:
        rows = [(judged, row) for judged in groups for row in judged.group.rows]
        return cls(
            size_and_quality=report_table(rows, [*_columns(_SIZE_AND_QUALITY, rows), *_tasks(groups)]),
            speed=report_table(rows, _columns(_SPEED, rows)),
            memory=report_table(rows, _columns(_MEMORY, rows)),
            energy=report_table(rows, [*_columns(_ENERGY, rows), *_idle_power(rows)]),
        )


def _columns(metrics: Iterable[tuple[Metric, ...]], rows: Sequence[JudgedRow]) -> Iterable[TableColumn]:
    return (metric_table_column(MetricColumn(metrics=members), rows) for members in metrics)


def _tasks(groups: Sequence[JudgedGroup]) -> Iterable[TableColumn]:
    """A column for each score of lm-evaluation-harness."""
    scores = [dict(task_table(judged.group)) for judged in groups]
    for title in dict.fromkeys(title for own in scores for title in own):
        texts = [
            text
            for judged, own in zip(groups, scores, strict=True)
            for text in own.get(title, [NOTHING] * len(judged.group.rows))
        ]
        yield TableHeading(title=title), [TableCell(text=text) for text in texts]


def _idle_power(rows: Sequence[JudgedRow]) -> Iterable[TableColumn]:
    """The power that the GPU takes while it idles, which net figures leave out."""
    watts = [row.details.why.energy.idle_w for _, row in rows]
    cells = [TableCell(text=NOTHING if value is None else f"{value:.0f}", sort=value) for value in watts]
    yield TableHeading(title="idle", unit="W"), cells
