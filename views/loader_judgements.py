"""What loaders make of checkpoints, as text and as rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from qbatch.core.measured.loader_judgement import LoaderJudgement
from qbatch.views.formats import printable, terminal_width
from qbatch.views.wrapped_text import wrap


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedCheckpoint:
    """What ``loader`` makes of the checkpoint in ``folder``: judged by rules, and ``tried`` if it was loaded."""

    folder: Path
    loader: str
    judged: LoaderJudgement
    tried: LoaderJudgement | None = None

    @property
    def shown(self) -> LoaderJudgement:
        """The result of trying it, if it was tried."""
        return self.tried or self.judged

    def to_json(self) -> dict[str, Any]:
        is_tried = self.tried is not None
        row = {"checkpoint": str(self.folder), "loader": self.loader, **self.shown.to_json(), "tried": is_tried}
        return row | {"judged": self.judged.to_json()} if is_tried else row


def judgement_text(judgements: Sequence[JudgedCheckpoint]) -> str:
    """Each checkpoint, and under it each loader with its verdict, reasons and advice."""
    lines: list[str] = []
    for folder, own in groupby(judgements, key=lambda judgement: judgement.folder):
        lines += [printable(str(folder)), *(line for judgement in own for line in _lines(judgement)), ""]
    return "\n".join(lines).rstrip()


def _lines(judgement: JudgedCheckpoint) -> Iterable[str]:
    shown = judgement.shown
    yield f"  {judgement.loader}: {shown.verdict} ({shown.version}, {shown.read_on})"
    texts = [*(shown.reasons or ()), *(f"→ {advice}" for advice in shown.advice or ())]
    for text in texts:
        yield from wrap(printable(text), terminal_width(), first="    ", indent="    ")
