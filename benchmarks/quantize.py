"""Compares qbatch's streaming writer with what a user would do without it.

    python -m benchmarks.quantize
    python -m benchmarks.quantize --shape llama-8b --device cuda

Without options, it measures an 8B and a 1.7B model if there is a GPU, else a model of 300M parameters on the CPU. It
builds a source with random weights, then measures both sides in turn, each in a process of its own, so that memory
peaks are correct. Source files are in the page cache. Neither side syncs to disk. Prints a table at the end, and exits
with 1 if the files of the two sides differ.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.random_source import SHAPES, build_source, pwrite_all
from benchmarks.report import log
from qbatch.core.digest import digest_file, root_sha256
from qbatch.core.domain import DType, Method, Scheme
from qbatch.worker.machine.gpu import installed_gpus
from qbatch.worker.machine.imports import MODEL_LIBRARIES, import_without_gpu

GIB = 2**30
_SCHEMES = {
    "nf4": Scheme(method=Method.NF4),
    "nf4-double": Scheme.of(Method.NF4, double_quant=True),
    "fp4": Scheme(method=Method.FP4),
    "int8": Scheme(method=Method.INT8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One side's work on a source."""

    source: Path
    folder: Path
    schemes: tuple[str, ...]
    dtype: DType
    device: str
    check: bool
    """Whether to verify the checksums that the writer returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOutcome:
    """``seconds`` by scheme, or for all schemes together. ``host_growth_bytes`` is the growth of the process's memory
    after all imports."""

    seconds: dict[str, float]
    host_growth_bytes: int
    device_peak_bytes: int
    written_bytes: int

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


def write_ceiling(folder: Path, nbytes: int, files: int) -> float:
    """The highest rate, in bytes per second, at which this machine writes ``files`` files at once, with one thread per
    file and with 4 and 8 threads in total. Each is measured twice, because memory is slower when first used."""
    tile = memoryview(os.urandom(2**20) * 16)
    return max(_write_rate(folder, nbytes, threads, files, tile) for threads in (files, 4, 8) for _ in range(2))


def _write_rate(folder: Path, nbytes: int, threads: int, files: int, tile: memoryview) -> float:
    paths = [folder / f"ceiling-{number}" for number in range(files)]
    descriptors = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666) for path in paths]
    pieces = nbytes // len(tile)
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda n: pwrite_all(descriptors[n % files], tile, n // files * len(tile)), range(pieces)))
    elapsed_s = time.perf_counter() - start
    for descriptor, path in zip(descriptors, paths, strict=True):
        os.close(descriptor)
        path.unlink()
    return pieces * len(tile) / elapsed_s


def baseline(task: Task) -> QuantizeOutcome:
    """from_pretrained + save_pretrained, once per scheme."""
    import torch
    from transformers import AutoConfig

    from qbatch.worker.methods.implementations import weights_of
    from qbatch.worker.models.architecture import model_class

    cls = model_class(AutoConfig.from_pretrained(task.source))
    seconds = {}
    with _peaks(task.device) as peaks:
        for name in task.schemes:
            start = time.perf_counter()
            scheme = _SCHEMES[name].resolved(task.dtype)
            model = cls.from_pretrained(
                task.source,
                quantization_config=weights_of(scheme.description).quantization_config(scheme, None),
                dtype=getattr(torch, task.dtype.value),
                device_map={"": task.device},
            )
            model.save_pretrained(task.folder / name)
            seconds[name] = time.perf_counter() - start
            del model
    return QuantizeOutcome(seconds=seconds, **peaks, written_bytes=_bytes_in(task.folder))


def streamed(task: Task) -> QuantizeOutcome:
    """qbatch's writer, with all schemes in one pass."""
    from qbatch.worker.quantizing import Target, Written, write_checkpoints

    targets = []
    for name in task.schemes:
        (task.folder / name).mkdir(parents=True)
        targets.append(Target(scheme=_SCHEMES[name].resolved(task.dtype), folder=task.folder / name))
    with _peaks(task.device) as peaks:
        start = time.perf_counter()
        results = list(
            write_checkpoints(task.source, targets, dtype=task.dtype, device=task.device, on_progress=lambda *_: None)
        )
        elapsed_s = time.perf_counter() - start
    for result in results:
        if not isinstance(result, Written):
            raise result.error
        for digest in result.files if task.check else ():
            if digest != digest_file(result.target.folder / digest.name):
                raise ValueError(f"{digest.name}: the checksums do not match the file")
    return QuantizeOutcome(seconds={"+".join(task.schemes): elapsed_s}, **peaks, written_bytes=_bytes_in(task.folder))


