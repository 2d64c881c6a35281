"""Compares batches with a plain script in steps, as many as fit into the time.

    python -m benchmarks.gpu_targets                      (for 9 minutes; again for the steps that are left)
    python -m benchmarks.gpu_targets --step alike         (that step alone)
    python -m benchmarks.gpu_targets --step plain --step whole --repeats 3      (in turns, three times)
    python -m benchmarks.gpu_targets --device cpu --shape tiny --fine-tuned tiny --fine-tunes 2

The steps: the plain script on all shapes; qbatch on the same; qbatch without what limits decoding; fine-tunes of one
shape at 4 bits, and at 8 and 4, one of which is timed for all (``--speed shape``); and how often two rows of one model
appear different. Of the fine-tunes the plain script's time is computed: its imports, and its time for one model of the
shape as often as there are fine-tunes. What a step found stays in ``--folder``, with the logs of its runners, so a run
that was cut short goes on where it was. Prints the table of what is known.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.batch import LOGS, Side, compile_imports, figure_table, run_plain, run_qbatch, stage_table
from benchmarks.quantize import in_fresh_process
from benchmarks.random_source import SHAPES, build_source, build_tokenizer
from benchmarks.report import log
from qbatch.commands.request_options import EACH, OF_A_SHAPE
from qbatch.worker.machine.gpu import installed_gpus

_ALIKE = "tests/gpu/test_rounds.py::test_of_two_rows_of_one_model_hardly_any_appears_faster"
_COUNTS = re.compile(r"^\{.*\}", re.MULTILINE)
_CHANGED_BYTES = 1 << 20
_FOLDER = Path(tempfile.gettempdir()) / "qbatch-gpu-targets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """``expected_s`` is for three shapes and ten fine-tunes on an H200, its models included. ``number``: which of its
    repetitions it is."""

    name: str
    expected_s: float
    run: Callable[[str], Mapping[str, Any]]
    number: int = 1

    @property
    def outcome(self) -> str:
        return _outcome(self.name, self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What a step of qbatch is compared with. ``widths`` of each fine-tune; None for the plain script's whole run."""

    step: str
    what: str
    widths: tuple[int, ...] | None
    at_most: float


