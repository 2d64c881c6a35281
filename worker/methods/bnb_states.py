"""Checks bitsandbytes' packed quantization states: JSON, stored as a uint8 tensor with each weight's codes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from qbatch.core.sources import TensorInfo

_STATE = ".quant_state.bitsandbytes__"
# A quantization state is about 170 bytes of JSON.
_MAX_STATE_BYTES = 2**16


def is_state(name: str) -> bool:
    return _STATE in name


def state_problems(path: Path, tensor: TensorInfo, needed: torch.Tensor) -> list[str]:
    """Compare the packed quantization state ``tensor`` in the file ``path`` with the expected one, ``needed``. Returns
    one line per difference. Of the nested offset, which depends on the weight, only its presence is checked."""
    try:
        state = _read_state(path, tensor)
    except (ValueError, RecursionError):
        return [f"{tensor.name} does not contain a quantization state"]
    expected = json.loads(bytes(needed.tolist()))
    offset = state.pop("nested_offset", None)
    wrong = [
        f"{tensor.name} has {key} {state.get(key)}; by the config it should be {expected.get(key)}"
        for key in sorted(state.keys() | expected.keys() - {"nested_offset"})
        if state.get(key) != expected.get(key)
    ]
    is_number = isinstance(offset, float) and math.isfinite(offset)
    if is_number == ("nested_offset" in expected):
        return wrong
    return [*wrong, f"{tensor.name} has the unexpected nested_offset {offset}"]


def _read_state(path: Path, tensor: TensorInfo) -> dict[str, Any]:
    """The state as a mapping. Raises ValueError if the tensor is not a JSON object."""
    if tensor.dtype != "U8" or tensor.nbytes > _MAX_STATE_BYTES:
        raise ValueError(tensor.dtype)
    with path.open("rb") as file:
        file.seek(tensor.start)
        state = json.loads(file.read(tensor.nbytes).decode())
    if not isinstance(state, dict):
        raise ValueError(state)
    return state
