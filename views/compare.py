"""Which configuration to ship: each model's rows side by side, and a recommendation for each group of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbatch.core.measured.metric import MetricColumn
from qbatch.core.measured.metrics import COMPARE_COLUMNS, RESULTS_COLUMNS
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.answer_comparisons import baseline_pairs, compare_answers, say, why_not_compared
from qbatch.views.audit_text import cpu_kernel_warning, defects, speed_origin, unmarked_warnings
from qbatch.views.choices import Choice, choices_of
from qbatch.views.compare_rows import flat_rows, group_differences, model_as_mapping
from qbatch.views.comparison import Preference
from qbatch.views.emulation import emulation_remarks
from qbatch.views.formats import GAP, PROSE_WIDTH, printable, render, terminal_width, text_width
from qbatch.views.groups import Group, ModelRows, models_of, timed_apart
from qbatch.views.metric_text import column_title, show_column
from qbatch.views.missing_parts import missing_part_remarks
from qbatch.views.pick_lines import GONE, is_gone, pick_lines
from qbatch.views.protocol import show_protocol, version_differences
from qbatch.views.ratios import show_relative
from qbatch.views.recommend import recommend
from qbatch.views.recovered_rows import recovery_remarks
from qbatch.views.scheme import brief_schemes, show_scheme
from qbatch.views.speed_explanation import explain_speed, explain_speed_briefly
from qbatch.views.table_legend import mark_sentences, short_legend
from qbatch.views.table_notes import Footnotes, show_state
from qbatch.views.task_scores import task_table
from qbatch.views.text_figures import text_table
from qbatch.views.totals import sum_up
from qbatch.views.units import show_count
from qbatch.views.wrapped_text import wrap

# The rank of the last column that is shown of a model among others: that of peak memory.
_LAST_MAIN = 6
_PREFERRED = {"size": "the smallest weights", "speed": "the highest rate", "quality": "what is nearest to the baseline"}


def comparison(
    rows: Sequence[ResultRow],
    preference: Preference,
    *,
    by: str,
    format: str,  # noqa: A002
    in_full: bool = False,
    has_legend: bool = False,
) -> str:
    """Compare the rows of ``find_results`` as a table, JSON or CSV.

    The table begins with a line for each model and a sum. If there is only one model, all of its figures follow and
    what explains them; of several, with ``in_full``, the main ones. ``by``: the lines of their tables (ORIENTATIONS).
    ``has_legend``: explain every mark.
    """
    models = models_of(rows)
    if format == "json":
        return render([model_as_mapping(model, preference) for model in models], (), "json")
    if format == "csv":
        return render([line for model in models for line in flat_rows(model, preference)], (), "csv")
    if not models:
        return "no results"
    width = terminal_width()
    screen = _Screen(preference=preference, by=by, width=width)
    if len(models) == 1:
        lines = [*screen.answer(rows, models, is_in_full=True), "", *screen.model(models[0])]
    else:
        lines = screen.answer(rows, models, is_in_full=False)
        if in_full:
            lines += [line for model in models for line in ["", *screen.main_figures(model)]]
    return "\n".join([*lines, "", *screen.legend(lines, has_legend=has_legend)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Screen:
    """Lines for a terminal of ``width`` columns."""

    preference: Preference
    by: str
    width: int

    @property
    def prose(self) -> int:
        return min(self.width, PROSE_WIDTH)

    def answer(self, rows: Sequence[ResultRow], models: Sequence[ModelRows], *, is_in_full: bool) -> list[str]:
        """A line for each model, what it follows from, and the sum."""
        choices, notes = choices_of(rows, self.preference), Footnotes()
        # In full, they stand beside the figures.
        lines = pick_lines(models, choices, None if is_in_full else notes, self.width)
        texts = [f"[{number}] {text}" for number, text in enumerate(notes.texts, start=1)]
        if not is_in_full:
            texts += [*self._apart(models), *self._of_all(choices)]
        texts += [*_chosen(choices), sum_up(rows, choices, has_reasons=True)]
        if not is_in_full:
            texts.append("`qbatch compare --model NAME`, of one model: all figures, and what limits its speed.")
        return [*lines, "", *(line for text in texts for line in wrap(printable(text), self.prose, indent=GAP))]

    def _apart(self, models: Sequence[ModelRows]) -> Iterable[str]:
        for model in models:
            if len(model.groups) > 1:
                yield f"{model.name} has {len(model.groups)} lines: {_why_apart(model)}"

    def _of_all(self, choices: Sequence[Choice]) -> Iterable[str]:
        measured = [row for choice in choices for row in choice.group.rows]
        yield from missing_part_remarks(measured)
        yield from emulation_remarks(measured)

    def model(self, model: ModelRows) -> list[str]:
        """All figures of a model, and the remarks about them."""
        parameters = next((row.num_parameters for group in model.groups for row in group.rows), None)
        heading = model.name + (f" · {show_count(parameters)} parameters" if parameters is not None else "")
        lines, said = [printable(heading)], set[str]()
        if len(model.groups) > 1:
            lines += self._wrapped(_why_apart(model))
        for group in model.groups:
            lines += self._group(group, said)
        for text in _without_result(model.unmeasured):
            lines += self._wrapped(text)
        return lines

    def main_figures(self, model: ModelRows) -> Iterable[str]:
        """The main figures of a model among others, and a line for each row whose speed can be explained."""
        yield printable(model.name)
        for group in model.groups:
            if len(model.groups) > 1:
                yield from self._wrapped(f"{show_protocol(group.rows[0])}, on {group.device_name}")
            yield from _side_by_side(group, self.by, self.width, brief=True)
            for row in group.rows:
                kernels = cpu_kernel_warning(row)
                if kernels is not None and row is recommend(group, self.preference).ship:
                    kernels = None  # the line of what to ship has a footnote of it already
                said = [*defects(row), *filter(None, [kernels, speed_origin(row)])]
                yield from (line for each in said for line in self._wrapped(f"{_name(row)}: {each}."))
                reason = explain_speed_briefly(row, group.baselines.get(row.job_id))
                yield from self._wrapped(f"{_name(row)} {reason}." if reason else "")
            for each in compare_answers(baseline_pairs(group)):
                yield from self._wrapped(say(each))
        for text in _without_result(model.unmeasured):
            yield from self._wrapped(text)

    def _group(self, group: Group, said: set[str]) -> Iterable[str]:
        """Yield the lines of a group, without the sentences that the model's other groups or rows have ``said``."""
        yield from self._wrapped(f"{show_protocol(group.rows[0])}, on {group.device_name}")
        yield ""
        yield from _side_by_side(group, self.by, self.width)
        yield ""
        recommendation = recommend(group, self.preference)
        yield from self._wrapped(recommendation.sentence)
        for row in group.rows:
            sentences = [] if row.is_baseline else explain_speed(row, group.baselines.get(row.job_id))
            yield from self._wrapped(" ".join(_new(sentences, said)))
        for each in compare_answers(baseline_pairs(group)):
            yield from self._wrapped(say(each))
        yield from self._wrapped(why_not_compared(group) or "")
        for remark in _new(_remarks(group, recommendation.ship), said):
            yield from self._wrapped(remark)

    def _wrapped(self, text: str) -> list[str]:
        return wrap(printable(text), self.prose, first=GAP, indent=GAP) if text else []

    def legend(self, lines: Sequence[str], *, has_legend: bool) -> list[str]:
        if not has_legend:
            return wrap(short_legend(lines, ["--legend"]), self.prose, indent=GAP)
        texts = ["× is a figure divided by that of the baseline, the same model unquantized. KL is in nats."]
        return wrap(" ".join([*texts, *mark_sentences(lines)]), self.prose)


