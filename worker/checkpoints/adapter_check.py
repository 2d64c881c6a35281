"""Check that a published adapter fits the checkpoint beside it that it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from qbatch.core.adapter_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qbatch.core.errors import JobError
from qbatch.core.manifest import Manifest
from qbatch.core.sources import TensorInfo, read_header, read_headers, read_object
from qbatch.core.storage import base_path

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def adapter_problems(folder: Path) -> list[str]:
    """What is wrong with the adapter in ``folder``, one line each; empty if nothing is."""
    name = base_path(folder.name)
    base = folder.with_name(name) if name is not None else None
    manifest, own = Manifest.read(base) if base is not None else None, Manifest.read(folder)
    if base is None or manifest is None:
        return [f"the checkpoint that it belongs to is not beside it: {name or 'its folder names none'}"]
    if own is None or manifest.key != own.base_key:
        return [f"it belongs to another checkpoint than {base.name}"]
    try:
        rank = read_object(folder / ADAPTER_CONFIG).get("r")
        factors = {tensor.name: tensor for tensor in read_header(folder / ADAPTER_WEIGHTS).tensors}
        stored = {tensor.name: tensor for header in read_headers(base) for tensor in header.tensors}
    except JobError as error:
        return [str(error)]
    return [*_misshapen(factors, stored, rank)]


def _misshapen(factors: Mapping[str, TensorInfo], stored: Mapping[str, TensorInfo], rank: object) -> Iterator[str]:
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in factors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            yield f"{name} is no factor of a layer"
        else:
            layers.setdefault(match[1], {})[match[2]] = tensor.shape
    for layer, shapes in layers.items():
        down, up = shapes.get("A", ()), shapes.get("B", ())
        weight = stored.get(f"{layer}.weight")
        if weight is None:
            yield f"{layer} is not a layer of the checkpoint"
        elif len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
            yield f"{layer} has factors of the shapes {list(down)} and {list(up)}, and the rank is {rank}"
        elif weight.nbytes != -(-down[1] * up[0] // 2):  # two codes a byte
            yield f"{layer} has factors of another shape than its weight"
