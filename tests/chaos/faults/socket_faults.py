"""Folders of sockets that are cleaned away under those who listen there."""

from __future__ import annotations

import shutil

from tests.chaos.faults.base import ExposedFleet, Kind


def _folder(fleet: ExposedFleet) -> str | None:
    """That of the embedded Redis, or that of a worker's forkserver."""
    place = fleet.settings.socket_dir
    folders = sorted(place.parent.glob(f"{place.name}*"))
    if not folders:
        return None
    folder = fleet.rng.choice(folders)
    shutil.rmtree(folder, ignore_errors=True)  # its owner may be about to leave, and clean up too
    return folder.name


KINDS: tuple[Kind, ...] = (Kind(name="socket folder removed", weight=5, is_kill=False, deal=_folder),)