def _name(row: ResultRow) -> str:
    return f"{row.job_id} {show_scheme(row)}"


def _without_result(rows: Sequence[ResultRow]) -> Iterable[str]:
    """Yield a sentence for each reason, with all that have it."""
    reasons: dict[tuple[str | None, ...], list[ResultRow]] = {}
    for row in rows:
        reasons.setdefault((row.state, row.error_kind, row.error_message), []).append(row)
    for alike in reasons.values():
        names = ", ".join(map(_name, alike))
        yield f"{names} {'has' if len(alike) == 1 else 'have'} no result: {show_state(alike[0])}."


def _new(sentences: Iterable[str], said: set[str]) -> list[str]:
    """The sentences that were not ``said`` yet. They are added to ``said``."""
    fresh = [sentence for sentence in dict.fromkeys(sentences) if sentence not in said]
    said.update(fresh)
    return fresh


def _chosen(choices: Sequence[Choice]) -> Iterable[str]:
    """Yield what was preferred, and within which limits."""
    shipped = [choice.recommendation for choice in choices if choice.ship is not None]
    for prefer in dict.fromkeys(each.prefer for each in shipped):
        bounds = dict.fromkeys(" and ".join(each.bounds) for each in shipped if each.prefer == prefer)
        limits = "; or with ".join(filter(None, bounds))
        yield f"Chosen: {_PREFERRED[prefer]}{f', with {limits}' if limits else ''}."


def _why_apart(model: ModelRows) -> str:
    differing = ", ".join(group_differences(model))
    return f"The figures of these {len(model.groups)} groups cannot be compared. The groups differ in {differing}."


def _remarks(group: Group, ship: ResultRow | None) -> Iterable[str]:
    for row in group.rows:
        # The recommendation already includes the warnings of its own row.
        for warning in unmarked_warnings(row) if row is not ship else ():
            yield f"{_name(row)}: {warning}."
    yield from recovery_remarks(group.rows, group.search)
    if ship is not None and is_gone(ship):
        yield f"{_name(ship)}: {GONE}."
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


def _side_by_side(group: Group, by: str, width: int, *, brief: bool = False) -> list[str]:
    """``brief``: the main figures alone."""
    shown = [column for column in RESULTS_COLUMNS if column.rank <= _LAST_MAIN] if brief else COMPARE_COLUMNS
    columns = [column for column in shown if any(column.metric_of(row) for row in group.rows)]
    titles = [column_title(column, group.rows) for column in columns]
    schemes = brief_schemes(group.rows) if brief else map(show_scheme, group.rows)
    heads = [f"{row.job_id} {scheme}{_of_base(row, group)}" for row, scheme in zip(group.rows, schemes, strict=True)]
    cells = [[_cell(column, row, group) for row in group.rows] for column in columns]
    for title, line in [*text_table(group), *task_table(group)]:
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
