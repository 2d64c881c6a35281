"""How full and how busy a worker's device is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLoad:
    """Memory in use by whatever process, and the share of the last moment in which the device worked, from 0 to 1. None
    where the driver does not tell."""

    used_bytes: int | None = None
    busy_share: float | None = None
