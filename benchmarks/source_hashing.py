"""The cost of identifying sources by content: hashing a source, compared with quantizing it.

    python -m benchmarks.source_hashing
    python -m benchmarks.source_hashing --shape llama-8b --device cuda

Builds a source with random weights. Then it times in turn, each in a process of its own: hashing the source with and
without its files in the page cache; looking up digests that are known, and confirming them after use; and the pass that
writes NF4 and int8, alone and after hashing, also with and without the files in the page cache. Hashing is also timed
without the processor's SHA instructions. Prints a table at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks.quantize import GIB, Task, import_for_forks, in_fresh_process, streamed
from benchmarks.random_source import SHAPES, build_source
from qbatch.core.digest import Checksums
from qbatch.core.domain import DType
from qbatch.core.file_stat import FileStat
from qbatch.core.model_files import content_files
from qbatch.worker.files.content import Content, NoDigestCache, hash_content
from qbatch.worker.machine.gpu import installed_gpus

# OpenSSL's mask that disables SHA-NI, and also AVX2, AVX-512 and BMI2, which its second fastest code uses.
_NO_SHA = "~0x0:~0x20000000"
_HASH = (
    "import sys; from pathlib import Path; from benchmarks.source_hashing import hash_s; "
    "print(hash_s(Path(sys.argv[1])))"
)


class _MemoryDigestCache:
    """Keeps digests in memory instead of the database."""

    def __init__(self) -> None:
        self.digests: dict[FileStat, Checksums] = {}

    def known(self, stats: Iterable[FileStat]) -> Mapping[FileStat, Checksums]:
        return {stat: self.digests[stat] for stat in stats if stat in self.digests}

    def remember(self, digests: Mapping[FileStat, Checksums]) -> None:
        self.digests |= digests


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _hash(source: Path) -> Content:
    return hash_content(lambda: content_files(source), NoDigestCache())


def hash_s(source: Path) -> float:
    return _timed(lambda: _hash(source))


def known_s(source: Path) -> tuple[float, float]:
    """Seconds to look up digests that are known, and to confirm them."""
    cache = _MemoryDigestCache()
    hash_content(lambda: content_files(source), cache)
    contents: list[Content] = []
    lookup_s = _timed(lambda: contents.append(hash_content(lambda: content_files(source), cache)))
    return lookup_s, _timed(contents[0].confirm)


def pass_s(task: Task, *, hashed: bool) -> float:
    """Seconds for the quantizing pass, with ``hashed`` including hashing the source first."""
    hashing_s = hash_s(task.source) if hashed else 0.0
    return hashing_s + streamed(task).total_s


def drop_from_cache(source: Path) -> None:
    for path in source.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def without_sha_s(source: Path) -> float:
    env = os.environ | {"OPENSSL_ia32cap": _NO_SHA}
    done = subprocess.run([sys.executable, "-c", _HASH, str(source)], env=env, check=True, capture_output=True)
    return float(done.stdout)


def measure(arguments: argparse.Namespace, source: Path, work: Path) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)
        print(f"  {name}: {seconds:.3f} s", file=sys.stderr, flush=True)

    for _ in range(arguments.repeats):
        for cold in (False, True):
            where = "cold" if cold else "warm"
            for name, hashed in (("pass", False), ("hash + pass", True)):
                if cold:
                    drop_from_cache(source)
                folder = work / "out"
                task = Task(
                    source=source, folder=folder, schemes=("nf4", "int8"), dtype=DType(SHAPES[arguments.shape][1]),
                    device="cuda:0" if arguments.device == "cuda" else "cpu", check=False,
                )  # fmt: skip
                note(f"{name}, {where}", in_fresh_process(pass_s_hashed if hashed else pass_s_alone, task))
                shutil.rmtree(folder)
            if cold:
                drop_from_cache(source)
            note(f"hash, {where}", in_fresh_process(hash_s, source))
        lookup_s, confirmed_s = in_fresh_process(known_s, source)
        note("known", lookup_s)
        note("confirm", confirmed_s)
        note("hash, warm, no SHA instructions", without_sha_s(source))
    return times


def pass_s_alone(task: Task) -> float:
    return pass_s(task, hashed=False)


def pass_s_hashed(task: Task) -> float:
    return pass_s(task, hashed=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if installed_gpus() else "cpu")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary directory)")
    arguments = parser.parse_args()
    arguments.shape = arguments.shape or ("llama-8b" if arguments.device == "cuda" else "300m")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import_for_forks([arguments.shape])
    work = Path(tempfile.mkdtemp(prefix="qbatch-bench-", dir=arguments.folder))
    try:
        nbytes = in_fresh_process(build_source, arguments.shape, work / "source")
        # Only files that have not changed recently are cached, so wait for more than two clock ticks.
        time.sleep(3)
        times = measure(arguments, work / "source", work)
    finally:
        shutil.rmtree(work)
    print(f"\n{arguments.shape} on {arguments.device}, {nbytes / GIB:.2f} GiB, medians of {arguments.repeats}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:34}{median:10.3f} s{nbytes / GIB / median:10.2f} GiB/s  {min(seconds):.3f} to {max(seconds):.3f}")


if __name__ == "__main__":
    main()
