"""Model names, and the safetensors headers and file lists of models. Needs no torch."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qbatch.core.control_characters import is_unicode
from qbatch.core.domain import DType, SourceRef
from qbatch.core.errors import SourceCorrupt, SourceNotFound, StorageError, UnsafeSource, UsageError
from qbatch.core.folder_hint import where_the_model_is
from qbatch.core.kinds import FLOAT_NAMES
from qbatch.core.lfs_pointer import refuse_lfs_pointer

# Longer headers are refused before they are read. This is enough for a quarter of a million tensors. Hostile JSON takes
# 25 times its size in memory, so the limit of safetensors itself, 100 MB, would cost 2.4 GB.
MAX_HEADER_BYTES = 2**25
# No size or offset of a real file is larger; Python integers are unbounded.
_MAX_SIZE = 2**63 - 1
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLE_NAME = "pytorch_model.bin"
# Files next to the weights that are part of a model: its tokenizer, generation defaults, templates.
SIDECARS = (
    "*.json", "*.txt", "*.model", "tokenizer.model.*", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
DOCUMENTS = ("*.md", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in FLOAT_NAMES.items()}
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,249}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of a safetensors file; ``start`` and ``end`` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked safetensors header: every offset is within the file, sizes match shapes, and tensors do not overlap."""

    path: Path
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    size: int


def bits_of(dtype: str) -> int:
    """The bits of a value of a dtype, as a header names it."""
    return _BITS[dtype]


def parse_source(text: str) -> SourceRef:
    """Parse ``hub/id@revision`` or the path of a folder.

    Text that starts with ``/``, ``.`` or ``~``, has more than one slash, or is an existing folder, is a path. A folder
    need not exist. Raises UsageError if the text is neither.
    """
    if not text or "\0" in text:
        raise UsageError(f"{text!r} is not the name of a model")
    if looks_like_path(text) or _is_folder(text):
        return SourceRef(name=text, location=str(_absolute(text)), is_folder=True)
    name, at, revision = text.partition("@")
    if _is_folder(name):
        raise UsageError(f"{text!r}: {name!r} is a folder, and a folder has no revisions")
    if not is_hub_id(name):
        raise UsageError(f"{text!r} is neither a folder nor a hub id")
    if at and not is_revision(revision):
        raise UsageError(f"{text!r}: {revision!r} is not a valid revision")
    return SourceRef(name=name, location=name, revision=revision or None)


def is_hub_id(text: str) -> bool:
    # The hub allows neither ".." nor "--" in names.
    return bool(_HUB_ID.fullmatch(text)) and ".." not in text and "--" not in text


def is_revision(text: str) -> bool:
    return bool(_REVISION.fullmatch(text)) and ".." not in text


def looks_like_path(text: str) -> bool:
    return text.startswith(("/", ".", "~")) or text.partition("@")[0].count("/") > 1


