"""What is asked of the quantizer, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbatch.core.digest import FileDigest
from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.errors import JobError

Progress = Callable[[int, int, int], None]
"""Called with bytes read, bytes written, and the bytes of both that are planned in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One checkpoint to write: how to quantize, and the existing empty folder it goes to. ``trusted`` lets the source's
    own code run; ``beside_bytes`` is what will be put beside the weights later, and needs room too."""

    scheme: Scheme
    folder: Path
    trusted: bool = False
    beside_bytes: int = 0

    def __post_init__(self) -> None:
        if self.scheme.method is Method.NONE or self.scheme.compute_dtype is DType.AUTO:
            raise ValueError(f"not a resolved quantization scheme: {self.scheme}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A finished checkpoint: weights, index, config.json and (of a generative model) generation_config.json.

    ``audit`` says how much of the model really was quantized (JSON values only; docs/performance.md lists the keys).
    ``writer`` is "stream", or "whole" where the whole model had to be built.
    """

    target: Target
    quantize_s: float
    files: tuple[FileDigest, ...]
    audit: Mapping[str, Any]
    writer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A target that could not be written, and why. What is left in its folder is worthless."""

    target: Target
    error: JobError


@dataclass(frozen=True, slots=True, kw_only=True)
class Deferred:
    """A target that cannot be streamed, and why. Its folder is still empty."""

    target: Target
    reason: str


Outcome = Written | Refused | Deferred
