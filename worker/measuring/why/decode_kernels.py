"""Measure the kernels of a decode step: in a CUDA graph without the host, and by a profiler.

First a step of each model is captured, until a capture fails, which leaves CUDA unusable for this process. They are
profiled after the last capture, since a profiler leaves its process slower. ``kernels_process`` is the process.
"""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qbatch.worker.measuring.why.profile import StepProfile

log = logging.getLogger("qbatch.kernels")

_WARMUP_STEPS = 3
_REPLAYS = 20
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The context of a step: a prompt of ``prompt_tokens``, in a cache with space for ``new_tokens`` more."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsRequest:
    """Which model to measure, at which shapes. ``adapter``: the folder of the one that it has. ``dtype``: the value of
    a DType. ``not_captured``: why no capture is tried, if one is known to fail."""

    folder: str
    dtype: str
    device: str
    trusted: bool = False
    shapes: tuple[Shape, ...]
    not_captured: str | None = None
    adapter: str | None = None

    @property
    def model(self) -> KernelsRequest:
        """What of it decides what is loaded."""
        return replace(self, shapes=(), not_captured=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsTask:
    """What is still to be done for a request."""

    request: KernelsRequest
    capture: bool
    profile: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsAlone:
    """Median seconds of a replayed decode step with a static cache of the protocol's length, or why there is none."""

    step_s: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepKernels:
    """The kernels of a decode step at one shape. ``reason``: why there is no ``profile``."""

    alone: KernelsAlone | None = None
    profile: StepProfile | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A part of an answer: what was found for the task of that ``number``, at each shape. One of the two is set."""

    number: int
    alones: Sequence[KernelsAlone] | None = None
    profiles: Sequence[StepKernels] | None = None


def measure_all(tasks: Sequence[KernelsTask], models: Models) -> Iterator[Done]:
    """Capture the steps of each task that asks for it, then profile them. Failures become reasons. A failed capture is
    the last part, because it spoils the process."""
    for number, task in enumerate(tasks):
        if not task.capture:
            continue
        model, reason = models.get(task.request)
        if model is None:
            yield Done(number=number, alones=[KernelsAlone(reason=reason)] * len(task.request.shapes))
            continue
        log.info("capturing %s", task.request.folder)
        alones = _capture_each(model, task.request)
        yield Done(number=number, alones=alones)
        if any(alone.step_s is None for alone in alones):
            return
    for number, task in enumerate(tasks):
        if task.profile:
            model, reason = models.get(task.request)
            log.info("profiling %s", task.request.folder)
            profiles = [StepKernels(reason=reason)] * len(task.request.shapes)
            yield Done(number=number, profiles=profiles if model is None else _profile_each(model, task.request))


class Models:
    """The models of the tasks. They stay loaded if the device holds them together."""

    def __init__(self) -> None:
        self._loaded: dict[KernelsRequest, Any] = {}

    def get(self, request: KernelsRequest) -> tuple[Any, str | None]:
        """(the model, None), or (None, why it cannot be loaded)."""
        if not request.device.startswith("cuda"):
            return None, "a CPU has neither CUDA graphs nor kernels to profile"
        if request.model in self._loaded:
            return self._loaded[request.model], None
        reason = self._load(request)
        if reason is not None and self._loaded:
            # It may have failed because the others take too much memory.
            self._unload()
            reason = self._load(request)
        return self._loaded.get(request.model), reason

    def prepare(self, requests: Sequence[KernelsRequest]) -> bool:
        """Load the models of ``requests`` before they are asked for. False if one cannot be loaded: then this process
        should end, since the runner may need the memory, and the fault may be one of the device."""
        for request in requests:
            if (reason := self._load(request)) is not None:
                log.info("%s; a later process tries that again", reason)
                return False
        return True

    def _load(self, request: KernelsRequest) -> str | None:
        log.info("loading %s", request.folder)
        try:
            self._loaded[request.model] = _load(request)
        except Exception as error:
            return _reason("cannot load the model", error)
        return None

    def _unload(self) -> None:
        import torch

        self._loaded.clear()
        gc.collect()
        torch.cuda.empty_cache()


def _reason(failure: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{failure}: {first} ({type(error).__name__})"


def _capture_each(model: Any, request: KernelsRequest) -> list[KernelsAlone]:
    """Capture a step at each shape. After a failure, the remaining shapes get its reason."""
    captured: list[KernelsAlone] = []
    try:
        # A generator, so that results from before a failure are kept.
        captured.extend(KernelsAlone(step_s=_replayed_s(model, shape, request.device)) for shape in request.shapes)
    except Exception as error:
        # Any error is a valid answer: it is the reason why the step cannot be captured.
        failure = KernelsAlone(reason=_reason("not capturable", error))
        return captured + [failure] * (len(request.shapes) - len(captured))
    return captured


def _profile_each(model: Any, request: KernelsRequest) -> list[StepKernels]:
    return [_profile(model, shape, request.device) for shape in request.shapes]


def _profile(model: Any, shape: Shape, device: str) -> StepKernels:
    from qbatch.worker.measuring.why.profile import profile_decode

    prompt = _ids(model, shape, device)[:, :-1].contiguous()
    try:
        profile = profile_decode(model, prompt, new_tokens=shape.new_tokens, device=device)
    except Exception as error:
        return StepKernels(reason=_reason("cannot profile a step", error))
    if not profile.device_busy_s:
        # CUPTI is forbidden or used by another process. Without this check the step would count as host-bound.
        return StepKernels(reason="the profiler recorded no work on the GPU")
    return StepKernels(profile=profile)


def _load(request: KernelsRequest) -> Any:
    from qbatch.core.domain import DType
    from qbatch.worker.models.load import load

    folder = Path(request.folder)
    adapter = None if request.adapter is None else Path(request.adapter)
    dtype = DType(request.dtype)
    return load(folder, dtype=dtype, device=request.device, trusted=request.trusted, adapter=adapter).model


def _replayed_s(model: Any, shape: Shape, device: str) -> float:
    import torch

    from qbatch.worker.measuring.speed.device_clock import CudaClock
    from qbatch.worker.measuring.stats import percentile

    with torch.inference_mode():
        step, rewind = decode_step(model, shape, device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with as_generate_decodes(model):
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP_STEPS):
                    rewind()
                    step()
            torch.cuda.current_stream(device).wait_stream(stream)
            rewind()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        clock = CudaClock(device)
        times_s: list[float] = []
        for _ in range(_REPLAYS):
            rewind()
            clock.synchronize()
            before = clock.mark()
            graph.replay()
            times_s += clock.intervals_s([before, clock.mark()])
    return percentile(sorted(times_s), 50)


def as_generate_decodes(model: Any) -> AbstractContextManager[object]:
    """The context in which ``generate`` decodes: on a GPU the experts of a mixture have other kernels in it."""
    optimized: AbstractContextManager[object] = getattr(model, "_optimize_model_for_decode", nullcontext)()
    return optimized


def decode_step(model: Any, shape: Shape, device: str) -> tuple[Callable[[], Any], Callable[[], None]]:
    """(a function that runs one step after the prompt and returns its logits, one that resets the cache)."""
    import torch
    from transformers import StaticCache

    ids = _ids(model, shape, device)
    prompt, token = ids[:, :-1].contiguous(), ids[:, -1:].contiguous()
    cache = StaticCache(config=model.config, max_cache_len=shape.prompt_tokens + shape.new_tokens)
    model(input_ids=prompt, past_key_values=cache, use_cache=True, **last_logits_only(model))
    position = torch.full_like(token, shape.prompt_tokens)

    def step() -> Any:
        return model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits

    def rewind() -> None:
        for layer in cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(shape.prompt_tokens)
            if hasattr(layer, "cumulative_length_int"):  # a sliding window's
                layer.cumulative_length_int = shape.prompt_tokens

    return step, rewind


def last_logits_only(model: Any) -> dict[str, int]:
    """The argument by which a prefill computes the logits of the last token alone, as in ``generate``: all of them may
    take gigabytes."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _ids(model: Any, shape: Shape, device: str) -> Any:
    """Random ids [batch, prompt + 1]. The rows differ, since equal rows would all choose the same experts."""
    import torch

    rows = int(model.get_input_embeddings().weight.shape[0])
    size = (shape.batch_size, shape.prompt_tokens + 1)
    return torch.randint(rows, size, generator=torch.Generator().manual_seed(_SEED)).to(device)
