"""Which configuration to ship: each model's rows side by side, and a recommendation for each group of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qbatch.core.measured.metrics import COMPARE_COLUMNS, MetricColumn
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.audit_text import audit_warnings
from qbatch.views.compare_rows import flat_rows, group_differences, model_as_mapping
from qbatch.views.comparison import Preference
from qbatch.views.emulation import emulation_remarks
from qbatch.views.figure_table import wrap
from qbatch.views.formats import GAP, PROSE_WIDTH, printable, render, terminal_width, text_width
from qbatch.views.groups import Group, ModelRows, models_of, timed_apart
from qbatch.views.metric_text import column_title, show_column
from qbatch.views.missing_parts import missing_part_remarks
from qbatch.views.protocol import show_protocol, version_differences
from qbatch.views.ratios import show_relative
from qbatch.views.recommend import recommend
from qbatch.views.results_table import NOISE_LEGEND, show_state
from qbatch.views.scheme import show_scheme
from qbatch.views.speed_explanation import explain_speed
from qbatch.views.task_scores import task_table
from qbatch.views.units import show_count


def comparison(rows: Sequence[ResultRow], preference: Preference, *, by: str, format: str) -> str:  # noqa: A002
    """Compare the rows of ``find_results`` as a table, JSON or CSV. ``by``: its lines (ORIENTATIONS)."""
    models = models_of(rows)
    if format == "json":
        return render([model_as_mapping(model, preference) for model in models], (), "json")
    if format == "csv":
        return render([line for model in models for line in flat_rows(model, preference)], (), "csv")
    if not models:
        return "no results"
    width = terminal_width()
    lines = [line for model in models for line in ["", *_model(model, preference, by, width)]]
    return "\n".join([*lines, "", *_legend(models, width)]).lstrip("\n")


def _model(model: ModelRows, preference: Preference, by: str, width: int) -> list[str]:
    parameters = next((row.num_parameters for group in model.groups for row in group.rows), None)
    lines = [printable(model.name + (f" · {show_count(parameters)} parameters" if parameters is not None else ""))]
    prose = min(width, PROSE_WIDTH)
    if len(model.groups) > 1:
        lines += _wrapped(_why_apart(model), prose)
    for group in model.groups:
        lines += _group(group, preference, by, width)
    for row in model.unmeasured:
        lines += _wrapped(f"{row.job_id} {show_scheme(row)} has no result: {show_state(row)}.", prose)
    return lines


def _why_apart(model: ModelRows) -> str:
    differing = ", ".join(group_differences(model))
    return f"The figures of these {len(model.groups)} groups cannot be compared. The groups differ in {differing}."


def _group(group: Group, preference: Preference, by: str, width: int) -> Iterable[str]:
    text = min(width, PROSE_WIDTH)
    yield from _wrapped(f"{show_protocol(group.rows[0])}, on {group.device_name}", text)
    yield ""
    yield from _side_by_side(group, by, width)
    yield ""
    recommendation = recommend(group, preference)
    yield from _wrapped(recommendation.sentence, text)
    for reasons in _reasons(group):
        yield from _wrapped(reasons, text)
    for remark in _remarks(group, recommendation.ship):
        yield from _wrapped(remark, text)


def _reasons(group: Group) -> Iterable[str]:
    """Yield a paragraph for each quantized row, without the sentences that an earlier row already has."""
    seen: set[str] = set()
    for row in group.rows:
        sentences = [] if row.is_baseline else explain_speed(row, group.baselines.get(row.job_id))
        yield " ".join(sentence for sentence in sentences if sentence not in seen)
        seen.update(sentences)


def _remarks(group: Group, ship: ResultRow | None) -> Iterable[str]:
    for row in group.rows:
        # The recommendation already includes the warnings of its own row.
        for warning in audit_warnings(row) if row is not ship else ():
            yield f"{row.job_id} {show_scheme(row)}: {warning}."
    for old, new in group.superseded.items():
        yield f"{old} is not shown: {new} measured the same later."
    yield from missing_part_remarks(group.rows)
    yield from _not_in_turns(group)
    yield from emulation_remarks(group.rows)
    if versions := version_differences(group.rows):
        yield f"The versions differ, which may explain a difference: {', '.join(versions)}."


def _not_in_turns(group: Group) -> Iterable[str]:
    for row in group.rows:
        baseline = group.baselines.get(row.job_id)
        if baseline is not None and timed_apart(row, baseline):
            yield (
                f"The rounds of {row.job_id} did not alternate with those of {baseline.job_id}: the host's speed may "
                "have changed in between."
            )


def _side_by_side(group: Group, by: str, width: int) -> list[str]:
    columns = [column for column in COMPARE_COLUMNS if any(column.metric_of(row) for row in group.rows)]
    titles = [column_title(column, group.rows) for column in columns]
    heads = [f"{row.job_id} {show_scheme(row)}{_of_base(row, group)}" for row in group.rows]
    cells = [[_cell(column, row, group) for row in group.rows] for column in columns]
    for title, line in task_table(group):
        titles.append(title)
        cells.append(line)
    if by == "figure":
        return _blocks(titles, heads, cells, width)
    return _blocks(heads, titles, [list(line) for line in zip(*cells, strict=True)], width)


def _of_base(row: ResultRow, group: Group) -> str:
    """`` of j1``, the row's baseline, if the group has several; else ""."""
    baseline = group.baselines.get(row.job_id)
    is_only_one = sum(other.is_baseline for other in group.rows) < 2
    return "" if is_only_one or baseline is None else f" of {baseline.job_id}"


def _cell(column: MetricColumn, row: ResultRow, group: Group) -> str:
    return f"{show_column(column, row)} {show_relative(column, row, group.baselines.get(row.job_id))}".rstrip()


def _blocks(titles: Sequence[str], heads: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> list[str]:
    """A table of ``cells`` with a line for each of ``titles`` and a column for each of ``heads``.

    It is split into several tables, one below the other, that each fit ``width``.
    """
    first = max(map(text_width, titles), default=0)
    widths = [max(text_width(head), *(text_width(line[n]) for line in cells)) for n, head in enumerate(heads)]
    lines: list[str] = []
    for numbers in _cuts(widths, width - text_width(GAP) - first):
        table = [("", heads), *zip(titles, cells, strict=True)]
        lines += [""] if lines else []
        lines += [_text_line(title, line, first, numbers, widths) for title, line in table]
    return lines


def _text_line(title: str, line: Sequence[str], first: int, numbers: Sequence[int], widths: Sequence[int]) -> str:
    parts = [line[n] + " " * (widths[n] - text_width(line[n])) for n in numbers]
    return (GAP + GAP.join([title + " " * (first - text_width(title)), *parts])).rstrip()


def _cuts(widths: Sequence[int], available: int) -> list[list[int]]:
    """The numbers of the columns, split into runs that fit ``available`` characters; each run has at least one."""
    cuts: list[list[int]] = []
    left = 0
    for number, width in enumerate(widths):
        left -= width + len(GAP)
        if not cuts or left < 0:
            cuts.append([])
            left = available - width - len(GAP)
        cuts[-1].append(number)
    return cuts


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(printable(text), width, first=GAP, indent=GAP) if text else []


def _legend(models: Sequence[ModelRows], width: int) -> list[str]:
    text = "× is a figure divided by that of the baseline, the same model unquantized. KL is in nats. " + NOISE_LEGEND
    return wrap(text, min(width, PROSE_WIDTH)) if any(model.groups for model in models) else []
