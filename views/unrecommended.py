"""Which checkpoints ``compare`` does not recommend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbatch.core.measured.result_row import ResultRow
from qbatch.views.comparison import Preference
from qbatch.views.groups import models_of
from qbatch.views.recommend import lacks_a_figure, quality_bounds_for, recommend
from qbatch.views.scheme import show_scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Unrecommended:
    """``paths`` are of the checkpoints that are not recommended. ``remarks``: a line for each model."""

    paths: tuple[str, ...]
    remarks: tuple[str, ...]


def unrecommended(parts: Iterable[Sequence[ResultRow]], preference: Preference) -> Unrecommended:
    """The checkpoints of rows that were measured beside a recommended one, and are recommended nowhere among them all.

    ``parts``: each has all rows of its models. Of rows among which none is recommended, all are kept, and so is what
    was not measured. Where the baseline is recommended, or a checkpoint that is gone, all are kept too: without them
    nothing of the model would be left.
    """
    kept: set[str] = set()
    others: set[str] = set()
    remarks: list[str] = []
    for model in (model for rows in parts for model in models_of(rows)):
        for group in model.groups:
            made = [row for row in group.rows if row.checkpoint_path is not None]
            quantized = {str(row.checkpoint_path) for row in made}
            ship = recommend(group, preference).ship
            if ship is None or ship.checkpoint_path is None:
                kept |= quantized
                remarks.append(f"{model.name}: {_why_all(ship)}, so all of it is kept")
                continue
            kept.add(ship.checkpoint_path)
            bounds = quality_bounds_for(group, preference)
            kept |= {str(row.checkpoint_path) for row in made if lacks_a_figure(row, bounds, preference)}
            others |= quantized
            remarks.append(f"{model.name}: {show_scheme(ship)} ({ship.job_id}) is recommended")
    return Unrecommended(paths=tuple(sorted(others - kept)), remarks=tuple(dict.fromkeys(remarks)))


def _why_all(ship: ResultRow | None) -> str:
    if ship is None:
        return "nothing is recommended"
    if ship.is_baseline:
        return f"the baseline ({ship.job_id}) is recommended, of which there is no checkpoint"
    return f"{show_scheme(ship)} ({ship.job_id}) is recommended, and its checkpoint is gone"
