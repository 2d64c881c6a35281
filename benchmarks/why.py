"""Compares qbatch's analysis of decoding with an independent measurement, on the same GPU in the same session.

    python -m benchmarks.why --shape llama-8b
    python -m benchmarks.why --shape 300m --device cpu    (only building and timing: a CPU has no analysis)

It uses a model with random weights at 16 bits, NF4 and int8 (with and without the outlier path). This script measures
the device's busy time in an eager decode step (by summing a profiler's trace), the time of a step's kernels alone (with
a CUDA graph), and the speed of decoding (with a stopwatch), and compares them with the figures that
``qbatch.worker.measuring`` gives for the same checkpoints. Prints a table at the end, and exits with 1 if the two sides
differ by more than 5 %, or in eager decoding by more than the spread between rounds. The 8B model takes about five
minutes and 29 GiB of disk space.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quantize import import_for_forks, in_fresh_process
from benchmarks.random_source import SHAPES, build_source
from benchmarks.report import show
from qbatch.core.domain import BASELINE, DType, Method, Protocol, Scheme
from qbatch.core.measured.measurement import Measurement
from qbatch.core.measured.speed_figures import Phase
from qbatch.worker.machine.gpu import installed_gpus

_INT8 = Scheme(method=Method.INT8)
_SCHEMES = {
    "16 bits": BASELINE,
    "nf4": Scheme(method=Method.NF4),
    "int8": _INT8,
    # Has the same weights as int8, and only computes with them in a different way.
    "int8, threshold 0": Scheme.of(Method.INT8, int8_threshold=0.0),
}
# Measuring energy takes half a minute for each row.
_WITH_ENERGY = ("16 bits", "nf4", "int8")
_ROUNDS = 3
_TOLERANCE = 0.05
_WARMUP_STEPS, _STEPS = 4, 8
_WARMUP_REPLAYS, _REPLAYS, _REPLAY_ROUNDS = 3, 5, 3
_BEGIN_S = time.perf_counter()


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnFigures:
    """What this script measures itself, in seconds and tokens per second; None if it cannot be measured."""

    eager_tokens_per_s: float | None = None
    busy_s: float | None = None
    alone_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BothSides:
    """The measurements of both sides, by the name of the scheme."""

    qbatch: Mapping[str, Measurement]
    own: Mapping[str, OwnFigures]


# The independent side, which uses nothing from qbatch.worker.measuring


def eager_tokens_per_s(model: Any, prompt: Any, new_tokens: int) -> float:
    """Tokens per second of decoding by the host's clock: the time to generate ``new_tokens``, minus that for one."""
    return (new_tokens - 1) / (_generate_s(model, prompt, new_tokens) - _generate_s(model, prompt, 1))


def _generate_s(model: Any, prompt: Any, new_tokens: int) -> float:
    import torch

    torch.cuda.synchronize()
    begin_s = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
    torch.cuda.synchronize()
    return time.perf_counter() - begin_s


def busy_s(model: Any, prompt: Any, trace: Path) -> float:
    """Seconds that kernels, copies and fills take in an eager greedy step: the mean of 8 steps after ``prompt``
    [1, length]."""
    import torch

    kinds = torch.profiler.ProfilerActivity
    with torch.inference_mode():
        out = model(input_ids=prompt, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)

        def steps(count: int) -> None:
            nonlocal out, token
            for _ in range(count):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()

        steps(_WARMUP_STEPS)
        with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
            steps(_STEPS)
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    trace.unlink()
    work = [event["dur"] for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return float(sum(work)) / 1e6 / _STEPS


def alone_s(model: Any, prompt: Any, room: int) -> float | None:
    """Seconds of a decode step as a CUDA graph, replayed without pauses. The static cache holds the prompt and ``room``
    more tokens.

    None if the step cannot be captured; after that, the process can no longer use CUDA.
    """
    import torch
    from transformers import StaticCache

    assert room >= _WARMUP_REPLAYS + _REPLAYS * _REPLAY_ROUNDS, "every replay adds a token to the cache"  # noqa: S101
    with torch.inference_mode():
        cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + room)
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
        token, position = prompt[:, -1:].clone(), torch.full_like(prompt[:, -1:], prompt.shape[1])
        side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(_WARMUP_REPLAYS):
                model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        except RuntimeError as error:
            _log(f"  not captured here either: {str(error).splitlines()[0]}")
            return None
        return statistics.median(_replay_s(graph) for _ in range(_REPLAY_ROUNDS))


