"""Refuses models whose weights hold NaN or infinity: no figure of them means anything, quantized or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qbatch.core.errors import SourceCorrupt


def refuse_not_finite(names: Sequence[str]) -> None:
    """Raise SourceCorrupt if there are ``names`` of tensors that hold NaN or infinity."""
    if names:
        tensors = "tensor holds" if len(names) == 1 else "tensors hold"
        raise SourceCorrupt(f"{len(names)} {tensors} NaN or infinity; the first is {names[0]}")


def refuse_model_not_finite(model: Any) -> None:
    """Raise SourceCorrupt if a tensor of the loaded ``model`` holds NaN or infinity."""
    from qbatch.worker.quantizing.planning.audit import is_finite

    refuse_not_finite([name for name, tensor in sorted(model.state_dict().items()) if not is_finite(tensor)])
