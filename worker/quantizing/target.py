"""The quantizer's input and its possible results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbatch.core.digest import FileDigest
from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.errors import JobError

Progress = Callable[[int, int, int], None]
"""Called with the bytes read, the bytes written, and the total planned for both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One checkpoint to write: the scheme, and an existing empty folder for the files.

    ``trusted`` lets the source's own code run. ``beside_bytes`` is the size of files that will be added to the folder
    later, and need disk space too. Raises ValueError if the scheme does not quantize or its compute dtype is "auto".
    """

    scheme: Scheme
    folder: Path
    trusted: bool = False
    beside_bytes: int = 0

    def __post_init__(self) -> None:
        if self.scheme.method is Method.NONE or self.scheme.compute_dtype is DType.AUTO:
            raise ValueError(f"not a resolved quantization scheme: {self.scheme}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A finished checkpoint: weights, index, config.json and, for a generative model, generation_config.json.

    ``audit`` says how much of the model was actually quantized (JSON values only; docs/performance.md lists the keys).
    ``writer`` is "stream", or "whole" if the whole model had to be built.
    """

    target: Target
    quantize_s: float
    files: tuple[FileDigest, ...]
    audit: Mapping[str, Any]
    writer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A target that could not be written, and why. Files left in its folder are not usable."""

    target: Target
    error: JobError


@dataclass(frozen=True, slots=True, kw_only=True)
class Deferred:
    """A target that cannot be streamed and must be built as a whole model, and why. Its folder is still empty."""

    target: Target
    reason: str


Outcome = Written | Refused | Deferred
