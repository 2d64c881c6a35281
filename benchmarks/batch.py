"""Compares a batch with qbatch with a plain script that does the same.

    python -m benchmarks.batch
    python -m benchmarks.batch --shape llama-1b --shape llama-3b --shape llama-8b --repeats 3
    python -m benchmarks.batch --shape llama-3b --copies 10 --bits 4 --no-why

The models have random weights. Both sides measure each at 16 bits and at the widths of ``--bits``, in turns:
``benchmarks.plain_batch`` in a process of its own, and ``qbatch run`` with a database of its own, from its start to its
end. Prints the seconds of each stage of both sides and the figures of both. Exits with 1 if they disagree: decoding by
more than 3 % or two standard errors, whichever is smaller; perplexity by more than 0.5 %; KL by more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import benchmarks.plain_batch
from benchmarks.quantize import in_fresh_process
from benchmarks.random_source import SHAPES, build_source, build_tokenizer
from benchmarks.report import log, show
from qbatch.commands.request_options import EACH, OF_A_SHAPE
from qbatch.core.domain import DeviceKind, ProtocolOptions
from qbatch.worker.machine.gpu import installed_gpus
from qbatch.worker.measuring import DEFAULT_EVAL_TEXT
from qbatch.worker.serving.runner_forkserver import PRELOADED

LOGS = "logs"
"""The folder in ``work`` where the runners' logs of the last run of qbatch are."""
_RATE_TOLERANCE, _PERPLEXITY_TOLERANCE, _KL_TOLERANCE = 0.03, 0.005, 0.05
# A line of a runner's log: its time, and what the jobs do from then on.
_STEP = re.compile(r"^(\S+ \S+) qbatch\.runner INFO (?:j\d+(?:, )?)+: (?!attempt \d)(.+)$", re.MULTILINE)
_COUNT = re.compile(r" \d+/\d+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side's run: its wall time, the seconds of its stages, and the figures of each row (model, bits)."""

    total_s: float
    stages_s: Mapping[str, float]
    rows: Mapping[tuple[str, int], Mapping[str, Any]]


def run_plain(models: Sequence[Path], work: Path, arguments: argparse.Namespace) -> Side:
    folder = work / "plain"
    argv = [
        *(sys.executable, "-m", benchmarks.plain_batch.__name__, *map(str, models), "--text", str(DEFAULT_EVAL_TEXT)),
        *("--folder", str(folder), "--bits", arguments.bits, "--device", _device(arguments)),
        *("--window", str(_window(arguments))),
    ]
    begin_s = time.perf_counter()
    with (work / "plain.log").open("ab") as log:
        answer = subprocess.run(argv, stdout=subprocess.PIPE, stderr=log, check=True).stdout
    total_s = time.perf_counter() - begin_s
    shutil.rmtree(folder)
    said = json.loads(answer)
    rows = {(row["model"], row["bits"]): row for row in said["rows"]}
    return Side(total_s=total_s, stages_s=said["seconds"], rows=rows)


def run_qbatch(models: Sequence[Path], work: Path, arguments: argparse.Namespace) -> Side:
    home = work / "qbatch"
    listed = work / "models.txt"
    listed.write_text("".join(f"{model}\n" for model in models))
    argv = [sys.executable, "-m", "qbatch", "run", "--models", str(listed), "--bits", arguments.bits]
    argv += ["--device", arguments.device, "--format", "json", "--speed", arguments.speed]
    argv += [] if arguments.why else ["--no-why"]
    begin_s = time.perf_counter()
    with (work / "qbatch.log").open("ab") as log:
        done = subprocess.run(
            argv, stdout=subprocess.PIPE, stderr=log, check=False, env=os.environ | {"QBATCH_HOME": str(home)}
        )
    total_s = time.perf_counter() - begin_s
    logs = work / LOGS
    shutil.rmtree(logs, ignore_errors=True)
    if (of_runners := home / "storage" / "logs").exists():
        shutil.move(of_runners, logs)
    done.check_returncode()
    rows = {(Path(row["model"]).name, row["bits"]): _figures(row) for row in json.loads(done.stdout)}
    stages = _stages(logs)
    shutil.rmtree(home)
    stages["start, end and waiting"] = total_s - sum(stages.values())
    return Side(total_s=total_s, stages_s=stages, rows=rows)


def compile_imports(folder: Path) -> None:
    """Have all processes from now on read compiled modules, as an installation that pip has made has them: without
    them each process compiles thousands, and qbatch has more processes than the plain script."""
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    names = ("benchmarks.plain_batch", "bitsandbytes", "qbatch.cli", *PRELOADED[DeviceKind.CPU])
    subprocess.run([sys.executable, "-c", f"import {', '.join(names)}"], check=True, stderr=subprocess.DEVNULL)


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["state"] != "succeeded":
        raise RuntimeError(f"{row['model']} at {row['bits']} bits: {row['state']}, {row['error_message']}")
    # Rounds of another model are no runs of this one.
    means_s = [] if row["speed_from"] else row["details"]["rounds"]["phases"]["decode"]["mean"]
    return {
        "decode_tokens_per_s": row["decode_tokens_per_s"],
        "decode_runs": [(row["details"]["shapes"]["new_tokens"] - 1) / mean_s for mean_s in means_s],
        "prefill_s": row["prefill_s_p50"],
        "perplexity": row["perplexity"],
        "kl_mean": row["kl_mean"],
    }


def _stages(logs: Path) -> dict[str, float]:
    """Seconds of each stage by the runners' logs, whose lines say what begins. A bundle's last line has no end here."""
    seconds: dict[str, float] = {}
    for path in sorted(logs.rglob("*.log")):
        steps = [
            (datetime.fromisoformat(moment.replace(",", ".")), what) for moment, what in _STEP.findall(path.read_text())
        ]
        for (begin, what), (end, _) in pairwise(steps):
            name = _COUNT.sub("", what)
            seconds[name] = seconds.get(name, 0.0) + (end - begin).total_seconds()
    return seconds


def _device(arguments: argparse.Namespace) -> str:
    return "cuda:0" if arguments.device == "cuda" else "cpu"


def _window(arguments: argparse.Namespace) -> int:
    """The tokens of a window in qbatch's protocol for the device."""
    return ProtocolOptions(eval_text_sha256="").for_device(DeviceKind(arguments.device)).eval_window


# The tables


def stage_table(plain: Sequence[Side], qbatch: Sequence[Side]) -> Iterator[str]:
    """The median seconds of each stage."""
    for title, sides in (("plain script", plain), ("qbatch", qbatch)):
        yield f"{title}: {_median(side.total_s for side in sides):.1f} s"
        names = dict.fromkeys(name for side in sides for name in side.stages_s)
        for name in names:
            yield f"  {_median(side.stages_s.get(name, 0.0) for side in sides):8.1f}  {name}"
    ratios = [ours.total_s / theirs.total_s for theirs, ours in zip(plain, qbatch, strict=True)]
    yield f"qbatch takes {_median(ratios):.2f} of the plain script's time ({', '.join(f'{r:.2f}' for r in ratios)})"


def figure_table(plain: Sequence[Side], qbatch: Sequence[Side]) -> tuple[list[str], bool]:
    """(the lines of the table, whether all figures agree)."""
    lines = [f"{'':24}{'decode tok/s':>16}{'tolerance':>11}{'lowest and highest run':>26}{'perplexity':>18}{'KL':>22}"]
    agree = True
    for key in plain[0].rows:
        rates = [[float(side.rows[key]["decode_tokens_per_s"] or 0) for side in sides] for sides in (plain, qbatch)]
        tolerance = min(_RATE_TOLERANCE, 2 * _relative_error(rates))
        pairs = {
            name: [sides[0].rows[key].get(name) for sides in (plain, qbatch)] for name in ("perplexity", "kl_mean")
        }
        checks = {
            "decode": abs(_median(rates[1]) / _median(rates[0]) - 1) <= tolerance,
            "perplexity": _near(*pairs["perplexity"], _PERPLEXITY_TOLERANCE),
            "KL": _near(*pairs["kl_mean"], _KL_TOLERANCE),
        }
        wrong = [name for name, holds in checks.items() if not holds]
        agree = agree and not wrong
        lines.append(
            f"{f'{key[0]} {key[1]} bits':24}{f'{_median(rates[0]):.1f} {_median(rates[1]):.1f}':>16}{tolerance:>11.1%}"
            f"{'  '.join(_range(side.rows[key]['decode_runs']) for side in (plain[0], qbatch[0])):>26}"
            f"{' '.join(show(one, '.6g') for one in pairs['perplexity']):>18}"
            f"{' '.join(show(one, '.4g') for one in pairs['kl_mean']):>22}"
            + (f"  disagree: {', '.join(wrong)}" if wrong else "")
        )
    return lines, agree


def _relative_error(rates: Sequence[Sequence[float]]) -> float:
    """The standard error of the ratio of two means; infinite for a single run."""
    if len(rates[0]) < 2:
        return math.inf
    return math.hypot(*(statistics.stdev(of) / math.sqrt(len(of)) / statistics.fmean(of) for of in rates))


def _near(one: float | None, other: float | None, tolerance: float) -> bool:
    return one is other or (one is not None and other is not None and math.isclose(one, other, rel_tol=tolerance))


def _range(rates: Sequence[float]) -> str:
    return f"{min(rates):.1f}-{max(rates):.1f}" if rates else "not timed"


def _median(values: Any) -> float:
    return float(statistics.median(values))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", dest="shapes", help="repeat it for several")
    parser.add_argument("--copies", type=int, default=1, help="models of each shape, with different weights")
    parser.add_argument("--bits", default="8,4")
    parser.add_argument("--no-why", dest="why", action="store_false", help="leave out what limits decoding")
    parser.add_argument("--speed", choices=[EACH, OF_A_SHAPE], default=EACH, help="as of `qbatch run`")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if installed_gpus() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary directory)")
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or (
        ["llama-1b", "llama-3b", "llama-8b"] if arguments.device == "cuda" else ["tiny"]
    )
    os.environ["HF_HUB_OFFLINE"] = "1"
    work = Path(tempfile.mkdtemp(prefix="qbatch-bench-", dir=arguments.folder))
    try:
        return _compare(arguments, work)
    finally:
        shutil.rmtree(work)


def _compare(arguments: argparse.Namespace, work: Path) -> int:
    models = [work / f"{shape}-{copy}" for shape in arguments.shapes for copy in range(arguments.copies)]
    for number, model in enumerate(models):
        in_fresh_process(build_source, arguments.shapes[number // arguments.copies], model, number)
        build_tokenizer(model)
    compile_imports(work / "bytecode")
    plain, qbatch = [], []
    for repeat in range(arguments.repeats):
        for name, run, sides in (("plain script", run_plain, plain), ("qbatch", run_qbatch, qbatch)):
            sides.append(run(models, work, arguments))
            log(f"{repeat + 1}/{arguments.repeats} {name}: {sides[-1].total_s:.1f} s")
    lines, agree = figure_table(plain, qbatch)
    print("\n".join([*stage_table(plain, qbatch), *lines]))
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
