"""The answer of ``compare``: a line for each model with what to ship, its figures, and where it is."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from qbatch.core.measured.metric import MetricColumn as Metrics
from qbatch.core.measured.metrics import DECODE, GRAPH_DECODE, KL_MEAN, RANK_CORRELATION, THROUGHPUT, WEIGHTS
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.audit_text import unmarked_warnings
from qbatch.views.choices import Choice
from qbatch.views.figure_table import FigureTable, Line
from qbatch.views.formats import GAP, UNLIMITED, printable, text_width
from qbatch.views.groups import ModelRows
from qbatch.views.result_columns import ShownColumn, of_metrics
from qbatch.views.scheme import show_scheme
from qbatch.views.shortened import LEAST_OF_A_NAME, fit_names
from qbatch.views.table_notes import Footnotes

_COLUMNS: tuple[ShownColumn, ...] = tuple(
    map(
        of_metrics,
        (
            Metrics(metrics=(WEIGHTS,)),
            # In one column, since a row has one of them: one encoder must not push the speed of all others out.
            Metrics(metrics=(KL_MEAN, RANK_CORRELATION)),
            Metrics(metrics=(DECODE, THROUGHPUT), rank=1),
            Metrics(metrics=(GRAPH_DECODE,), rank=2),
        ),
    )
)
# Names are shortened before one of these leaves.
_BESIDE_NAMES = _COLUMNS[:-1]
GONE = "its checkpoint is no longer on the storage; a new submit makes it again"
"""What is said of a scheme to ship whose checkpoint was removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What is said of one group of a model, or of a model without one."""

    model: str
    scheme: str
    line: Line
    path: str | None = None


def pick_lines(
    models: Sequence[ModelRows], choices: Sequence[Choice], notes: Footnotes | None, width: int
) -> list[str]:
    """A line for each model, or for each of its groups that cannot be compared; the path on a second one if it does not
    fit. Warnings about what is to be shipped become ``notes``, if there are to be any."""
    by_model: dict[str, list[Choice]] = {}
    for choice in choices:
        by_model.setdefault(choice.model, []).append(choice)
    answers = [answer for model in models for answer in _answers(model, by_model.get(model.name, ()), notes)]
    figures = FigureTable.of([answer.line for answer in answers], _BESIDE_NAMES).figures_width
    schemes = max(text_width(answer.scheme) for answer in answers)
    room = max(width - figures - schemes - len(GAP), LEAST_OF_A_NAME)
    names = fit_names([answer.model for answer in answers], room)
    name_width = max(map(text_width, names))
    labelled = [_labelled(answer, name, name_width, schemes) for answer, name in zip(answers, names, strict=True)]
    table = FigureTable.of(labelled, _COLUMNS).fitted(width)
    paths = _Paths.of([answer.path for answer in answers if answer.path], table, width)
    lines = [table.header(f"{'model'.ljust(name_width)}{GAP}ship") + (f"{GAP}path" if paths.are_beside else "")]
    for answer, line in zip(answers, labelled, strict=True):
        lines += paths.add(table.show(line, width), answer.path)
    return [*lines, *paths.remarks]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Paths:
    """Where the paths of checkpoints stand: after the figures, ``column`` characters from the left, else on lines of
    their own. ``folder``: the one that all of them are in, if it is said once because they are too long."""

    are_beside: bool
    column: int
    folder: str | None

    @classmethod
    def of(cls, paths: Sequence[str], table: FigureTable, width: int) -> Self:
        longest = max(map(text_width, paths), default=0)
        column = table.label_width + table.figures_width
        are_beside = bool(paths) and (width >= UNLIMITED or column + len(GAP) + longest <= width)
        is_too_long = not are_beside and len(GAP) + longest > width and len(paths) > 1
        return cls(are_beside=are_beside, column=column, folder=posixpath.commonpath(paths) if is_too_long else None)

    def add(self, shown: list[str], path: str | None) -> list[str]:
        if path is None:
            return shown
        if self.are_beside:
            return [shown[0] + " " * (self.column - text_width(shown[0])) + GAP + path]
        return [*shown, GAP + (path if self.folder is None else posixpath.relpath(path, self.folder))]

    @property
    def remarks(self) -> list[str]:
        return [] if self.folder is None else [f"These checkpoints are in {self.folder}"]


def _labelled(answer: _Answer, name: str, name_width: int, scheme_width: int) -> Line:
    label = f"{name}{' ' * (name_width - text_width(name))}{GAP}{answer.scheme.ljust(scheme_width)}"
    return replace(answer.line, label=label)


def _answers(model: ModelRows, choices: Sequence[Choice], notes: Footnotes | None) -> Iterable[_Answer]:
    """``choices``: those of this model."""
    name = printable(model.name)
    for choice in choices:
        yield _of_choice(name, choice, notes)
    if not choices:
        row = next((group.rows[0] for group in model.groups), None) or model.unmeasured[0]
        yield _Answer(model=name, scheme="–", line=Line(row=row, label="", remark=_without_choice(model)))


def _of_choice(name: str, choice: Choice, notes: Footnotes | None) -> _Answer:
    ship = choice.ship
    if ship is None:
        line = Line(row=choice.group.rows[0], label="", remark=_why_nothing(choice))
        return _Answer(model=name, scheme="–", line=line)
    marks = "" if notes is None else "".join(notes.mark(text) for text in _warnings(choice, ship))
    scheme = f"{'baseline' if ship.is_baseline else show_scheme(ship)} {marks}".rstrip()
    baseline = None if ship.is_baseline else choice.baseline
    line = Line(row=ship, label="", baseline=baseline)
    return _Answer(model=name, scheme=scheme, line=line, path=ship.checkpoint_path)


def is_gone(ship: ResultRow) -> bool:
    """Whether nobody can ship it, because somebody removed its checkpoint."""
    return not ship.is_baseline and ship.checkpoint_path is None


def _warnings(choice: Choice, ship: ResultRow) -> Iterable[str]:
    yield from unmarked_warnings(ship)
    if is_gone(ship):
        yield GONE
    if ship.is_baseline:
        yield _why_the_baseline(choice)


def _why_the_baseline(choice: Choice) -> str:
    quantized = {row.job_id for row in choice.group.rows if not row.is_baseline}
    rejected = {job_id: why for job_id, why in choice.recommendation.rejected.items() if job_id in quantized}
    reasons = _reasons(rejected)
    if len(rejected) == len(quantized):
        return f"no quantized model qualifies: {reasons}"
    # Where quality is preferred, a quantized model that qualifies is always shipped.
    better = "faster beyond the noise" if choice.recommendation.prefer == "speed" else "smaller"
    if not reasons:
        return f"no quantized model is {better}"
    return f"no quantized model that qualifies is {better}; these do not qualify: {reasons}"


def _why_nothing(choice: Choice) -> str:
    reasons = _reasons(choice.recommendation.rejected)
    return f"nothing qualifies: {reasons}" if reasons else "nothing is recommended, since its quality was not measured"


def _reasons(rejected: Mapping[str, Sequence[str]]) -> str:
    """Why rows were rejected, each reason once with the jobs that it is of."""
    jobs: dict[str, list[str]] = {}
    for job_id, reasons in rejected.items():
        for reason in reasons:
            jobs.setdefault(reason, []).append(job_id)
    return "; ".join(f"{', '.join(of)}: {reason}" for reason, of in jobs.items())


def _without_choice(model: ModelRows) -> str:
    states = Counter(f"{row.state}{f' ({row.error_kind})' if row.error_kind else ''}" for row in model.unmeasured)
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    return f"no quantized model was measured{f': {counted}' if counted else ''}"
