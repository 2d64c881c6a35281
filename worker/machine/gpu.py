"""The NVIDIA GPUs of this machine, through NVML: no CUDA context, no torch."""

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
    """One GPU. ``memory_bytes`` is its total memory; ``uuid`` pins a process to it wherever indices move."""

    index: int
    uuid: str
    name: str
    memory_bytes: int


def installed_gpus() -> tuple[Gpu, ...]:
    """Every GPU that the driver shows; none without a driver."""
    try:
        with _nvml():
            gpus = [_describe(index) for index in range(pynvml.nvmlDeviceGetCount())]
            return tuple(gpu for gpu in gpus if gpu is not None)
    except pynvml.NVMLError:
        return ()


def _describe(index: int) -> Gpu | None:
    """None for one that does not answer: it must not hide the others."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return Gpu(
            index=index,
            uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
            name=_text(pynvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        )
    except pynvml.NVMLError as error:
        log.warning("GPU %s does not answer (%s); it is left out", index, error)
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@contextmanager
def _nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(installed: Sequence[Gpu], environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves (as Slurm sets it), in its order; all of them where it is unset.

    As CUDA does, stops at the first entry that names no GPU.
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
    # A second worker of the same GPU would wait for the first's lease for ever.
    return tuple(dict.fromkeys(gpus))


def choose_gpus(wanted: str, visible: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """``all``, or indices among ``visible`` and UUIDs, separated by commas.

    Raises NoSuchDevice, naming what is missing, and where there is no GPU at all.
    """
    if not visible:
        raise NoSuchDevice("this machine has no NVIDIA GPU that is visible here; --cpu starts a CPU worker")
    if wanted == "all":
        return tuple(visible)
    chosen: list[Gpu] = []
    for name in wanted.split(","):
        gpu = _by_position(visible, name.strip()) or _find(visible, name.strip(), by_index=False)
        if gpu is None:
            raise NoSuchDevice(f"no GPU {name.strip()!r} here; visible are {', '.join(g.uuid for g in visible)}")
        chosen.append(gpu)
    return _each_once(chosen)


def _by_position(visible: Sequence[Gpu], name: str) -> Gpu | None:
    return visible[int(name)] if name.isdecimal() and int(name) < len(visible) else None


def _find(gpus: Sequence[Gpu], name: str, *, by_index: bool = True) -> Gpu | None:
    """A GPU by index, or by its UUID or a beginning of it that fits no other, as CUDA takes it."""
    if by_index and name.isdecimal():
        return next((gpu for gpu in gpus if gpu.index == int(name)), None)
    if not name.startswith("GPU-"):
        return None
    matches = [gpu for gpu in gpus if gpu.uuid.startswith(name)]
    return matches[0] if len(matches) == 1 else None