def _replay_s(graph: Any) -> float:
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    for _ in range(_REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / _REPLAYS


# qbatch's side, and both together


def write_quantized(source: Path, folder: Path, dtype: DType, device: str) -> dict[str, Path]:
    """Write the quantized checkpoints, and return the folder of each scheme. The files of int8 do not depend on the
    threshold, so they are linked for the second int8 scheme."""
    from qbatch.worker.quantizing import Refused, Target, write_checkpoints

    folders = {name: folder / f"checkpoint-{number}" for number, name in enumerate(_SCHEMES)}
    written = ("nf4", "int8")
    for name in written:
        folders[name].mkdir()
    targets = [Target(scheme=_SCHEMES[name].resolved(dtype), folder=folders[name]) for name in written]
    for outcome in write_checkpoints(source, targets, dtype=dtype, device=device, on_progress=lambda *_: None):
        if isinstance(outcome, Refused):
            raise outcome.error
    _link_without_outliers(folders["int8"], folders["int8, threshold 0"])
    return folders | {"16 bits": source}


def _link_without_outliers(int8: Path, folder: Path) -> None:
    folder.mkdir()
    for path in int8.iterdir():
        if path.name != "config.json":
            (folder / path.name).hardlink_to(path)
    config = json.loads((int8 / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = 0.0
    (folder / "config.json").write_text(json.dumps(config))


def protocol(name: str, device: str, *, energy: bool) -> Protocol:
    on_gpu = device != "cpu"
    return Protocol(
        batch_size=1,
        prompt_tokens=_prompt_tokens(device),
        new_tokens=_new_tokens(device),
        warmup_iterations=1,
        warmup_tokens=min(5, _new_tokens(device)),
        full_first_warmup=on_gpu,
        prefill_iterations=4,
        min_iterations=_ROUNDS,
        min_duration_s=0.0,
        rounds=_ROUNDS,
        why=on_gpu,
        energy=on_gpu and energy and name in _WITH_ENERGY,
        eval_text_sha256="",
        eval_window=1,
        eval_stride=1,
        eval_max_windows=0,
    )


def _prompt_tokens(device: str) -> int:
    return 16 if device == "cpu" else 256


def _new_tokens(device: str) -> int:
    return 4 if device == "cpu" else 32


def _prompt(device: str) -> Any:
    """The prompt for this script's own measurements, int64 [1, prompt tokens]."""
    import torch

    torch.manual_seed(1)
    return torch.randint(1000, (1, _prompt_tokens(device)), device=device)


def measure(folders: Mapping[str, Path], dtype: DType, device: str, work: Path, energy: bool) -> BothSides:
    """Measure both sides. All models stay loaded, so that eager decoding can be timed in turns: for each model first by
    qbatch, and immediately afterwards by the stopwatch."""
    loaded = {name: _load(name, folder, dtype, device) for name, folder in folders.items()}
    rows = {name: _row(name, folders[name], dtype, loaded[name], energy) for name in folders}
    prompt = _prompt(device)
    eager: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(_ROUNDS):
        for name, row in rows.items():
            row.time(loaded[name])
            if device != "cpu":
                _log(f"{name}: timed here, round {number + 1}")
                eager[name].append(eager_tokens_per_s(loaded[name].model, prompt, _new_tokens(device)))
    if device == "cpu":
        return BothSides(qbatch=_measured(rows, {}), own={name: OwnFigures() for name in rows})
    kernels = _explain(rows, loaded, device)
    # qbatch's measurements end before this script captures graphs, because a failed capture makes CUDA unusable.
    qbatch = _measured(rows, kernels)
    return BothSides(qbatch=qbatch, own=_own(loaded, prompt, eager, work))


def _load(name: str, folder: Path, dtype: DType, device: str) -> Any:
    from qbatch.worker.models.load import load

    _log(f"{name}: loading")
    return load(folder, dtype=dtype, device=device)


def _row(name: str, folder: Path, dtype: DType, loaded: Any, energy: bool) -> Any:
    from qbatch.worker.measuring.model_benchmark import ModelBenchmark
    from qbatch.worker.measuring.row_benchmark import RowBenchmark
    from qbatch.worker.measuring.subject import Subject

    def report(step: str) -> None:
        _log(f"{name}: {step}")

    requested = protocol(name, loaded.device, energy=energy)
    model = ModelBenchmark(
        Subject(
            folder=folder,
            dtype=dtype,
            compute_dtype=dtype,
            protocol=requested,
            eval_text="",
            texts={},
            on_step=report,
        )
    )
    model.prepare(loaded)
    return RowBenchmark(model, requested, report)


def _explain(rows: Mapping[str, Any], loaded: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The time of each row's kernels, measured by qbatch."""
    from qbatch.worker.measuring.why.capture import Captures

    for name, row in rows.items():
        row.observe(loaded[name])
    kernels = {}
    with Captures() as captures:
        # One at a time, because the models are still loaded here as well.
        for name, row in rows.items():
            if (shape := row.captured_shape) is not None:
                _log(f"{name}: kernels")
                ((kernels[name],),) = captures.kernels([row.model.kernels_request([shape], device=device)])
    return kernels


def _measured(rows: Mapping[str, Any], kernels: Mapping[str, Any]) -> dict[str, Measurement]:
    return {
        name: row.measurement(kernels=kernels.get(name), interleaved_with=[other for other in rows if other != name])
        for name, row in rows.items()
    }


def _own(loaded: Mapping[str, Any], prompt: Any, eager: Mapping[str, list[float]], work: Path) -> dict[str, OwnFigures]:
    """This script's own figures. Profiling and capturing come last, because a profiler slows down its process, and a
    failed capture makes CUDA unusable in it."""
    busy, alone = {}, {}
    for name, one in loaded.items():
        _log(f"{name}: profiled here")
        busy[name] = busy_s(one.model, prompt, work / "trace.json")
    # int8 with its outlier path cannot be captured, so it comes last.
    for name in sorted(loaded, key=lambda name: name == "int8"):
        _log(f"{name}: captured here")
        alone[name] = alone_s(loaded[name].model, prompt, _new_tokens(one.device))
    return {
        name: OwnFigures(eager_tokens_per_s=statistics.median(eager[name]), busy_s=busy[name], alone_s=alone[name])
        for name in loaded
    }


# The table

_COLUMNS = (
    "", "tok/s", "spread", "own", "ratio", "busy ms", "own", "ratio", "alone ms", "own", "ratio",
    "launches", "syncs", "verdict", "J/token", "net",
)  # fmt: skip


def table(shape: str, device_name: str, measured: BothSides) -> tuple[list[str], bool]:
    """The lines of the table, and whether all pairs of figures agree."""
    cells, agreements = [list(_COLUMNS)], list[bool]()
    for name, measurement in measured.qbatch.items():
        why, own = measurement.details.why, measured.own[name]
        busy_s, alone_s = why.profile.device_busy_s, why.kernels_alone.step_s
        pair = [_ratio(busy_s, own.busy_s), _ratio(alone_s, own.alone_s)]
        spread = measurement.details.by_round(Phase.DECODE).spread
        eager = _ratio(measurement.decode_tokens_per_s, own.eager_tokens_per_s)
        # Eager decoding depends on the host, whose speed varies, so it only has to agree within its own spread.
        agreements += _within(eager, max(spread or 0.0, _TOLERANCE))
        agreements += [within for ratio in pair for within in _within(ratio, _TOLERANCE)]
        cells.append(
            [
                name,
                show(measurement.decode_tokens_per_s, ".1f"),
                *(show(spread, ".0%"), show(own.eager_tokens_per_s, ".1f"), show(eager, ".2f")),
                *(show(busy_s and busy_s * 1e3, ".2f"), show(own.busy_s and own.busy_s * 1e3, ".2f")),
                show(pair[0], ".3f"),
                *(show(alone_s and alone_s * 1e3, ".2f"), show(own.alone_s and own.alone_s * 1e3, ".2f")),
                show(pair[1], ".3f"),
                show(why.profile.launches, ".0f"),
                show(why.profile.synchronizations, ".0f"),
                str(why.verdict or why.reason or "–"),
                show(why.energy.decode.gross_j_per_token, ".3f"),
                show(why.energy.decode.net_j_per_token, ".3f"),
            ]
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    agree = all(agreements)
    verdict = f"{len(agreements)} pairs compared, {'all within' if agree else 'NOT ALL WITHIN'} their tolerance"
    return [f"{shape} on {device_name}", *lines, *_remarks(measured), verdict], agree


def _within(ratio: float | None, tolerance: float) -> list[bool]:
    """Whether the ratio is within ``tolerance`` of 1; empty if there was nothing to compare."""
    return [] if ratio is None else [abs(ratio - 1) <= tolerance]


def _remarks(measured: BothSides) -> Iterator[str]:
    for name, measurement in measured.qbatch.items():
        why = measurement.details.why
        if raised := [flag for flag, is_raised in (measurement.details.flags or {}).items() if is_raised]:
            yield f"{name}: unfair conditions: {', '.join(raised)}"
        for part, reason in (("kernels alone", why.kernels_alone.reason), ("energy", why.energy.reason)):
            if reason:
                yield f"{name}: no {part}: {reason}"
    known = (one.details.why.roofs for one in measured.qbatch.values())
    roofs = next((one for one in known if one.copy_bytes_per_s and one.matmul_flops_per_s), None)
    if roofs:
        yield (
            f"roofs: copy {(roofs.copy_bytes_per_s or 0) / 1e9:.0f} GB/s, "
            f"{roofs.dtype} product {(roofs.matmul_flops_per_s or 0) / 1e12:.0f} TFLOP/s"
        )


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _log(text: str) -> None:
    print(f"{time.perf_counter() - _BEGIN_S:5.0f} s  {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--no-energy",
        dest="energy",
        action="store_false",
        help="do not measure energy, which takes half a minute for each model",
    )
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary directory)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not installed_gpus():
        print("this machine has no NVIDIA GPU, so there is nothing to analyze")
        return 0
    os.environ["HF_HUB_OFFLINE"] = "1"
    import_for_forks([arguments.shape])
    work = Path(tempfile.mkdtemp(prefix="qbatch-why-", dir=arguments.folder))
    try:
        lines, agree = _in_folder(arguments, work)
    finally:
        shutil.rmtree(work)
    print("\n".join(lines))
    return 0 if agree else 1


def _in_folder(arguments: argparse.Namespace, work: Path) -> tuple[list[str], bool]:
    device = "cuda:0" if arguments.device == "cuda" else "cpu"
    dtype = DType(SHAPES[arguments.shape][1])
    _log("building and quantizing")
    source = work / "source"
    in_fresh_process(build_source, arguments.shape, source)
    folders = in_fresh_process(write_quantized, source, work, dtype, device)
    measured = in_fresh_process(measure, folders, dtype, device, work, arguments.energy)
    device_name = next(iter(measured.qbatch.values())).device_name
    return table(arguments.shape, device_name, measured)


if __name__ == "__main__":
    raise SystemExit(main())