@contextmanager
def _peaks(device: str) -> Iterator[dict[str, int]]:
    """Measures the growth of peak host memory since entry, and the peak device memory that torch reserved."""
    import psutil
    import torch

    on_cuda = device != "cpu"
    if on_cuda:
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats()
    process, stop = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss
    peaks: dict[str, int] = {}

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        stop.set()
        watcher.join()
    peaks["host_growth_bytes"] = peak - before
    peaks["device_peak_bytes"] = torch.cuda.max_memory_reserved() if on_cuda else 0


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def import_for_forks(shapes: Sequence[str]) -> None:
    """Import what every fork starts with: torch, transformers, and the models of ``shapes``. CUDA is left to the forks:
    transformers imports torchao where it is installed, which would start CUDA here."""
    import_without_gpu(MODEL_LIBRARIES)
    import transformers

    for shape in shapes:
        # transformers imports a model's module when one of its attributes is first accessed.
        getattr(transformers, SHAPES[shape][0])


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` in a fork of this process, which has imported torch and transformers, but not started CUDA."""
    with multiprocessing.get_context("fork").Pool(1, initializer=_finish_imports) as pool:
        return pool.apply(function, args)


def _finish_imports() -> None:
    import logging
    import warnings

    import transformers

    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import bitsandbytes  # noqa: F401
    import transformers.integrations.bitsandbytes

    import qbatch.worker.quantizing.streaming.stream  # noqa: F401


def same_files(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same weight files (and index), byte for byte, and equal config.json."""
    names = {path.name for path in one.iterdir()}
    if names != {path.name for path in other.iterdir()}:
        return False
    configs = {name for name in names if name.endswith("config.json")}
    roots = [root_sha256([digest_file(folder / name) for name in names - configs]) for folder in (one, other)]
    texts = [{name: json.loads((folder / name).read_text()) for name in configs} for folder in (one, other)]
    return roots[0] == roots[1] and texts[0] == texts[1]


def measure(arguments: argparse.Namespace, shape: str, work: Path) -> bool:
    device = "cuda:0" if arguments.device == "cuda" else "cpu"
    dtype, schemes = DType(arguments.dtype or SHAPES[shape][1]), tuple(arguments.schemes.split(","))
    source = work / "source"
    source_bytes = in_fresh_process(build_source, shape, source)
    ceilings = {
        # A rate needs several pieces, of however small a model.
        files: in_fresh_process(write_ceiling, work, min(max(source_bytes, GIB // 2), 4 * GIB), files)
        for files in sorted({1, len(schemes)})
    }
    log(f"{shape}: source {source_bytes / GIB:.2f} GiB; {_show_ceilings(ceilings)}")
    runs: dict[str, list[QuantizeOutcome]] = {"baseline": [], "all": [], **{name: [] for name in schemes}}
    identical = True
    for repeat in range(arguments.repeats):
        for label in runs:
            folder = work / label
            chosen = schemes if label in ("baseline", "all") else (label,)
            task = Task(source=source, folder=folder, schemes=chosen, dtype=dtype, device=device, check=repeat == 0)
            outcome = in_fresh_process(baseline if label == "baseline" else streamed, task)
            runs[label].append(outcome)
            log(f"  {repeat + 1}/{arguments.repeats} {label}: {outcome.total_s:.2f} s")
            if label not in ("baseline", "all"):
                shutil.rmtree(folder)
        if repeat == 0:
            same = [in_fresh_process(same_files, work / "baseline" / name, work / "all" / name) for name in schemes]
            identical = all(same)
        for label in ("baseline", "all"):
            shutil.rmtree(work / label)
    print_table(shape, device, schemes, runs, ceilings, identical)
    return identical


def print_table(
    shape: str,
    device: str,
    schemes: tuple[str, ...],
    runs: dict[str, list[QuantizeOutcome]],
    ceilings: Mapping[int, float],
    identical: bool,
) -> None:
    print(f"\n{shape} on {device}, medians of {len(runs['all'])}; files identical: {'yes' if identical else 'NO'}")
    print(_show_ceilings(ceilings))
    print(f"{'':12}{'baseline s':>12}{'qbatch s':>10}{'faster':>8}{'of ceiling':>12}{'host GiB':>16}{'device GiB':>16}")
    base = runs["baseline"]
    for label, names in [(name, (name,)) for name in schemes] + ([("all", schemes)] if len(schemes) > 1 else []):
        ours = runs[label]
        pairs = [
            (sum(one.seconds[name] for name in names), other.total_s) for one, other in zip(base, ours, strict=True)
        ]
        before_s, after_s = (statistics.median(side) for side in zip(*pairs, strict=True))
        faster = statistics.median(one / other for one, other in pairs)
        share = ours[0].written_bytes / after_s / ceilings[len(names)]
        host = [max(run.host_growth_bytes for run in side) / GIB for side in (base, ours)]
        card = [max(run.device_peak_bytes for run in side) / GIB for side in (base, ours)]
        print(
            f"{label:12}{before_s:12.2f}{after_s:10.2f}{faster:7.2f}x{share:12.0%}"
            f"{f'{host[0]:.2f} → {host[1]:.2f}':>16}{f'{card[0]:.2f} → {card[1]:.2f}':>16}"
        )


def _show_ceilings(ceilings: Mapping[int, float]) -> str:
    rates = " and ".join(f"{rate / GIB:.2f} GiB/s to {files} at once" for files, rate in ceilings.items())
    return f"highest write rate: {rates}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", dest="shapes", help="repeat it for several")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if installed_gpus() else "cpu")
    parser.add_argument("--schemes", default="nf4,int8", help=f"of {', '.join(_SCHEMES)}")
    parser.add_argument(
        "--dtype", choices=[d.value for d in DType if d is not DType.AUTO], help="default: the source's"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary directory)")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    shapes = arguments.shapes or (["llama-8b", "bloom-1b7"] if arguments.device == "cuda" else ["300m"])
    import_for_forks(shapes)
    identical = [_measure_in_folder(arguments, shape) for shape in shapes]
    return 0 if all(identical) else 1


def _measure_in_folder(arguments: argparse.Namespace, shape: str) -> bool:
    work = Path(tempfile.mkdtemp(prefix="qbatch-bench-", dir=arguments.folder))
    try:
        return measure(arguments, shape, work)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    raise SystemExit(main())
