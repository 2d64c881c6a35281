"""Describe a model from its config and safetensors headers alone. Needs no torch and reads no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbatch.core.domain import SourceRef
from qbatch.core.errors import FetchError, SourceCorrupt, SourceGated, SourceNotFound, UnsafeSource
from qbatch.core.kinds import FLOAT8, FLOATS
from qbatch.core.methods.registry import family_of
from qbatch.core.prior_quantization import QUANTIZATION_KEYS, stale_quantization
from qbatch.core.sources import (
    INDEX_NAME,
    PICKLE_SUFFIXES,
    SINGLE_NAME,
    Header,
    TensorInfo,
    check_header,
    indexed_files,
    read_config,
    read_headers,
    read_object,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
_LOADED_WIDTHS = {"float32": 4, "bfloat16": 2}


def inspect_source(source: SourceRef) -> dict[str, Any]:
    """Describe ``source``, a folder or a model on the hub, from its config and headers, as JSON-compatible values.

    ``num_parameters`` counts floating-point elements as stored; of a checkpoint of a known method the elements
    that the stored codes stand for, and None where headers do not tell. ``memory_bytes`` is that of all tensors as
    stored, ``memory_bytes_by_dtype`` what they would take if loaded so (None where quantized); ``disk_bytes`` that of
    the files.

    Raises SourceNotFound, SourceGated, SourceCorrupt, UnsafeSource, StorageError, or FetchError.
    """
    if source.is_folder:
        folder = Path(source.location)
        headers = read_headers(folder)
        return _describe(source, None, read_config(folder), headers)
    with _hub_errors(source):
        return _describe(source, *_read_hub(source))


def _describe(
    source: SourceRef, commit: str | None, config: Mapping[str, Any], headers: tuple[Header, ...]
) -> dict[str, Any]:
    if stale_quantization(config, headers) is not None:
        config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    tensors = [tensor for header in headers for tensor in header.tensors]
    dtypes = _by_dtype(tensors)
    architectures = config.get("architectures")
    quantization = _quantization(config)
    return {
        "model": source.name,
        "revision": source.revision,
        "commit": commit,
        "architecture": str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        "model_type": str(config["model_type"]) if config.get("model_type") else None,
        "quantization": quantization,
        "dtype": next(iter(dtypes), None),
        "dtypes": dtypes,
        "num_parameters": _num_parameters(tensors, config),
        "num_tensors": len(tensors),
        "memory_bytes": sum(tensor.nbytes for tensor in tensors),
        "memory_bytes_by_dtype": None if quantization else _loaded_bytes(tensors),
        "disk_bytes": sum(header.size for header in headers),
        "files": [{"name": header.path.name, "bytes": header.size} for header in headers],
    }


def _by_dtype(tensors: Iterable[TensorInfo]) -> dict[str, dict[str, int]]:
    """Elements and bytes of each stored dtype, ordered by bytes, largest first."""
    parameters, sizes = Counter[str](), Counter[str]()
    for tensor in tensors:
        parameters[tensor.dtype] += tensor.numel
        sizes[tensor.dtype] += tensor.nbytes
    return {
        _TORCH_NAMES.get(dtype, dtype.lower()): {"parameters": parameters[dtype], "bytes": size}
        for dtype, size in sizes.most_common()
    }


def _loaded_bytes(tensors: Iterable[TensorInfo]) -> dict[str, int]:
    floats = sum(tensor.numel for tensor in tensors if tensor.dtype in (*FLOATS, *FLOAT8))
    others = sum(tensor.nbytes for tensor in tensors if tensor.dtype not in (*FLOATS, *FLOAT8))
    return {dtype: floats * width + others for dtype, width in _LOADED_WIDTHS.items()}


def _quantization(config: Mapping[str, Any]) -> str | None:
    """The quantization in the words of its method, or only its name if qbatch has no such method."""
    settings = _settings(config)
    if settings is None:
        return None
    family = family_of(settings.get("quant_method"))
    return str(settings.get("quant_method") or "unknown") if family is None else family.describe(settings)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    settings = config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise SourceCorrupt("config.json: quantization_config is not an object")
    return settings


def _num_parameters(tensors: list[TensorInfo], config: Mapping[str, Any]) -> int | None:
    settings = _settings(config)
    if settings is None:
        return sum(tensor.numel for tensor in tensors if tensor.dtype in (*FLOATS, *FLOAT8))
    family = family_of(settings.get("quant_method"))
    return None if family is None else family.num_parameters(tensors)


def _read_hub(source: SourceRef) -> tuple[str, Mapping[str, Any], tuple[Header, ...]]:
    """The commit of the requested revision, and the config and headers at that commit."""
    from huggingface_hub import HfApi

    api = HfApi()
    info = api.model_info(source.location, revision=source.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    commit = info.sha or source.revision or "main"

    def download(name: str) -> Path:
        return Path(api.hf_hub_download(source.location, name, revision=commit))

    if "config.json" not in sizes:
        raise SourceNotFound("the model has no config.json on the hub")
    if SINGLE_NAME in sizes:  # transformers ignores an index next to it, which may be out of date
        names = [SINGLE_NAME]
    elif INDEX_NAME in sizes:
        names = indexed_files(download(INDEX_NAME))
    elif any(name.endswith(PICKLE_SUFFIXES) for name in sizes):
        raise UnsafeSource("the model has only pickles, no safetensors")
    else:
        raise SourceNotFound(f"the model has neither {SINGLE_NAME} nor {INDEX_NAME} on the hub")
    if missing := [name for name in names if name not in sizes]:
        raise SourceCorrupt(f"{INDEX_NAME} lists {missing[0]!r}, which is missing")
    read = partial(_hub_header, api, source.location, commit, sizes)
    with ThreadPoolExecutor(max_workers=8) as pool:
        return commit, read_object(download("config.json")), tuple(pool.map(read, names))


def _hub_header(api: HfApi, repo: str, commit: str, sizes: Mapping[str, int], name: str) -> Header:
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        parsed = api.parse_safetensors_file_metadata(repo, name, revision=commit)
    except (SafetensorsParsingError, TypeError, AttributeError) as error:  # it does not check the JSON's structure
        raise SourceCorrupt(f"{name} is not a safetensors file, or a damaged one: its header cannot be read") from error
    entries: dict[str, Any] = {
        key: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": list(tensor.data_offsets)}
        for key, tensor in parsed.tensors.items()
    }
    # The library does not report the length of the header; the tensors fill the rest of the file.
    ends = [tensor.data_offsets[-1] for tensor in parsed.tensors.values() if tensor.data_offsets]
    data_start = sizes[name] - max((end for end in ends if isinstance(end, int)), default=0)
    if data_start < 8:
        raise SourceCorrupt(f"{name}: the file has {sizes[name]} bytes, too few for the tensors in its header")
    return check_header(Path(name), entries, data_start=data_start, size=sizes[name])


@contextmanager
def _hub_errors(source: SourceRef) -> Iterator[None]:
    """Translate the errors of huggingface_hub into qbatch's, each with a one-line message."""
    # HTTPError comes from httpx or its successor, depending on the version of huggingface_hub.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        DisabledRepoError,
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise SourceNotFound("no such folder, and HF_HUB_OFFLINE disables the hub") from error
    except (GatedRepoError, DisabledRepoError) as error:
        raise SourceGated(
            "access is restricted: accept the model's licence on the hub and log in with a token (`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceNotFound(f"the hub has no revision {source.revision} of this model") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceNotFound("no such folder, and no such model on the hub (unless it is private)") from error
    except LocalEntryNotFoundError as error:
        raise FetchError("the hub cannot be reached") from error
    except EntryNotFoundError as error:
        raise SourceNotFound("a file that the hub lists is missing there") from error
    except HfHubHTTPError as error:
        raise FetchError(f"the hub answered with HTTP status {error.response.status_code}") from error
    except JSONDecodeError as error:
        raise FetchError("the answer is not JSON, so it did not come from the hub (a proxy or login page?)") from error
    except (HTTPError, OSError) as error:
        raise FetchError(f"the hub cannot be reached ({type(error).__name__})") from error
