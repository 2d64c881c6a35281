"""What a reader must know of a group's figures, and what limits its speed, as paragraphs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbatch.views.answer_comparisons import baseline_pairs, compare_answers, say, why_not_compared
from qbatch.views.audit_text import speed_origin
from qbatch.views.emulation import emulation_remarks
from qbatch.views.groups import timed_apart
from qbatch.views.missing_parts import missing_part_remarks
from qbatch.views.protocol import version_differences
from qbatch.views.report.judged_group import JudgedGroup
from qbatch.views.speed_explanation import explain_speed


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupNotes:
    """Paragraphs about one model."""

    model: str
    setting: str
    texts: Sequence[str]


def remarks_of(judged: JudgedGroup) -> GroupNotes:
    return GroupNotes(model=judged.model, setting=judged.setting, texts=list(_remarks(judged)))


def speed_reasons_of(judged: JudgedGroup) -> GroupNotes:
    """A paragraph for each quantized row, without the sentences that an earlier row already has."""
    return GroupNotes(model=judged.model, setting=judged.setting, texts=list(_reasons(judged)))


def answers_of(judged: JudgedGroup) -> GroupNotes:
    """How each quantized row answered the questions of tasks, beside its baseline."""
    group = judged.group
    texts = [say(each) for each in compare_answers(baseline_pairs(group))]
    unknown = why_not_compared(group)
    return GroupNotes(model=judged.model, setting=judged.setting, texts=texts + ([unknown] if unknown else []))


def _reasons(judged: JudgedGroup) -> Iterable[str]:
    seen: set[str] = set()
    for row in judged.group.rows:
        sentences = [] if row.is_baseline else explain_speed(row, judged.baseline(row))
        new = [sentence for sentence in sentences if sentence not in seen]
        seen.update(new)
        if new:
            yield " ".join(new)


def _remarks(judged: JudgedGroup) -> Iterable[str]:
    group = judged.group
    for row in group.rows:
        baseline = judged.baseline(row)
        if baseline is not None and timed_apart(row, baseline):
            yield (
                f"The rounds of {row.job_id} did not alternate with those of {baseline.job_id}: the host's speed may "
                "have changed in between."
            )
        if row.reused_from is not None:
            yield f"{row.job_id} was not measured again: its figures are those of {row.reused_from}."
        if (origin := speed_origin(row)) is not None:
            yield f"{row.job_id}: {origin}."
    for old, new in group.superseded.items():
        yield f"{old} is not shown: {new} measured the same later."
    yield from missing_part_remarks(group.rows)
    yield from emulation_remarks(group.rows)
    if versions := version_differences(group.rows):
        yield f"The versions differ, which may explain a difference: {', '.join(versions)}."
