"""Write a checkpoint by building the whole quantized model and saving it. Needs memory for all of the model."""

from __future__ import annotations

import gc
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qbatch.core.digest import digest_file
from qbatch.core.domain import DType
from qbatch.core.errors import JobError, Unsupported, UsageError, one_line
from qbatch.core.filesystem import add_default_permissions
from qbatch.core.sources import Header, read_header
from qbatch.worker.files.staging import require_space
from qbatch.worker.methods.implementations import weights_of
from qbatch.worker.models.architecture import load_config
from qbatch.worker.quantizing.building.metadata_order import sort_metadata
from qbatch.worker.quantizing.faults import as_job_error
from qbatch.worker.quantizing.meter import REPORT_INTERVAL_S, Meter
from qbatch.worker.quantizing.planning.audit import coverage, error_audit, is_finite
from qbatch.worker.quantizing.planning.loaded_names import loads_own_names, without_converters_of
from qbatch.worker.quantizing.planning.loading import load_source, refuse_mismatched, refuse_missing, unused
from qbatch.worker.quantizing.planning.saving import read_generation_config
from qbatch.worker.quantizing.planning.skeleton import build_skeleton, linear_shape
from qbatch.worker.quantizing.planning.space import weights_bytes
from qbatch.worker.quantizing.planning.unquantized_parameters import needs_quantization, refuse_nothing_quantized
from qbatch.worker.quantizing.target import Deferred, Refused, Target, Written
from qbatch.worker.quantizing.tensors.source_reader import SourceReader
from qbatch.worker.quantizing.tensors.trace import Origin, is_elementwise, replay, sources_of

_Origins = Mapping[str, tuple[Origin, bool]]


