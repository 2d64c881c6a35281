"""The layout of the shared storage, and whether a published checkpoint is still as it was. Needs no SQLAlchemy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path

from qbatch.core.file_stat import Mounts, stat_file
from qbatch.core.manifest import MANIFEST, Manifest
from qbatch.core.recovery import ADAPTER_MARK
from qbatch.core.sources import DOCUMENTS

MODEL_CARD = "README.md"
"""The model card of a checkpoint. It changes with each measurement, and users may edit it, so it is neither in the
manifest nor part of the model."""
BASE_OUTPUTS = "base-logits"
"""The folder of baseline outputs, to which quantized models are compared. All databases on the storage share it."""


CHECKPOINTS = "checkpoints"
NAMELESS = "model"
"""The folder of models whose names have no ASCII letter or digit."""
ADOPTED = ".adopted"
"""The folder of marks that databases leave for checkpoints that another database made and that they use."""


class CheckpointState(StrEnum):
    """SOUND: no file has changed since its content was verified. UNVERIFIED: the files must be read to know.

    GONE: the checkpoint is missing or incomplete.
    """

    SOUND = "sound"
    UNVERIFIED = "unverified"
    GONE = "gone"


def checkpoint_state(storage: Path, path: str, versions: Mapping[str, str] | None) -> CheckpointState:
    """The state of the checkpoint at ``path`` within the storage, without reading its weights.

    ``versions`` maps each file to its state (``FileStat.version``) when it was last verified; None if that is unknown
    or too long ago.
    """
    folder = storage / path
    mounts = Mounts()
    try:
        manifest = Manifest.read(folder)
        if manifest is None:
            return CheckpointState.GONE
        stats = {name: stat_file(folder / name, mounts) for name in manifest.names}
        has_extra_files = bool(unpublished_files(folder, manifest.names))
    except OSError:
        return CheckpointState.GONE
    if any(stats[file.name].size != file.size for file in manifest.files):
        return CheckpointState.GONE
    now = {name: stat.version for name, stat in stats.items()}
    return CheckpointState.SOUND if versions == now and not has_extra_files else CheckpointState.UNVERIFIED


def missing_checkpoints(storage: Path, paths: Iterable[str]) -> set[str]:
    """The ``paths`` within the storage that have no folder. Empty if the storage cannot be seen from here."""
    return _looked_for(storage, paths)[1]


def present_checkpoints(storage: Path, paths: Iterable[str]) -> set[str]:
    """The ``paths`` within the storage that have a folder, as far as that can be seen from here."""
    return _looked_for(storage, paths)[0]


def broken_link(folder: Path) -> str | None:
    """The target of ``folder`` if this is a link to something that does not exist, such as a disk that is not mounted;
    else None. Raises OSError."""
    return str(folder.readlink()) if folder.is_symlink() and not folder.exists() else None


def _looked_for(storage: Path, paths: Iterable[str]) -> tuple[set[str], set[str]]:
    """The paths that exist and the paths that do not. A path that is in neither cannot be seen from here.

    Folders are listed, one for each model, instead of asked for one by one.
    """
    wanted: dict[str, set[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition("/")
        wanted.setdefault(parent, set()).add(name)
    present: set[str] = set()
    missing: set[str] = set()
    try:
        if not (storage / CHECKPOINTS).is_dir():
            return set(), set()
        for parent, names in wanted.items():
            there = _names(storage / parent)
            if there is not None:
                present |= {f"{parent}/{name}" for name in names & there}
                missing |= {f"{parent}/{name}" for name in names - there}
    except OSError:  # it does not answer, or may not be read: nothing is known of any of them
        return set(), set()
    return present, missing


def _names(folder: Path) -> set[str] | None:
    """The names in ``folder``; None if the folder cannot be seen from here."""
    try:
        return {entry.name for entry in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return None if broken_link(folder) is not None else set()


def base_path(path: str) -> str | None:
    """The path of the checkpoint to which the adapter at ``path`` belongs; None if there is no adapter at it."""
    base, mark, _ = path.rpartition(ADAPTER_MARK)
    return base if mark else None


def unpublished_files(folder: Path, published: Iterable[str]) -> list[str]:
    """Files that were added to a checkpoint and may change what is loaded: an adapter, another tokenizer, weights.

    ``published`` holds the names in the manifest. Raises OSError.
    """
    known = {MANIFEST, MODEL_CARD, *published}
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if str(path) not in known and not _is_harmless(path))


def _is_harmless(path: Path) -> bool:
    """Documents and hidden files: files of the file system itself, or files that others are still writing."""
    is_document = any(fnmatchcase(path.name, pattern) for pattern in DOCUMENTS)
    return is_document or any(part.startswith(".") or part == "__pycache__" for part in path.parts)
