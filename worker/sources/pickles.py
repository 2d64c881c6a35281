"""Convert pickled weights to safetensors, so that everything after this handles one format.

torch reads them with ``weights_only``: it rebuilds tensors and plain containers, and calls no function that a pickle
names.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qbatch.core.domain import content_hash
from qbatch.core.errors import JobError, SourceCorrupt, UnsafeSource, Unsupported
from qbatch.core.filesystem import move
from qbatch.core.lfs_pointer import refuse_lfs_pointer
from qbatch.core.sources import INDEX_NAME, SINGLE_NAME, pickle_files
from qbatch.worker.checkpoints.published import slug
from qbatch.worker.files.staging import storage_error
from qbatch.worker.models.load import translated
from qbatch.worker.quantizing.planning.layout import FileLayout, lay_out
from qbatch.worker.quantizing.planning.saving import Output
from qbatch.worker.quantizing.tensors.source_reader import TORCH_DTYPES
from qbatch.worker.sources.repository import Repository
from qbatch.worker.sources.source_cache import SourceCache

# Tied weights are written once per name. A larger total comes from a small file that was made to fill the disk.
_MOST_COPIES = 4
_ZIP_MAGIC = b"PK\x03\x04"
_NOT_WEIGHTS_ONLY = "Cannot use ``weights_only=True``"
_OPERAND = re.compile(r"Unsupported operand (\d+)")
_OPERANDS = frozenset(ord(opcode.code) for opcode in pickletools.opcodes)


def converted_entry(folder: Path, fingerprint: str) -> str:
    """The name of the cache entry for a converted model. It changes when the content of the model changes."""
    return f"{slug(folder.name)}--{content_hash({'fingerprint': fingerprint})[:16]}"


def convert(folder: Path, cache: SourceCache, entry: str, *, with_code: bool) -> None:
    """Convert the model in ``folder`` into the cache entry ``entry``, which the caller must be using and filling.

    Each pickle becomes one file, and only one is in memory at a time. Raises UnsafeSource for a pickle that would run
    code, SourceCorrupt for a broken one, Unsupported, DiskFull or StorageError.
    """
    try:
        _convert(folder, cache, entry, _listing(folder, with_code))
    except OSError as error:
        raise storage_error(error, "cannot convert pickles to safetensors") from error


def _convert(folder: Path, cache: SourceCache, entry: str, listing: Repository) -> None:
    pickles = pickle_files(folder)
    plans = [_plan(path, name) for path, name in zip(pickles, _names(len(pickles)), strict=True)]
    index = _index(plans) if len(plans) > 1 else None
    sidecars = listing.sidecars(folder)
    sizes = {name: listing.files[name] for name in sidecars} | {plan.name: plan.size for plan in plans}
    cache.reserve(entry, sizes | ({INDEX_NAME: len(index)} if index is not None else {}))
    target = cache.root / entry
    for name in sidecars:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    if index is not None:
        (target / INDEX_NAME).write_bytes(index)
    for path, plan in zip(pickles, plans, strict=True):
        _write(read_tensors(path), plan, target)


def _listing(folder: Path, with_code: bool) -> Repository:
    """The folder as a repository, to find out which files a model needs besides its weights."""
    paths = [Path(at, name) for at, _, names in os.walk(folder) for name in names]
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths if path.is_file()}
    return Repository(repo_id=folder.name, commit="", files=files, allow_pickle=True, with_code=with_code)


def _names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _plan(path: Path, name: str) -> FileLayout:
    tensors = read_tensors(path)
    outputs = [Output(name=key, dtype=t.dtype, shape=tuple(t.shape), content=b"") for key, t in tensors.items()]
    return lay_out(name, outputs)


def _index(plans: Sequence[FileLayout]) -> bytes:
    weight_map: dict[str, str] = {}
    for plan in plans:
        for name in plan.starts:
            if name in weight_map:
                raise SourceCorrupt(f"the tensor {name} is in two of the pickles")
            weight_map[name] = plan.name
    total_size = sum(output.nbytes for plan in plans for output in plan.outputs)
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}).encode()


def _write(tensors: Mapping[str, torch.Tensor], plan: FileLayout, folder: Path) -> None:
    """Write a file under a temporary name, and rename it when it is complete."""
    if tensors.keys() != plan.starts.keys():
        raise SourceCorrupt(f"the pickles changed while they were converted to {plan.name}")
    draft = folder / f"{plan.name}.part"
    with draft.open("wb") as file:
        file.write(plan.head)
        for name in sorted(plan.starts, key=plan.starts.__getitem__):
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    move(draft, folder / plan.name)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled state dict, on the CPU, memory-mapped if the format of the file permits.

    Raises UnsafeSource if ``weights_only`` refuses the file, Unsupported for tensors that safetensors cannot store, and
    SourceCorrupt if it is not a state dict.
    """
    refuse_lfs_pointer(path)
    state = _load(path)
    if not isinstance(state, dict) or not state:
        raise SourceCorrupt(f"{path.name} does not contain a state dict")
    tensors = {name: _checked(path, name, value) for name, value in state.items()}
    if sum(tensor.nbytes for tensor in tensors.values()) > _MOST_COPIES * path.stat().st_size:
        raise SourceCorrupt(f"{path.name} claims tensors that are much larger than the file")
    return tensors


def _load(path: Path) -> Any:
    is_zip = _is_zip(path)
    if is_zip:
        _refuse_compression(path)
    try:
        with translated(SourceCorrupt, f"cannot read {path.name}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
            except OSError as error:
                raise storage_error(error, f"cannot read {path.name}") from error
    except SourceCorrupt as error:
        raise (_refusal(path, error.__cause__) or error) from error.__cause__


def _refusal(path: Path, cause: BaseException | None) -> JobError | None:
    """UnsafeSource for a valid pickle that needs more than ``weights_only`` permits; None for a broken one."""
    text = str(cause)
    operand = _OPERAND.search(text)
    if (operand is not None and int(operand[1]) not in _OPERANDS) or "String is too long" in text:
        return None
    if isinstance(cause, pickle.UnpicklingError) or text.startswith(_NOT_WEIGHTS_ONLY):
        return UnsafeSource(f"{path.name} contains more than weights: torch refuses it with weights_only=True")
    return None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def _refuse_compression(path: Path) -> None:
    """Refuse compressed archives, which could expand to any size. torch never compresses."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise SourceCorrupt(f"{path.name} is not a complete archive: {error}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise SourceCorrupt(f"{path.name} is compressed, so torch did not write it")


def _checked(path: Path, name: Any, value: Any) -> torch.Tensor:
    if not isinstance(name, str) or name == "__metadata__" or not name.isprintable():
        raise SourceCorrupt(f"{path.name} has an entry whose name is not valid for a tensor")
    if not isinstance(value, torch.Tensor):
        raise SourceCorrupt(f"{path.name}: {name} is not a tensor but {type(value).__name__}")
    tensor = value.detach()
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise Unsupported(f"{path.name}: {name} is not a plain tensor")
    if tensor.dtype not in TORCH_DTYPES.values():
        raise Unsupported(f"{path.name}: {name} has the unsupported dtype {tensor.dtype}")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise SourceCorrupt(f"{path.name}: {name} claims more values than the file stores")
    return tensor
