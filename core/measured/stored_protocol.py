"""The protocol as it stands with a result."""

from __future__ import annotations

from dataclasses import dataclass

from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.stored_json import Stored, omitted_if_unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredProtocol(Stored):
    """The protocol of a measurement. ``stored`` has all of its fields; of those left out, ``quality`` and ``speed`` are
    true, ``why`` and ``energy`` false."""

    batch_size: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    eval_window: int | None = None
    eval_stride: int | None = None
    eval_max_windows: int | None = None
    eval_text_sha256: str | None = None
    quality: bool | None = omitted_if_unknown()
    speed: bool | None = omitted_if_unknown()
    why: bool | None = omitted_if_unknown()
    energy: bool | None = omitted_if_unknown()

    @property
    def has_answers(self) -> bool:
        """Whether the answer to each question of the tasks is stored with the result. 0.1.0 kept the scores alone."""
        return int(self.stored.get("tasks_version", 1)) > 1

    @property
    def parts(self) -> frozenset[MeasuredPart]:
        """What was asked for."""
        chosen = {
            MeasuredPart.QUALITY: self.quality is not False,
            MeasuredPart.SPEED: self.speed is not False,
            MeasuredPart.WHY: self.why is True,
            MeasuredPart.ENERGY: self.energy is True,
        }
        return frozenset({MeasuredPart.SIZE, *(part for part, is_asked in chosen.items() if is_asked)})
