"""The models of a bundle that are loaded: one at a time, or together where the device holds them.

One that was tried before it was published may be there already: then it is the first that is measured.

A host's memory that runs out ends the process, and other programs use it too, so at most half of it is planned with. A
GPU belongs to one worker, and running out of its memory is an error that can be handled.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from qbatch.core.byte_units import GIB
from qbatch.worker.machine.host_memory import available_memory

if TYPE_CHECKING:
    from qbatch.worker.models.load import LoadedModel

log = logging.getLogger("qbatch.runner")

_SHARE_OF_HOST = 0.5
_SHARE_OF_GPU = 0.9
_GPU_RESERVE_BYTES = GIB
# What CUDA, its libraries and the allocator take in another process, besides a model.
_PROCESS_BYTES = 2 * GIB

Jobs = tuple[int, ...]
"""A model by the ids of its jobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """``held_bytes``: what a model takes while it is loaded. ``working_bytes``: what measuring it took besides."""

    held_bytes: int
    working_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshModel:
    """A model that was just loaded, and what this process used on the device before and after that."""

    loaded: LoadedModel
    before_bytes: int
    after_bytes: int


class LoadedModels:
    """Loads and unloads models on ``device``. At first one at a time: each is alone when it is loaded."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._loaded: dict[Jobs, FreshModel] = {}
        self._footprints: dict[Jobs, Footprint] = {}
        self.are_together = False

    def get(self, jobs: Jobs) -> LoadedModel | None:
        held = self._loaded.get(jobs)
        return None if held is None else held.loaded

    def add(self, jobs: Jobs, load: Callable[[], LoadedModel]) -> LoadedModel:
        """Load a model, and unless they are kept together, unload all others first."""
        if not self.are_together:
            self.unload()
        self._loaded[jobs] = load_fresh(self._device, load)
        return self._loaded[jobs].loaded

    def hold(self, jobs: Jobs, fresh: FreshModel) -> None:
        """Hold a model that somebody else has loaded, until another one is loaded here."""
        self._loaded[jobs] = fresh

    @property
    def holds_any(self) -> bool:
        return bool(self._loaded)

    def make_room(self, needed_bytes: int) -> None:
        """Before somebody else loads a model that takes ``needed_bytes``: unload those here unless it fits beside."""
        if needed_bytes > usable_bytes(self._device):
            self._loaded.clear()
        free_device_memory()

    def note_peak(self, jobs: Jobs, *, weights_bytes: int, peak_bytes: int) -> None:
        """Note the peak of the process when the model was measured alone."""
        held = self._loaded[jobs]
        # Weights that are mapped from a file are not all resident yet when the model has been loaded.
        held_bytes = max(held.after_bytes - held.before_bytes, weights_bytes)
        working_bytes = max(0, peak_bytes - held.before_bytes - held_bytes)
        self._footprints[jobs] = Footprint(held_bytes=held_bytes, working_bytes=working_bytes)

    def have_room_for_copies(self) -> bool:
        """Whether another process can load the same models while any of them is measured here."""
        free_device_memory()  # what this process's allocator keeps is of no use to another one
        held = [self._footprints[jobs] for jobs in self._loaded]
        copies_bytes = sum(one.held_bytes for one in held) + _PROCESS_BYTES
        return copies_bytes + max(one.working_bytes for one in held) <= usable_bytes(self._device)

    def keep_together(self, models: Collection[Jobs]) -> None:
        """From now on keep the loaded models, if all of ``models`` are predicted to fit together."""
        footprints = [self._footprints[jobs] for jobs in models if jobs in self._footprints]
        if len(models) < 2 or len(footprints) < len(models):
            return
        for jobs in self._loaded.keys() - set(models):  # one that failed
            del self._loaded[jobs]
        self.are_together = fit_together(footprints, self._free_bytes())
        log.info("%d models are %s", len(models), "kept loaded together" if self.are_together else "loaded in turns")

    def separate(self) -> None:
        """Unload all models, and from now on load one at a time."""
        self.are_together = False
        self.unload()

    def unload(self) -> None:
        self._loaded.clear()
        free_device_memory()

    def _free_bytes(self) -> int:
        """What may be planned with, including what the loaded models take now, since they are among those planned."""
        return usable_bytes(self._device) + sum(self._footprints[jobs].held_bytes for jobs in self._loaded)


def load_fresh(device: str, load: Callable[[], LoadedModel]) -> FreshModel:
    before_bytes = used_bytes(device)
    loaded = load()
    return FreshModel(loaded=loaded, before_bytes=before_bytes, after_bytes=used_bytes(device))


def fit_together(footprints: Collection[Footprint], free_bytes: int) -> bool:
    """Whether all models fit in ``free_bytes`` while any one of them is measured."""
    held_bytes = sum(one.held_bytes for one in footprints)
    return held_bytes + max(one.working_bytes for one in footprints) <= free_bytes


def used_bytes(device: str) -> int:
    """The bytes that this process uses on the device: of torch's allocator, or resident on the host."""
    if not device.startswith("cuda"):
        return int(psutil.Process().memory_info().rss)
    import torch

    return int(torch.cuda.memory_allocated(device))


def usable_bytes(device: str) -> int:
    """The further bytes on the device that may be planned with."""
    if not device.startswith("cuda"):
        return int(_SHARE_OF_HOST * available_memory())
    import torch

    free_bytes, _ = torch.cuda.mem_get_info(device)
    unused_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_SHARE_OF_GPU * (free_bytes + unused_bytes)) - _GPU_RESERVE_BYTES


def free_device_memory() -> None:
    """Release the memory of models that nothing refers to, on the device and on the host."""
    gc.collect()
    # glibc keeps freed memory, which would count as the next model's max_ram. Other C libraries have no malloc_trim.
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        # Each thread that has multiplied keeps a workspace of cuBLAS, autograd's too, which would count as the next
        # model's. torch has no public function for that.
        if clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):
            clear()
        torch.cuda.empty_cache()
