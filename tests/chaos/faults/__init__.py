"""What happens to a fleet: each fault hurts something real, and says what it hurt. A file for each subject."""

from __future__ import annotations

from tests.chaos.faults import clock, freezes, kills, message_faults, schema_upgrades, socket_faults, weights
from tests.chaos.faults.base import ExposedFleet, Kind

KINDS: tuple[Kind, ...] = (
    *kills.KINDS,
    *message_faults.KINDS,
    *freezes.KINDS,
    *socket_faults.KINDS,
    *schema_upgrades.KINDS,
    *clock.KINDS,
)
CHANGING_SOURCES: tuple[Kind, ...] = weights.KINDS
"""Only where the account knows of it: a job of a model that changed may fail."""

__all__ = ["CHANGING_SOURCES", "KINDS", "ExposedFleet", "Kind"]
