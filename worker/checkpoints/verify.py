"""Check that a published checkpoint is unchanged and matches its config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qbatch.core.adapter_names import ADAPTER_CONFIG
from qbatch.core.domain import DType
from qbatch.core.errors import JobError, UnsafeSource
from qbatch.core.manifest import MANIFEST
from qbatch.core.source_checks import refuse_other_weights
from qbatch.core.sources import INDEX_NAME, SINGLE_NAME, Header, TensorInfo, read_config, read_headers, read_object
from qbatch.worker.checkpoints.adapter_check import adapter_problems
from qbatch.worker.checkpoints.published import problems
from qbatch.worker.models.forbidden_code import refuse_forbidden_code

if TYPE_CHECKING:
    import torch

    from qbatch.worker.methods.method_weights import MethodWeights
    from qbatch.worker.quantizing.planning.expected_files import ExpectedTensor


def verify(folder: Path) -> list[str]:
    """The problems of the checkpoint in ``folder``, one line each; empty if there are none.

    First compares every file with the manifest. If they match, compares the names, dtypes, shapes and quantization
    states of the tensors with the config, using the code of transformers; only headers and states are read for that. If
    the model needs code of its own, the second part is skipped. An adapter is compared with the checkpoint beside it.
    """
    if not folder.is_dir():
        return ["no such folder"]
    of_content = adapter_problems if (folder / ADAPTER_CONFIG).is_file() else _weight_problems
    return problems(folder) or of_content(folder)


def _weight_problems(folder: Path) -> list[str]:
    try:
        headers = read_headers(folder)
        twice_or_misplaced = [*_repeated(headers), *_misplaced(folder, headers)]
        return twice_or_misplaced + ([] if _needs_code(folder) else _tensor_problems(folder, headers))
    except JobError as error:
        return [str(error)]


def _needs_code(folder: Path) -> bool:
    try:
        refuse_forbidden_code(folder, trusted=False)
    except UnsafeSource:
        return True
    return False


def _repeated(headers: Iterable[Header]) -> Iterator[str]:
    seen: dict[str, Path] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in seen:
                yield f"{tensor.name} is in {seen[tensor.name].name} and in {header.path.name}"
            seen[tensor.name] = header.path


def _misplaced(folder: Path, headers: tuple[Header, ...]) -> list[str]:
    """Differences between the index of a sharded checkpoint and the headers of its files."""
    if (folder / SINGLE_NAME).is_file():
        return []
    files = read_object(folder / INDEX_NAME)["weight_map"]
    held = {tensor.name: header.path.name for header in headers for tensor in header.tensors}
    wrong = [f"{INDEX_NAME} puts {name} into {file}" for name, file in files.items() if held.get(name) != file]
    return wrong + [f"{INDEX_NAME} leaves out {name}" for name in held if name not in files]


def _tensor_problems(folder: Path, headers: tuple[Header, ...]) -> list[str]:
    from qbatch.worker.methods.implementations import weights_of_config
    from qbatch.worker.models.load import quiet_libraries

    config = read_config(folder)
    weights = weights_of_config(config.get("quantization_config"))
    quiet_libraries(weights)
    from qbatch.worker.quantizing.planning.expected_files import expected_files

    refuse_other_weights(config)
    found = {tensor.name: (header.path, tensor) for header in headers for tensor in header.tensors}
    expected = expected_files(folder, _dtype(folder), found)
    lines = [*_missing(expected.tensors, found), *_differing(weights, expected.tensors, found)]
    lines += [f"{name} is not a tensor of the configured model" for name in found if name not in expected.tensors]
    if config.get("dtype") != expected.config_dtype:
        lines.append(f"config.json has dtype {config.get('dtype')}, and the model has {expected.config_dtype}")
    return lines


def _dtype(folder: Path) -> DType:
    """The dtype in which the model was loaded to be quantized. The config's is only that of the first parameter."""
    for path in (folder / MANIFEST, folder / "config.json"):
        with suppress(ValueError):
            return DType(read_object(path).get("dtype") or "")
    return DType.FLOAT32


_StoredTensors = Mapping[str, tuple[Path, TensorInfo]]


def _missing(expected: Mapping[str, ExpectedTensor], stored: _StoredTensors) -> Iterator[str]:
    stored_ties = {one.tie for name, one in expected.items() if name in stored}
    for name, one in expected.items():
        if name not in stored and (one.tie is None or one.tie not in stored_ties):
            yield f"{name} is missing"


def _differing(
    weights: MethodWeights | None, expected: Mapping[str, ExpectedTensor], stored: _StoredTensors
) -> Iterator[str]:
    for name, one in expected.items():
        if name not in stored:
            continue
        path, tensor = stored[name]
        dtype, shape = _safetensors_dtype(one.tensor.dtype), tuple(one.tensor.shape)
        if weights is not None and weights.has_content(name):
            yield from weights.content_problems(path, tensor, one.tensor)
        elif (tensor.dtype, tensor.shape) != (dtype, shape):
            yield f"{name} is {tensor.dtype} {list(tensor.shape)}; by the config it should be {dtype} {list(shape)}"


def _safetensors_dtype(dtype: torch.dtype) -> str:
    from qbatch.worker.quantizing.tensors.source_reader import TORCH_DTYPES

    return next((name for name, known in TORCH_DTYPES.items() if known == dtype), str(dtype))