class Progress:
    """Steps whose outcomes are files in a folder."""

    def __init__(self, arguments: Namespace) -> None:
        self._arguments = arguments
        self._folder: Path = arguments.folder.absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        compared = (
            Step(name="plain", expected_s=240, run=lambda name: self._side(name, run_plain, self._shapes())),
            Step(name="whole", expected_s=170, run=lambda name: self._side(name, run_qbatch, self._shapes())),
            Step(
                name="no-why", expected_s=155, run=lambda name: self._side(name, run_qbatch, self._shapes(), why=False)
            ),
        )
        self.steps = (
            *(replace(step, number=number) for number in range(1, arguments.repeats + 1) for step in compared),
            Step(name="fine-tunes-4", expected_s=85, run=lambda name: self._tuned(name, "4")),
            Step(name="fine-tunes-84", expected_s=290, run=lambda name: self._tuned(name, "8,4")),
            Step(name="alike", expected_s=60, run=lambda _: self._alike()),
        )

    def go_on(self) -> None:
        """Do the steps that are left, in order, up to one that would take too long. Unless steps are chosen, none is
        done before its turn: the disk may hold the fine-tunes only once the other shapes are no longer needed."""
        ends = time.monotonic() + self._arguments.seconds
        compile_imports(self._folder / "bytecode")
        for step in self.steps:
            left_s = ends - time.monotonic()
            if self.outcome(step.outcome) is not None or step.name not in (self._arguments.steps or [step.name]):
                continue
            if step.expected_s > left_s:
                log(f"{step.outcome}: takes about {step.expected_s:g} s, and {left_s:.0f} s are left")
                return
            log(f"{step.outcome}: about {step.expected_s:g} s")
            outcome = step.run(step.outcome)
            self._file(step.outcome).write_text(json.dumps(outcome))

    def outcome(self, name: str) -> dict[str, Any] | None:
        file = self._file(name)
        found: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
        return found

    def pairs(self, name: str) -> list[tuple[Side, Side]]:
        """What the plain script and this step took, of each repetition that has both."""
        sides = [[self.side(one, number) for one in ("plain", name)] for number in self._numbers()]
        return [(plain, ours) for plain, ours in sides if plain is not None and ours is not None]

    def side(self, name: str, number: int = 1) -> Side | None:
        found = self.outcome(_outcome(name, number))
        if found is None:
            return None
        rows = {(model, bits): figures for model, bits, figures in found["rows"]}
        return Side(total_s=found["total_s"], stages_s=found["stages_s"], rows=rows)

    def _numbers(self) -> Iterator[int]:
        """Of the repetitions that were begun, whatever number was asked for now."""
        return itertools.takewhile(
            lambda number: self.outcome(_outcome("plain", number)) is not None, itertools.count(1)
        )

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _side(
        self,
        name: str,
        run: Callable[..., Side],
        models: Sequence[Path],
        bits: str = "8,4",
        *,
        why: bool = True,
        speed: str = EACH,
    ) -> Mapping[str, Any]:
        work = self._folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        # Checkpoints at 8 and 4 bits take about as much as their model, and qbatch waits where there is no room.
        needed = sum(file.stat().st_size for model in models for file in model.iterdir())
        if (free := shutil.disk_usage(work).free) < needed:
            raise RuntimeError(f"{needed / 1e9:.0f} GB are needed in {work}, and {free / 1e9:.0f} are free")
        try:
            side = run(models, work, Namespace(bits=bits, why=why, speed=speed, device=self._arguments.device))
        finally:
            self._keep_logs(work / LOGS, name)
        shutil.rmtree(work)
        rows = [[model, width, figures] for (model, width), figures in side.rows.items()]
        return {"total_s": side.total_s, "stages_s": side.stages_s, "rows": rows}

    def _keep_logs(self, logs: Path, name: str) -> None:
        if logs.exists():
            kept = self._folder / LOGS / name
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            shutil.move(logs, kept)

    def _tuned(self, name: str, bits: str) -> Mapping[str, Any]:
        speed = OF_A_SHAPE if self._arguments.device == "cuda" else EACH  # a CPU's speed is not shared
        return self._side(name, run_qbatch, self._fine_tunes(), bits, speed=speed)

    def _shapes(self) -> list[Path]:
        return [self._model(shape) for shape in self._arguments.shapes]

    def _model(self, shape: str) -> Path:
        folder = self._folder / "models" / shape
        if not folder.exists():
            half = folder.with_name("half")
            shutil.rmtree(half, ignore_errors=True)
            in_fresh_process(build_source, shape, half)
            build_tokenizer(half)
            half.rename(folder)
        return folder

    def _fine_tunes(self) -> list[Path]:
        """As many models of one shape. A megabyte of the weights of each is its own."""
        first = self._model(self._arguments.fine_tuned)
        # Checkpoints take as much again.
        needed = 2 * self._arguments.fine_tunes * sum(file.stat().st_size for file in first.iterdir())
        if shutil.disk_usage(first).free < needed:
            for shape in set(self._arguments.shapes) - {self._arguments.fine_tuned}:
                shutil.rmtree(first.with_name(shape), ignore_errors=True)
        made = [first.with_name(f"fine-tune-{number}") for number in range(self._arguments.fine_tunes)]
        for number, folder in enumerate(made):
            if not folder.exists():
                shutil.copytree(first, folder)
                _tune(folder / "model.safetensors", number)
        return made

    def _alike(self) -> Mapping[str, Any]:
        if self._arguments.device != "cuda":
            return {"said": "needs a GPU"}
        done = subprocess.run(
            # Of what libraries warn when they are compiled, the test says nothing.
            [sys.executable, "-P", "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-W", "default", _ALIKE],
            capture_output=True,
            text=True,
            check=False,
        )
        counts = _COUNTS.findall(done.stdout)
        return {"said": f"{counts[0]} of 30 repetitions" if counts else done.stdout[-2000:]}


