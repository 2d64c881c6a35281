"""How far a training has come, kept on the storage, so that another attempt goes on from there."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from qbatch.core.filesystem import sync

log = logging.getLogger("qbatch.runner")

_FILE = "state.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """After ``steps`` steps: the KL of the first and of the last, the factors by name, and what the optimizer keeps."""

    steps: int
    first_kl: float | None
    last_kl: float | None
    factors: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptState:
    """The state in ``folder``, which is of one adapter, whoever trains it."""

    folder: Path

    def read(self) -> TrainingState | None:
        """The state; None if there is none that can be read. Only tensors and plain values are read, never code."""
        try:
            value = torch.load(self.folder / _FILE, map_location="cpu", weights_only=True)
            return TrainingState(**value)
        except FileNotFoundError:
            return None
        except (RuntimeError, EOFError, pickle.UnpicklingError, TypeError, ValueError) as error:
            log.warning("the training begins anew, since its earlier state cannot be read: %s", error)
            return None

    def write(self, state: TrainingState) -> None:
        """Replace it at once: whoever is killed meanwhile leaves the former one. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{_FILE}.{os.getpid()}"
        value = {field.name: getattr(state, field.name) for field in fields(state)}
        try:
            torch.save(value, partial)
            sync(partial)
            partial.replace(self.folder / _FILE)
        finally:
            partial.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