def _is_folder(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_dir()
    except OSError:  # the name is too long, or a parent folder is not accessible: not a folder that we could use
        return False


def _absolute(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(f"{text!r}: there is no such user") from error


@contextmanager
def storage_errors() -> Iterator[None]:
    """Translate OSError into StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}") from error


@storage_errors()
def read_header(path: Path) -> Header:
    """Read and check a safetensors header.

    Raises SourceCorrupt, before allocating memory for a bad header, or StorageError if the file cannot be read.
    """
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix, first = file.read(8), file.read(1)
        if len(prefix) < 8:
            raise SourceCorrupt(f"{path.name} is not a safetensors file: it has {size} bytes")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise SourceCorrupt(f"{path.name} {_why_too_long(length, first, size)}")
        file.seek(8)
        raw = file.read(length)
    try:
        # Decoded here, because json.loads would accept UTF-16 bytes too.
        entries = json.loads(raw.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SourceCorrupt(
            f"{path.name} is not a safetensors file, or a damaged one: its header is not JSON"
        ) from error
    if not isinstance(entries, dict):
        raise SourceCorrupt(f"{path.name} is not a safetensors file: its header is not a JSON object")
    return check_header(path, entries, data_start=8 + length, size=size)


def _why_too_long(length: int, first: bytes, size: int) -> str:
    """What is wrong with a file of ``size`` bytes whose header would have ``length``, beginning with ``first``."""
    if first not in (b"{", b""):
        return "is not a safetensors file"
    if length > size - 8:
        return f"is truncated: it has {size} bytes, and its header alone {length}"
    return f"has a header of {length} bytes, over the limit of {MAX_HEADER_BYTES}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON, although Python accepts it")


def check_header(path: Path, entries: Mapping[str, Any], *, data_start: int, size: int) -> Header:
    """Check the parsed header ``entries`` of a file of ``size`` bytes whose tensors begin at byte ``data_start``.

    Raises SourceCorrupt.
    """
    metadata = entries.get("__metadata__")
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SourceCorrupt(f"{path.name}: __metadata__ is not an object of strings")
    tensors = tuple(
        _tensor(path.name, name, entry, data_start, size) for name, entry in entries.items() if name != "__metadata__"
    )
    _check_layout(path.name, tensors, data_start, size)
    return Header(path=path, tensors=tensors, metadata=metadata, size=size)


def _tensor(file_name: str, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    where = f"{file_name}: tensor {_shorten(name)}"
    if not is_unicode(name):
        raise SourceCorrupt(f"{where} has a name that is not valid Unicode")
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise SourceCorrupt(f"{where} lacks a dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise SourceCorrupt(f"{where} has a malformed dtype")
    if dtype not in _BITS:
        raise SourceCorrupt(f"{where} has the unknown dtype {_shorten(dtype)}")
    if not _all_sizes(shape) or not _all_sizes(offsets) or len(offsets) != 2:
        raise SourceCorrupt(f"{where} has a malformed shape or offsets")
    start, end = offsets
    if not start <= end <= size - data_start:
        raise SourceCorrupt(
            f"{where} ends at byte {data_start + end} of a file of {size}: it is truncated, or the offsets are wrong"
        )
    if (end - start) * 8 != _numel(shape) * _BITS[dtype]:
        raise SourceCorrupt(f"{where}: {end - start} bytes do not match {dtype} {_shorten(shape)}")
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), start=data_start + start, end=data_start + end)


def _all_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MAX_SIZE for n in value
    )


def _numel(shape: list[int]) -> int:
    """The product of ``shape``. Stops once it exceeds any file's size, as a million dimensions would take hours."""
    numel = 1
    for size in shape:
        numel *= size
        if numel > _MAX_SIZE:
            return numel
    return numel


def _shorten(value: str | list[int]) -> str:
    """The repr of ``value``, shortened so that a file cannot make an error message arbitrarily long."""
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


def _check_layout(file_name: str, tensors: tuple[TensorInfo, ...], data_start: int, size: int) -> None:
    position = data_start
    for tensor in sorted(tensors, key=lambda t: (t.start, t.end)):
        if tensor.start != position:
            raise SourceCorrupt(
                f"{file_name}: tensor {_shorten(tensor.name)} starts at byte {tensor.start}, not at {position}"
            )
        position = tensor.end
    if position != size:
        raise SourceCorrupt(f"{file_name}: the last {size - position} bytes belong to no tensor")


@storage_errors()
def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of the model, in order: the single file, or else those listed in the index.

    If both exist, transformers loads the single file, and so does qbatch.

    Raises SourceNotFound if the folder or config.json is missing, UnsafeSource if there are only pickles,
    SourceCorrupt if the index is malformed or lists a file that is missing or in another folder, and StorageError if
    the folder cannot be read.
    """
    if not folder.is_dir():
        raise SourceNotFound(f"no such folder: {folder}")
    require_config(folder)
    if (folder / SINGLE_NAME).is_file():
        return (folder / SINGLE_NAME,)
    index = folder / INDEX_NAME
    if index.is_file():
        return tuple(_present(folder, name, index) for name in indexed_files(index))
    pickles = [path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES]
    if models := sorted(path for path in pickles if path.is_file() and not path.name.startswith("adapter_")):
        refuse_lfs_pointer(models[0])
        raise UnsafeSource(f"{folder} has only pickles, no safetensors; use --allow-pickle to convert them")
    raise SourceNotFound(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}{where_the_model_is(folder)}")


def require_config(folder: Path) -> None:
    """Raise SourceNotFound if there is no config.json, with what is there instead. Raises OSError."""
    if not (folder / "config.json").is_file():
        raise SourceNotFound(f"{folder} has no config.json{where_the_model_is(folder)}")


@storage_errors()
def is_pickled(folder: Path) -> bool:
    """Whether the model has its weights only as pickles. If there are safetensors too, those are loaded."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return bool(names & {PICKLE_NAME, PICKLE_INDEX_NAME}) and not names & {SINGLE_NAME, INDEX_NAME}


@storage_errors()
def pickle_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of a model that ``is_pickled``, in order. Raises SourceCorrupt or StorageError."""
    if (folder / PICKLE_NAME).is_file():
        return (folder / PICKLE_NAME,)
    index = folder / PICKLE_INDEX_NAME
    return tuple(_present(folder, name, index) for name in indexed_files(index, suffix=".bin"))


def indexed_files(index: Path, *, suffix: str = ".safetensors") -> list[str]:
    """The names of the weight files that an index lists, sorted. Raises SourceCorrupt."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceCorrupt(f"{index.name} is not an index of weights")
    for name in weight_map.values():
        if not isinstance(name, str):
            raise SourceCorrupt(f"{index.name} is not an index of weights")
        if "/" in name or "\0" in name or not name.endswith(suffix) or not is_unicode(name):
            raise SourceCorrupt(f"{index.name} lists {_shorten(name)}, which is not a {suffix} file of this folder")
    return sorted(set(weight_map.values()))


def _present(folder: Path, name: str, index: Path) -> Path:
    if not (folder / name).is_file():
        raise SourceCorrupt(f"{index.name} lists {_shorten(name)}, which is missing")
    return folder / name


@storage_errors()
def read_config(folder: Path) -> Mapping[str, Any]:
    """config.json as a mapping. Raises SourceNotFound, SourceCorrupt or StorageError."""
    require_config(folder)
    return read_object(folder / "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most MAX_HEADER_BYTES. Raises SourceCorrupt."""
    refuse_lfs_pointer(path)
    with path.open("rb") as file:
        raw = file.read(MAX_HEADER_BYTES)
    try:
        value = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise SourceCorrupt(f"{path} cannot be read as JSON") from error
    if not isinstance(value, dict):
        raise SourceCorrupt(f"{path} is not a JSON object")
    return value


def read_headers(folder: Path) -> tuple[Header, ...]:
    """The checked headers of all weight files. Raises what ``weight_files`` and ``read_header`` raise."""
    return tuple(read_header(path) for path in weight_files(folder))


def source_dtype(headers: tuple[Header, ...]) -> DType:
    """The dtype in which most floating-point bytes are stored; FLOAT32 if there is no float32, float16 or bfloat16."""
    totals: dict[DType, int] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.dtype in _DTYPES:
                dtype = _DTYPES[tensor.dtype]
                totals[dtype] = totals.get(dtype, 0) + tensor.nbytes
    return max(totals, key=lambda dtype: totals[dtype], default=DType.FLOAT32)
