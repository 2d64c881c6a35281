"""What a report is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qbatch.models_db.job_record import WholeJob
from qbatch.views.comparison import Preference
from qbatch.views.groups import ModelRows, models_of
from qbatch.views.report.judged_group import JudgedGroup, judged_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedBatches:
    """The batches as ``list_batches`` has them, their jobs, and when and by which qbatch they were looked up."""

    batches: Sequence[Mapping[str, Any]]
    jobs: Sequence[WholeJob]
    made_at: str
    version: str

    @property
    def models(self) -> list[ModelRows]:
        return models_of([job.row for job in self.jobs])

    def judged(self, preference: Preference) -> list[JudgedGroup]:
        return judged_groups(self.models, preference)