class WholeModel:
    """A target that is written by building its whole model. Created well before ``write``, so that the number of bytes
    it will read and write is known early."""

    def __init__(
        self, source: Path, headers: tuple[Header, ...], deferred: Deferred, dtype: DType, device: str
    ) -> None:
        """Trace the model without data. Raises what ``build_skeleton`` and ``load_source`` raise."""
        self._source, self._headers, self._deferred = source, headers, deferred
        self._dtype, self._device = dtype, device
        scheme = self._target.scheme
        self._weights = weights_of(scheme.description)
        self._refuse_unsupported(dtype, device)
        self._packing = self._weights.packing(scheme)
        self._skeleton = build_skeleton(source, scheme, dtype, device, trusted=self._target.trusted)
        refuse_nothing_quantized(scheme.method, self._skeleton, self._packing)
        if (reason := self._weights.why_not_loaded(self._skeleton.model.state_dict())) is not None:
            raise Unsupported(reason)
        self._to_quantize = self._quantized_shapes()
        self._to_write = weights_bytes(self._skeleton.model, self._packing, self._to_quantize)
        self._origins, self._dropped, self._why_untraced = self._trace()

    def _refuse_unsupported(self, dtype: DType, device: str) -> None:
        description = self._target.scheme.description
        if (reason := self._weights.why_not_on(description, device)) is not None:
            raise Unsupported(reason)
        try:
            description.refuse_dtype(dtype)
        except UsageError as error:
            raise Unsupported(str(error)) from error

    @property
    def _target(self) -> Target:
        return self._deferred.target

    def _quantized_shapes(self) -> dict[str, torch.Size]:
        model = self._skeleton.model
        return {
            name: parameter.shape
            for name, parameter in model.named_parameters()
            if needs_quantization(self._skeleton, self._packing, model, name)
        }

    def _trace(self) -> tuple[_Origins, tuple[str, ...] | None, str | None]:
        """Return the origin of each quantized weight, and the source tensors that the model does not use. If a model's
        own code cannot be traced, return no origins, None, and the reason."""
        try:
            with SourceReader(self._headers, lambda _: None) as reader:
                info, recorder = load_source(self._skeleton, self._packing, reader, self._dtype)
                recorder.raise_if_refused()
                refuse_mismatched(info)
                dropped = unused(reader, self._skeleton.model, recorder)
        except Exception as error:
            if not self._target.trusted or isinstance(error, JobError):
                raise
            return {}, None, one_line(error)
        return recorder.origins, dropped, None

    def planned_bytes(self) -> int:
        """Roughly how many bytes will be read and written. Tensors whose quantization errors are computed are read
        twice: to load the model, and to compare."""
        sizes = {tensor.name: tensor.nbytes for header in self._headers for tensor in header.tensors}
        compared = {name for origin, _ in self._origins.values() for name in sources_of(origin)}
        return sum(sizes.values()) + sum(sizes[name] for name in compared) + self._to_write

    def write(self, meter: Meter) -> Written | Refused:
        """Load with ``from_pretrained`` and save with ``save_pretrained``. Reports progress a few times a second from
        the calling thread, and raises only what reporting raises."""
        stopped = threading.Event()
        # On a CPU, the result of double quantization depends on the number of torch threads.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
            work = pool.submit(self._write, _stoppable(meter.read, stopped))
            try:
                self._watch(work, meter)
            except BaseException:
                stopped.set()
                raise
        try:
            return work.result()
        except Exception as error:
            # The traceback would keep the model in memory.
            return Refused(target=self._target, error=as_job_error(error).with_traceback(None))
        finally:
            _release_memory()

    def _write(self, on_read: Callable[[int], None]) -> Written:
        start = time.perf_counter()
        require_space(self._target.folder, self._to_write + self._target.beside_bytes)
        audit = self._load_and_save(on_read)
        return Written(
            target=self._target,
            quantize_s=time.perf_counter() - start,
            files=tuple(digest_file(path) for path in sorted(self._target.folder.iterdir())),
            audit=audit | {"whole_model_because": self._deferred.reason},
            writer="whole",
        )

    def _watch(self, work: Future[Written], meter: Meter) -> None:
        counted_bytes = 0
        done = False
        while not done:
            done = bool(wait([work], REPORT_INTERVAL_S).done)
            written_bytes = _bytes_on_disk(self._target.folder)
            meter.wrote(max(0, written_bytes - counted_bytes))
            counted_bytes = max(written_bytes, counted_bytes)
            meter.report()

    def _load_and_save(self, on_read: Callable[[int], None]) -> dict[str, Any]:
        with SourceReader(self._headers, on_read) as reader:
            model, loading = self._load(reader)
            errors = self._errors(model, reader)
        self._save(model)
        sizes = {f"{name}.weight": math.prod(linear_shape(module)) for name, module in self._layers(model)}
        dropped = loading["unexpected_keys"] if self._dropped is None else self._dropped
        return (
            coverage(self._skeleton, self._packing, model, sizes, _weights_bytes(self._target.folder), dropped) | errors
        )

    def _load(self, reader: SourceReader) -> tuple[Any, Any]:
        """Return the quantized model and transformers' loading info. Tensors are read through ``reader``, which counts
        the bytes. Raises Unsupported if transformers loses a weight or leaves it unquantized."""
        model, loading = self._skeleton.cls.from_pretrained(
            None,
            config=load_config(self._source, trusted=self._target.trusted),
            state_dict={tensor.name: _LazyTensor(reader, tensor.name) for tensor in reader.tensors()},
            quantization_config=self._skeleton.quantizer.quantization_config,
            dtype=getattr(torch, self._dtype.value),
            device_map={"": self._device},
            output_loading_info=True,
            local_files_only=True,
        )
        if lost := sorted(self._origins.keys() & loading["missing_keys"]):
            raise Unsupported(f"transformers loses {lost[0]} while it quantizes the tensor that it is cut from")
        refuse_missing(loading["missing_keys"])
        for name, module in self._layers(model):
            if not self._weights.is_quantized(module.weight):
                raise Unsupported(f"transformers left {name}.weight unquantized in a quantized layer")
        if model.can_generate():
            read_generation_config(model, self._source)
        return model, loading

    def _layers(self, model: Any) -> list[tuple[str, Any]]:
        """Names and modules of the layers whose weights should be quantized."""
        return [(name, module) for name, module in model.named_modules() if f"{name}.weight" in self._to_quantize]

    def _save(self, model: Any) -> None:
        limit = self._target.scheme.max_shard_bytes
        model.save_pretrained(
            self._target.folder,
            save_original_format=self._takes_names_of_source(model),
            **({} if limit is None else {"max_shard_size": limit}),
        )
        for path in self._weights.files_with_unsorted_metadata(self._target.folder):
            sort_metadata(path)
        for path in self._target.folder.iterdir():
            add_default_permissions(path)

    def _takes_names_of_source(self, model: Any) -> bool:
        """Whether the checkpoint has the source's layout. Converting quantized codes back to it fails, or gives a
        checkpoint that cannot be loaded; then it has the model's own. Where transformers cannot load that either, it
        has the source's names, and what was converted and quantized stays as it is."""
        if not self._converted_weights_may_be_quantized():
            return True
        if loads_own_names(self._skeleton):
            return False
        model._weight_conversions = without_converters_of(
            model._weight_conversions, self._to_quantize, self._skeleton.model.state_dict()
        )
        return True

    def _converted_weights_may_be_quantized(self) -> bool:
        if self._why_untraced is not None:
            return True
        return not all(is_elementwise(origin) for origin, _ in self._origins.values())

    def _errors(self, model: Any, reader: SourceReader) -> dict[str, Any]:
        """The audit of quantization errors, computed one weight at a time."""
        if self._why_untraced is not None:
            return {"no_errors_because": self._why_untraced}
        # Weights that are cut from the same source tensor are neighbours in the model, so caching one is enough.
        read = lru_cache(maxsize=1)(reader.whole)
        errors = {}
        for name, module in self._layers(model):
            origin, transposed = self._origins[f"{name}.weight"]
            exact = replay(origin, read).to(module.weight.device)
            errors[f"{name}.weight"] = [
                self._weights.figures(exact.t() if transposed else exact, module.weight).tolist()
            ]
        state = model.state_dict()
        # The loop above checked the quantized weights, whose codes may have any dtype.
        others = (
            name for name in state if not name.startswith(tuple(errors)) and not self._weights.is_state_name(name)
        )
        return error_audit(self._weights, errors, (name for name in others if not is_finite(state[name])))


