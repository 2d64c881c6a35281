"""Profile decode steps as ``generate`` runs them: how long the GPU is busy, and how often the CUDA runtime is called.

torch's profiler slows every later launch of its process (CUPTI stays attached), so nothing must be timed after it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qbatch.worker.measuring.speed.device_clock import clock_of
from qbatch.worker.measuring.speed.generation import greedy

# The first steps after the prefill still allocate memory; then enough steps for a stable mean.
_SKIPPED_STEPS = 3
_STEPS = 8
# The prefill generates the first token.
_TOKENS_BEFORE = 1 + _SKIPPED_STEPS
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
_DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """Averages of one decode step.

    ``device_busy_s``: seconds in which the device ran a kernel or a copy. ``launches`` and ``synchronizations``: calls
    of the CUDA runtime. Profiling slows the host but not the kernels, so the wall time must be measured elsewhere.
    """

    steps: int
    device_busy_s: float
    launches: float
    synchronizations: float


class _Profiler:
    """A logits processor that changes nothing and profiles the steps between two of its calls."""

    def __init__(self, device: str) -> None:
        kinds = torch.profiler.ProfilerActivity
        # On CUDA without torch's own operations: what calls the runtime is not asked, and recording it took most time.
        self._profiler = torch.profiler.profile(activities=[kinds.CUDA if device.startswith("cuda") else kinds.CPU])
        self._clock = clock_of(device)
        self._calls = 0

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        if self._calls == _TOKENS_BEFORE:
            self._clock.synchronize()
            self._profiler.start()
        if self._calls == _TOKENS_BEFORE + _STEPS:
            self._clock.synchronize()
            self._profiler.stop()
        return scores

    def events(self) -> list[dict[str, Any]]:
        """The events that have a duration, in Chrome's trace format.

        Torch's own list of them takes three times as long, because it finds out which of them contain which.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_bytes())
        return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def profile_decode(model: Any, prompts: torch.Tensor, *, new_tokens: int, device: str) -> StepProfile:
    """Profile a few eager decode steps of ``model`` after a prefill of ``prompts`` [batch, length].

    The model must have positions for the prompt and ``new_tokens``. If the profiled steps need more new tokens, the
    prompt is shortened by the difference. On a CPU all figures are 0.
    """
    from transformers import LogitsProcessorList

    needed = _TOKENS_BEFORE + _STEPS
    prompts = prompts[:, : max(1, prompts.shape[1] - max(0, needed - new_tokens))]
    profiler = _Profiler(device)
    with torch.inference_mode(), greedy(model, needed):
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            logits_processor=LogitsProcessorList([profiler]),
            generation_config=model.generation_config,
        )
    return summarize_events(profiler.events(), steps=_STEPS)


def summarize_events(events: Iterable[Mapping[str, Any]], *, steps: int) -> StepProfile:
    """Average torch.profiler's ``events``, in microseconds, over ``steps``, without the one synchronization that
    profiling adds."""
    events = list(events)
    on_device = [event for event in events if event.get("cat") in _DEVICE_WORK]
    launches = sum(event["name"].startswith(_LAUNCHES) for event in events)
    synchronizations = sum(event["name"].startswith("cuda") and "Synchronize" in event["name"] for event in events)
    return StepProfile(
        steps=steps,
        device_busy_s=covered([(event["ts"], event["ts"] + event["dur"]) for event in on_device]) / 1e6 / steps,
        launches=launches / steps,
        synchronizations=max(0, synchronizations - 1) / steps,
    )


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of ``intervals``, so that work running at the same time on two streams counts once."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
