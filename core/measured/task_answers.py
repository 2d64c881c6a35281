"""How a model answered each question of a task of lm-evaluation-harness."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from qbatch.core.stored_json import Stored

HASH_DIGITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskAnswers(Stored):
    """The answers of one task, or of all tasks of a group, question by question.

    ``questions``: 16 hexadecimal digits for each, the start of a hash of the document, the prompt and the target.
    ``values``: by metric, under the harness's names, the score of each question; null where it has none.
    ``clusters``: for each question the number of its cluster; None if all questions are independent. Questions of one
    cluster are about the same passage, or of the same task of a group.
    """

    questions: str
    values: Mapping[str, tuple[float | None, ...]]
    clusters: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        return len(self.questions) // HASH_DIGITS

    def names(self) -> list[str]:
        """A name for each question. A question that is asked twice has two names."""
        seen: dict[str, int] = defaultdict(int)
        names = []
        for start in range(0, len(self.questions), HASH_DIGITS):
            question = self.questions[start : start + HASH_DIGITS]
            names.append(f"{question}/{seen[question]}")
            seen[question] += 1
        return names
