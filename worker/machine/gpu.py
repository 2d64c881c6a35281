"""The NVIDIA GPUs of this machine, found through NVML without a CUDA context and without torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pynvml

from qbatch.core.errors import NoSuchDevice

log = logging.getLogger("qbatch.worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU. ``memory_bytes`` is its total memory. ``uuid`` identifies it even if indices change."""

    index: int
    uuid: str
    name: str
    memory_bytes: int


def installed_gpus() -> tuple[Gpu, ...]:
    """All GPUs that the driver lists; empty without a driver."""
    try:
        with nvml():
            gpus = [_describe(index) for index in range(pynvml.nvmlDeviceGetCount())]
            return tuple(gpu for gpu in gpus if gpu is not None)
    except pynvml.NVMLError:
        return ()


def _describe(index: int) -> Gpu | None:
    """Describe a GPU. None if it does not answer, so that one faulty GPU does not hide the others."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return Gpu(
            index=index,
            uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
            name=_text(pynvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        )
    except pynvml.NVMLError as error:
        log.warning("ignoring GPU %s, which does not answer: %s", index, error)
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@contextmanager
def nvml() -> Iterator[None]:
    """A context in which the driver can be asked. Raises NVMLError without a driver."""
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(installed: Sequence[Gpu], environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The GPUs listed in CUDA_VISIBLE_DEVICES (which Slurm sets), in that order; all of them if it is not set.

    Like CUDA, stops at the first entry that is not a GPU.
    """
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return tuple(installed)
    visible: list[Gpu] = []
    for name in listed.split(","):
        gpu = _find(installed, name.strip())
        if gpu is None:
            break
        visible.append(gpu)
    return _each_once(visible)


def _each_once(gpus: Iterable[Gpu]) -> tuple[Gpu, ...]:
    # A second worker on the same GPU would wait for the lease of the first for ever.
    return tuple(dict.fromkeys(gpus))


def choose_gpus(wanted: str, visible: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Choose GPUs by ``all``, or by indices among ``visible`` and UUIDs, separated by commas.

    Raises NoSuchDevice if one of them does not exist, or if there is no GPU at all.
    """
    if not visible:
        raise NoSuchDevice("no NVIDIA GPU is visible on this machine; use --cpu to start a CPU worker")
    if wanted == "all":
        return tuple(visible)
    chosen: list[Gpu] = []
    for name in wanted.split(","):
        gpu = _by_position(visible, name.strip()) or _find(visible, name.strip(), by_index=False)
        if gpu is None:
            raise NoSuchDevice(
                f"there is no GPU {name.strip()!r}; the visible GPUs are {', '.join(g.uuid for g in visible)}"
            )
        chosen.append(gpu)
    return _each_once(chosen)


def _by_position(visible: Sequence[Gpu], name: str) -> Gpu | None:
    return visible[int(name)] if name.isdecimal() and int(name) < len(visible) else None


def _find(gpus: Sequence[Gpu], name: str, *, by_index: bool = True) -> Gpu | None:
    """Find a GPU by index, UUID, or unique prefix of a UUID, as CUDA does."""
    if by_index and name.isdecimal():
        return next((gpu for gpu in gpus if gpu.index == int(name)), None)
    if not name.startswith("GPU-"):
        return None
    matches = [gpu for gpu in gpus if gpu.uuid.startswith(name)]
    return matches[0] if len(matches) == 1 else None
