"""Check that the libraries qbatch needs are installed, recent enough, and work."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from textwrap import indent
from typing import Any

from qbatch.core.methods.bnb import TRIAL
from qbatch.core.methods.registry import is_installed, optional_libraries, required_libraries
from qbatch.views.checks import Check, State, check
from qbatch.views.units import show_bytes

_PACKAGES = ("torch", "transformers", *required_libraries(), "accelerate", "celery", "redis", "sqlalchemy")
# The relative error of normally distributed weights: about twice what a 4-bit method causes.
_MOST_TRIAL_ERROR = 0.2
_TRIAL = f"""
import json, torch, transformers
errors = {{}}
for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
{indent(TRIAL.strip(), "    ")}
    errors[device] = float((restored - weight).norm() / weight.norm())
print(json.dumps(errors))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleGpu:
    """A GPU that NVML lists."""

    name: str
    memory_bytes: int


def versions() -> Iterable[Check]:
    """Check versions by the packages' metadata, without importing them."""
    yield check("python", State.OK, platform.python_version())
    floors = _floors()
    if floors is None:
        yield check("qbatch", State.NOTE, "not installed as a package, so the versions that it needs are unknown")
    for name in _PACKAGES:
        yield _version(name, (floors or {}).get(name))
    for name, extra in optional_libraries().items():
        if is_installed(name):
            yield _version(name, (_floors(extra) or {}).get(name))
        else:
            yield check(name, State.NOTE, f"is not installed; its methods need it: pip install 'qbatch[{extra}]'")


def _floors(extra: str = "") -> Mapping[str, Any] | None:
    """The version range that qbatch requires of each package, including those of ``extra``.

    None if qbatch is not installed as a package but runs from a source tree.
    """
    from packaging.requirements import Requirement

    try:
        listed = metadata.requires("qbatch") or []
    except metadata.PackageNotFoundError:
        return None
    wanted = (Requirement(text) for text in listed)
    return {
        item.name.lower(): item.specifier
        for item in wanted
        if item.marker is None or item.marker.evaluate({"extra": extra})
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _version(name: str, wanted: Any) -> Check:
    installed = _installed(name)
    if installed is None:
        return check(name, State.WRONG, "is not installed")
    if wanted is not None and not wanted.contains(installed, prereleases=True):
        return check(name, State.WRONG, f"{installed}; qbatch needs {wanted}")
    return check(name, State.OK, installed)


def cuda(gpus: Sequence[VisibleGpu]) -> Check:
    """Check whether the installed torch can use the GPUs that NVML lists."""
    if not gpus:
        return check("gpu", State.NOTE, "NVML lists no NVIDIA GPU; jobs run on the CPU")
    shown = ", ".join(f"{gpu.name} ({show_bytes(gpu.memory_bytes)})" for gpu in gpus)
    if (_installed("torch") or "").endswith("+cpu"):
        return check("gpu", State.WRONG, f"{shown}; but the installed torch is built without CUDA")
    return check("gpu", State.OK, shown)


def examine_libraries() -> Iterable[Check]:
    """Check that the libraries can be imported and quantize a weight. Takes as long as importing them."""
    # In a separate process, since a broken CUDA library can crash the process that imports it.
    done = subprocess.run([sys.executable, "-P", "-c", _TRIAL], capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not answers:
        last = (done.stderr.strip().splitlines() or ["no error output"])[-1]
        yield check("libraries", State.WRONG, f"cannot quantize a weight (exit code {done.returncode}): {last}")
        return
    for device, error in json.loads(answers[-1]).items():
        state = State.OK if error < _MOST_TRIAL_ERROR else State.WRONG
        yield check("libraries", state, f"a weight quantized to 4 bits on {device} is restored to within {error:.1%}")