class _LazyTensor:
    """A source tensor that is read when transformers indexes it."""

    def __init__(self, reader: SourceReader, name: str) -> None:
        self._reader, self._name = reader, name

    def __getitem__(self, _everything: Any) -> torch.Tensor:
        return self._reader.whole(self._name)


def _stoppable(on_read: Callable[[int], None], stopped: threading.Event) -> Callable[[int], None]:
    def count(nbytes: int) -> None:
        if stopped.is_set():
            raise InterruptedError("quantization was cancelled")
        on_read(nbytes)

    return count


def _weights_bytes(folder: Path) -> int:
    headers = [read_header(path) for path in folder.glob("*.safetensors")]
    return sum(tensor.nbytes for header in headers for tensor in header.tensors)


def _bytes_on_disk(folder: Path) -> int:
    """How many bytes of weights are on disk in ``folder``. safetensors first creates a hidden file of the full length,
    and renames it at the end."""
    total = 0
    with suppress(OSError):  # a file was just renamed; the writer runs into any other fault too, and reports it
        for entry in os.scandir(folder):
            if entry.name.endswith(".safetensors"):
                total += entry.stat().st_size
            elif entry.name.startswith("."):
                total += min(entry.stat().st_size, entry.stat().st_blocks * 512)
    return total


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
