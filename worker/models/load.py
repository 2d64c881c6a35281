"""Loads a model, a source or a published checkpoint, from a folder with plain ``from_pretrained``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbatch.core.config_plausibility import refuse_implausible_config
from qbatch.core.domain import DType
from qbatch.core.errors import BenchmarkError, JobError, SourceCorrupt, Unsupported, one_line
from qbatch.core.loaders.checkpoint_facts import packed_module
from qbatch.core.prior_quantization import declares_quantization
from qbatch.core.source_checks import refuse_other_weights
from qbatch.core.sources import read_config, read_headers
from qbatch.worker.machine.device_faults import find_fault
from qbatch.worker.methods.implementations import weights_of_config, weights_of_model
from qbatch.worker.methods.method_weights import MethodWeights
from qbatch.worker.models.adapted_model import import_peft, with_adapter
from qbatch.worker.models.architecture import (
    ModelKind,
    kind_of,
    load_config,
    model_class,
)
from qbatch.worker.models.tokenizer import load_tokenizer

# A folder that no file can lie in, so that nothing is found there.
_NO_FOLDER = os.devnull


@dataclass(slots=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode on ``device``.

    ``tokenizer`` is None if the folder has none that can be read; ``why_no_tokenizer`` then says why. ``load_model_s``
    is the time of ``from_pretrained`` only, with the device synchronized before and after.
    """

    model: Any
    tokenizer: Any
    kind: ModelKind
    load_model_s: float
    device: str
    why_no_tokenizer: str | None = None


def load(folder: Path, *, dtype: DType, device: str, trusted: bool = False, adapter: Path | None = None) -> LoadedModel:
    """Load ``folder`` onto ``device`` ("cpu" or "cuda:N"), with unquantized weights in ``dtype`` (not "auto"). Python
    files in the folder run only if ``trusted``. ``adapter``: the folder of one that was published for it.

    Raises SourceNotFound or SourceCorrupt for faults of a source, BenchmarkError for faults of a published checkpoint,
    UnsafeSource if the model needs code and is not trusted, Unsupported if this version of transformers cannot load
    it, and CudaOom, HostOom or DeviceError for faults of the device.
    """
    raw_config = read_config(folder)
    refuse_other_weights(raw_config)
    if not declares_quantization(raw_config):  # the source of one of our checkpoints was checked before it was written
        refuse_implausible_config(raw_config, read_headers(folder))
    with translated(Unsupported, f"cannot read the configuration in {folder.name}"):
        config = load_config(folder, trusted=trusted)
        quantization = getattr(config, "quantization_config", None)
        quiet_libraries(weights_of_config(quantization))
        own_code = folder if trusted else None
        cls, kind = model_class(config, trusted=own_code), kind_of(config, trusted=own_code)
    corrupt: type[JobError] = SourceCorrupt if quantization is None else BenchmarkError
    with translated(corrupt, f"cannot load {folder.name}"):
        model, load_model_s = _load_model(cls, config, folder, dtype, device, corrupt)
    if adapter is not None:
        with translated(BenchmarkError, f"cannot load the adapter {adapter.name}"):
            import_peft()  # only the first adapter of a process would wait for that
            begin_s = time.perf_counter()
            model = with_adapter(model, adapter)
            _synchronize(device)
            load_model_s += time.perf_counter() - begin_s
    with translated(Unsupported, f"cannot load the tokenizer in {folder.name}"):
        tokenizer, why_none = load_tokenizer(folder, trusted=trusted)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        kind=kind,
        load_model_s=load_model_s,
        device=device,
        why_no_tokenizer=why_none,
    )


@contextmanager
def translated(otherwise: type[JobError], doing: str) -> Iterator[None]:
    """Convert errors of torch, transformers and the methods' libraries to JobErrors with a message of one line, which
    starts with ``doing``. Memory and device faults get their own class; everything else becomes ``otherwise``.
    """
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        fault = find_fault(error)
        kind, shown = (otherwise, error) if fault is None else (fault.kind, fault.error)
        translation = kind(f"{doing}: {one_line(shown)}")
        translation.may_pass = translation.may_pass or _is_of_machine(error)
        raise translation from error


def _is_of_machine(error: BaseException | None) -> bool:
    """Whether ``error``, or one that it came from, is of files, the network or what is installed."""
    return error is not None and (
        isinstance(error, (OSError, ImportError)) or _is_of_machine(error.__cause__ or error.__context__)
    )


def quiet_libraries(weights: MethodWeights | None) -> None:
    """Keep progress bars and repeated warnings of transformers and of a method's library out of job logs."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if weights is not None:
        weights.quiet_import()


def _load_model(
    cls: Any, config: Any, folder: Path, dtype: DType, device: str, corrupt: type[JobError]
) -> tuple[Any, float]:
    import torch

    _synchronize(device)
    begin_s = time.perf_counter()
    model, info = cls.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, dtype.value),
        device_map={"": device},
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        # Reported with both shapes; otherwise transformers prints them and raises an error that names neither.
        ignore_mismatched_sizes=True,
        # With PEFT installed, transformers looks for an adapter beside the weights, and applies it to them.
        adapter_kwargs={"subfolder": _NO_FOLDER},
    )
    _synchronize(device)
    load_model_s = time.perf_counter() - begin_s
    _refuse_adapter(model, folder)
    for name, found, needed in sorted(info["mismatched_keys"]):
        raise corrupt(f"{name} has the shape {tuple(found)}, but the model needs {tuple(needed)}")
    # transformers fills missing tensors with random numbers, and only warns.
    if missing := sorted(info["missing_keys"]):
        raise corrupt(f"{folder.name} lacks {len(missing)} tensors of {cls.__name__}; the first is {missing[0]}")
    # A source may hold more than its model. A checkpoint's are scales that transformers has renamed, and not found.
    if corrupt is BenchmarkError and (unused := sorted(info["unexpected_keys"])):
        layer = packed_module(unused[0])
        mends = f"; --skip-modules {layer.rpartition('.')[2]} may mend it" if layer is not None else ""
        raise corrupt(
            f"transformers makes no use of {len(unused)} tensors of {folder.name}; the first is {unused[0]}{mends}"
        )
    weights_of_model(model).prepare(model, device)
    return model.eval(), load_model_s


def _refuse_adapter(model: Any, folder: Path) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        raise Unsupported(f"transformers applied the adapter that lies beside the weights in {folder.name}: move it")


def _synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
