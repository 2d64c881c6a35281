"""Sources that change while jobs read them."""

from __future__ import annotations

from tests.chaos.faults.base import ExposedFleet, Kind


def _rewrite(fleet: ExposedFleet) -> str | None:
    """Other weights in the very files of a model that a job is at: same names, sizes and headers."""
    running = [found for found in fleet.running() if found.source in fleet.sources]
    if not running:
        return None
    found = fleet.rng.choice(running)
    fleet.sources.rewrite(found.source)
    return f"{found.source.name}, j{found.job_id} {found.stage}"


KINDS: tuple[Kind, ...] = (Kind(name="weights rewritten", weight=4, is_kill=False, deal=_rewrite),)