def _outcome(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _tune(weights: Path, number: int) -> None:
    """Change bits of the last values that hardly change these."""
    size = weights.stat().st_size
    begin = size - min(_CHANGED_BYTES, size // 2) // 2 * 2
    with weights.open("r+b") as file:
        file.seek(begin)
        values = bytearray(file.read())
        # The lower byte of each 16-bit value: half of it is its last bits of precision.
        values[::2] = bytes(low ^ (number + 1) & 0x0F for low in values[::2])
        file.seek(begin)
        file.write(values)


def plain_s(plain: Side, fine_tuned: str, copies: int, widths: Sequence[int]) -> float:
    """What the plain script would take for ``copies`` models of a shape, by its time for one of them."""
    one_s = sum(float(plain.rows[fine_tuned, width]["row_s"]) for width in widths)
    return plain.stages_s["imports"] + copies * one_s


def table(progress: Progress, arguments: Namespace) -> Iterator[str]:
    shapes = ", ".join(arguments.shapes)
    tuned = f"{arguments.fine_tunes} fine-tunes of {arguments.fine_tuned}"
    aims = (
        Aim(step="whole", what=f"{shapes} at 16, 8 and 4 bits", widths=None, at_most=0.6),
        Aim(step="no-why", what="the same, --no-why", widths=None, at_most=0.45),
        Aim(step="fine-tunes-4", what=f"{tuned} at 16 and 4 bits", widths=(16, 4), at_most=0.25),
        Aim(step="fine-tunes-84", what="the same at 16, 8 and 4 bits", widths=(16, 8, 4), at_most=0.4),
    )
    yield "| batch | plain script | qbatch | share | target |"
    yield "|---|---|---|---|---|"
    for aim in aims:
        yield _line(aim, progress, arguments)
    alike = progress.outcome("alike")
    yield f"rows of one model that appear different: {'not asked yet' if alike is None else alike['said']}"


def _line(aim: Aim, progress: Progress, arguments: Namespace) -> str:
    """Medians, and the share of each repetition."""
    computed = ""
    if aim.widths is None:
        times_s = [(plain.total_s, ours.total_s) for plain, ours in progress.pairs(aim.step)]
    else:
        plain, ours = progress.side("plain"), progress.side(aim.step)
        times_s = []
        if plain is not None and ours is not None and arguments.fine_tuned in arguments.shapes:
            times_s = [(plain_s(plain, arguments.fine_tuned, arguments.fine_tunes, aim.widths), ours.total_s)]
            computed = " (computed)"
    if not times_s:
        return f"| {aim.what} | – | – | – | {aim.at_most} |"
    theirs_s, ours_s = (statistics.median(side) for side in zip(*times_s, strict=True))
    shares = [ours_s / theirs_s for theirs_s, ours_s in times_s]
    each = f" ({', '.join(f'{share:.2f}' for share in shares)})" if len(shares) > 1 else ""
    return (
        f"| {aim.what} | {theirs_s:.1f} s{computed} | {ours_s:.1f} s "
        f"| {statistics.median(shares):.2f}{each} | {aim.at_most} |"
    )


def _details(progress: Progress) -> Iterator[str]:
    """Stage by stage, and the figures of both sides beside each other."""
    for name in ("whole", "no-why"):
        if pairs := progress.pairs(name):
            plain, ours = ([pair[which] for pair in pairs] for which in (0, 1))
            yield f"-- {name}"
            yield from stage_table(plain, ours)
            yield from figure_table(plain, ours)[0]
    for name in ("fine-tunes-4", "fine-tunes-84"):
        if (tuned := progress.side(name)) is not None:
            yield f"-- {name}: {tuned.total_s:.1f} s"
            yield from (f"  {seconds:8.1f}  {stage}" for stage, seconds in tuned.stages_s.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", dest="shapes", help="repeat it for several")
    parser.add_argument("--fine-tuned", choices=SHAPES, default="llama-1b")
    parser.add_argument("--fine-tunes", type=int, default=10)
    parser.add_argument(
        "--step", action="append", dest="steps", help="only this one, if it is left; repeat it for several"
    )
    parser.add_argument("--repeats", type=int, default=1, help="of the plain script and what is compared with it")
    parser.add_argument("--seconds", type=float, default=540.0, help="how long to go on (default: 540)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if installed_gpus() else "cpu")
    parser.add_argument("--folder", type=Path, default=_FOLDER, help="60 GB for the usual shapes")
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or ["llama-1b", "llama-3b", "llama-8b"]
    os.environ["HF_HUB_OFFLINE"] = "1"
    progress = Progress(arguments)
    progress.go_on()
    print("\n".join([*_details(progress), *table(progress, arguments)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
