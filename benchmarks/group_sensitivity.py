"""What it costs to find how sensitive each group of layers is, beside one forward pass for each group.

    python -m benchmarks.group_sensitivity --shape 300m --device cpu
    python -m benchmarks.group_sensitivity --shape llama-8b --device cuda:0

The model has random weights. Both sides use the same windows and the same resident model. The passes of the plain side
are timed before, between and after, and multiplied by the number of groups: on a CPU all of them would take an hour. On
a busy machine compare the CPU seconds. The 300M model takes about 10 minutes and 8 GiB of memory on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.random_source import SHAPES, build_source, build_tokenizer
from benchmarks.report import log


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """Seconds by the clock, and of all cores."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityRow:
    """``open_groups``: those whose place the derivatives left open, of which ``measured`` were measured. ``ready``: to
    load nothing but make the model ready; ``search``: the sensitivities; ``one_pass``: a forward pass over all windows
    with everything quantized, the fastest of several; ``share_*``: (ready + search) / (one_pass · groups)."""

    shape: str
    device: str
    windows: int
    tokens: int
    groups: int
    open_groups: int
    measured: int
    rank_correlation: float | None
    forward_passes: float
    ready: Took
    search: Took
    one_pass: Took
    share_wall: float
    share_cpu: float
    peak_gib: float | None


def timed(device: str, work: Callable[[], Any]) -> tuple[Any, Took]:
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    _synchronize(device)
    return result, Took(wall_s=time.perf_counter() - wall, cpu_s=time.process_time() - cpu)


def _synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(shape: str, device: str, window: int, windows: int) -> SensitivityRow:
    import torch

    from qbatch.core.domain import DType, Method, Scheme
    from qbatch.core.search.search_protocol import SearchProtocol
    from qbatch.worker.measuring.quality.replay import logits_of
    from qbatch.worker.methods.implementations import import_usual_library
    from qbatch.worker.models.load import load
    from qbatch.worker.searching import DEFAULT_SEARCH_TEXT
    from qbatch.worker.searching.opened_search import opened_search
    from qbatch.worker.searching.search_probes import search_probes
    from qbatch.worker.searching.sensitivity_search import measure_sensitivity

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / shape
        build_source(shape, source)
        build_tokenizer(source)
        loaded = load(source, dtype=DType.BFLOAT16, device=device)
    protocol = SearchProtocol(text_sha256="0" * 64, window=window, windows=windows)
    probes = search_probes(loaded, protocol, DEFAULT_SEARCH_TEXT.read_text(encoding="utf-8"))
    log(f"{shape}: {len(probes)} windows of {len(probes[0].ids)} tokens")

    def one_pass() -> Took:
        with torch.inference_mode():
            _, took = timed(device, lambda: [logits_of(loaded.model, probe, device) for probe in probes])
        log(f"one pass: {took.wall_s:.1f} s, {took.cpu_s:.1f} CPU s")
        return took

    # A runner's forkserver has imported it, or the compiler that its import takes most of its time for.
    import_usual_library()
    scheme = Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16)
    context = opened_search(loaded, probes, scheme, log)
    search, ready = timed(device, context.__enter__)
    log(f"ready after {ready.wall_s:.1f} s, {ready.cpu_s:.1f} CPU s")
    passes = [one_pass()]
    sensitivity, took = timed(device, lambda: measure_sensitivity(search, protocol))
    log(f"searched for {took.wall_s:.1f} s, {took.cpu_s:.1f} CPU s")
    search.mixed.keep(frozenset())
    passes.append(one_pass())
    context.__exit__(None, None, None)
    best = Took(wall_s=min(each.wall_s for each in passes), cpu_s=min(each.cpu_s for each in passes))
    count = len(sensitivity.groups)
    return SensitivityRow(
        shape=shape,
        device=device,
        windows=len(probes),
        tokens=sensitivity.rows,
        groups=count,
        open_groups=sum(each.is_open for each in sensitivity.groups),
        measured=sum(each.measured is not None for each in sensitivity.groups),
        rank_correlation=sensitivity.rank_correlation,
        forward_passes=sensitivity.forward_passes,
        ready=ready,
        search=took,
        one_pass=best,
        share_wall=(ready.wall_s + took.wall_s) / (best.wall_s * count),
        share_cpu=(ready.cpu_s + took.cpu_s) / (best.cpu_s * count),
        peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.startswith("cuda") else None,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="300m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    given = parser.parse_args(argv)
    print(json.dumps(asdict(measure(given.shape, given.device, given.window, given.windows)), indent=2))


if __name__ == "__main__":
    main()
