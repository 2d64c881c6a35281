"""The long way: build the whole model, then save it. Needs memory for all of it, once per target."""

from __future__ import annotations

import gc
import os
import stat
from pathlib import Path
from typing import Any

from models_db.domain import DType
from models_db.errors import SourceCorrupt
from models_db.sources import read_header
from worker.digest import FileDigest, digest_file
from worker.quantize.audit import coverage
from worker.quantize.skeleton import build_skeleton
from worker.quantize.target import Target


def write_whole(
    source: Path, target: Target, dtype: DType, device: str
) -> tuple[tuple[FileDigest, ...], dict[str, Any]]:
    """``from_pretrained`` + ``save_pretrained``: the files written, and the coverage audit.

    Raises SourceCorrupt naming a key that the model needs and the source lacks, and what the libraries raise.
    """
    import torch

    try:
        audit = _load_and_save(source, target, dtype, device)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return tuple(digest_file(path) for path in sorted(target.folder.iterdir())), audit


def _load_and_save(source: Path, target: Target, dtype: DType, device: str) -> dict[str, Any]:
    import torch

    skeleton = build_skeleton(source, target.scheme, dtype, device)
    model, loading = skeleton.cls.from_pretrained(
        source,
        quantization_config=skeleton.quantizer.quantization_config,
        dtype=getattr(torch, dtype.value),
        device_map={"": device},
        output_loading_info=True,
        use_safetensors=True,
        local_files_only=True,
    )
    refuse_missing(loading["missing_keys"])
    limit = target.scheme.max_shard_bytes
    # In the model's own layout: where weights were converted while loading, converting their codes back to the
    # source's layout fails (int8), or leaves a checkpoint that cannot be loaded any more (4 bits).
    model.save_pretrained(
        target.folder, save_original_format=False, **({} if limit is None else {"max_shard_size": limit})
    )
    for path in target.folder.iterdir():
        path.chmod(umask_mode())
    weights_bytes = sum(
        tensor.nbytes for path in target.folder.glob("*.safetensors") for tensor in read_header(path).tensors
    )
    return coverage(skeleton, model, _quantized(model), weights_bytes, loading["unexpected_keys"])


def _quantized(model: Any) -> dict[str, int]:
    """The number of values in each quantized parameter (its own shape is that of the packed codes)."""
    return {
        f"{name}.weight": module.in_features * module.out_features
        for name, module in model.named_modules()
        if hasattr(module, "source_cls")
    }


def refuse_missing(keys: Any) -> None:
    """Raise SourceCorrupt where the source lacks keys: transformers would fill them with random numbers."""
    if keys:
        names = sorted(keys)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise SourceCorrupt(f"the source lacks {', '.join(names[:3])}{more}")


def umask_mode() -> int:
    """The mode of a file created plainly: safetensors makes 0600, which nobody else can read."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return 0o666 & ~int(line.split()[1], 8)
    umask = os.umask(0o022)
    os.umask(umask)
    return stat.S_IMODE(0o666 & ~umask)
