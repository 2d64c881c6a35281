"""The kernels of a decode step alone: one step under a CUDA graph, replayed without the host.

A failed capture leaves the process's CUDA state unfit for more, so this runs in a process of its own:
``python -P -m worker.benchmark.graph`` reads a request from standard input and prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_TIME_LIMIT_S = 300.0
_WARMUP_STEPS = 3
_REPLAYS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRequest:
    """Which model to capture, and at which shape. ``dtype`` is a DType's value."""

    folder: str
    dtype: str
    device: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsAlone:
    """Median seconds of a replayed decode step, with a static cache of the protocol's length; else why there is
    none."""

    step_s: float | None = None
    reason: str | None = None


def kernels_alone(request: GraphRequest, *, time_limit_s: float = _TIME_LIMIT_S) -> KernelsAlone:
    """Capture and time one decode step in a process of its own. Never raises for what goes wrong in there."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "worker.benchmark.graph"],
            input=json.dumps(asdict(request)),
            capture_output=True,
            text=True,
            timeout=time_limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return KernelsAlone(reason=f"capturing took longer than {time_limit_s:.0f} s")
    # An answer counts even if the process fell over its broken CUDA state afterwards.
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if answers:
        return KernelsAlone(**json.loads(answers[-1]))
    last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
    return KernelsAlone(reason=f"the capturing process ended with {done.returncode}: {last}")


def main() -> None:
    """Serve one request."""
    request = GraphRequest(**json.load(sys.stdin))
    sys.stdout.write(json.dumps(asdict(_measure(request))) + "\n")
    sys.stdout.flush()


def _measure(request: GraphRequest) -> KernelsAlone:
    from models_db.domain import DType
    from worker.load import load

    if not request.device.startswith("cuda"):
        return KernelsAlone(reason="there are no CUDA graphs on a CPU")
    loaded = load(Path(request.folder), dtype=DType(request.dtype), device=request.device)
    try:
        return KernelsAlone(step_s=_replayed_s(loaded.model, request))
    except Exception as error:
        # Whatever stops a capture is the answer to the question asked; this process ends here in any case.
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return KernelsAlone(reason=f"not capturable: {first} ({type(error).__name__})")


def _replayed_s(model: Any, request: GraphRequest) -> float:
    import torch

    from worker.benchmark.clock import CudaClock
    from worker.benchmark.stats import percentile

    with torch.inference_mode():
        step, rewind = decode_step(model, request)
        stream = torch.cuda.Stream(request.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(request.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP_STEPS):
                rewind()
                step()
        torch.cuda.current_stream(request.device).wait_stream(stream)
        rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        clock = CudaClock(request.device)
        times_s: list[float] = []
        for _ in range(_REPLAYS):
            rewind()
            clock.synchronize()
            before = clock.mark()
            graph.replay()
            times_s += clock.intervals_s([before, clock.mark()])
    return percentile(sorted(times_s), 50)


def decode_step(model: Any, request: GraphRequest) -> tuple[Callable[[], Any], Callable[[], None]]:
    """(a function that runs one step after the prompt and returns its logits, one that makes the cache forget it)."""
    import torch
    from transformers import StaticCache

    shape = (request.batch_size, request.prompt_tokens)
    prompt = torch.ones(shape, dtype=torch.long, device=request.device)
    cache = StaticCache(config=model.config, max_cache_len=request.prompt_tokens + request.new_tokens)
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    token = torch.ones(request.batch_size, 1, dtype=torch.long, device=request.device)
    position = torch.full_like(token, request.prompt_tokens)

    def step() -> Any:
        return model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits

    def rewind() -> None:
        for layer in cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(request.prompt_tokens)
            if hasattr(layer, "cumulative_length_int"):  # a sliding window's
                layer.cumulative_length_int = request.prompt_tokens

    return step, rewind


if __name__ == "__main__":
    main()
