"""Tries loaders with a checkpoint: each in a process of its own, and perhaps with another interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qbatch.core.errors import one_line
from qbatch.core.measured.loader_judgement import LoaderJudgement, LoaderVerdict
from qbatch.worker.checkpoints.trying import probe
from qbatch.worker.checkpoints.trying.comparison_with_floor import TOP, compare
from qbatch.worker.checkpoints.trying.prediction_reference import PredictionReference, make_reference, request
from qbatch.worker.checkpoints.trying.quantized_rest import quantized_rest

TRIABLE = tuple(probe.LOADERS)
# They quantize layers that a checkpoint leaves at 16 bits, unless they take its list of them as it is meant.
_QUANTIZES_REST = ("vllm",)
_LONGEST_LINE = 300


def try_loaders(folder: Path, names: Iterable[str], *, python: str = sys.executable) -> dict[str, LoaderJudgement]:
    """Try the checkpoint with those of ``names`` that are TRIABLE. Returns their judgements by name.

    Raises JobError if the checkpoint cannot be loaded as qbatch measures it, or is of a kind that is not tried.
    """
    wanted = [name for name in names if name in TRIABLE]
    references: dict[bool, PredictionReference] = {}
    found = {}
    for name in wanted:
        # sentence-transformers knows no head.
        hidden = name == "sentence-transformers"
        if hidden not in references:
            references[hidden] = make_reference(folder, hidden=hidden)
        found[name] = _tried(folder, name, references[hidden], python)
    return found


def _tried(folder: Path, name: str, reference: PredictionReference, python: str) -> LoaderJudgement:
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "answer.json"
        done = subprocess.run(
            [python, "-P", probe.__file__, name, str(folder), str(answer)],
            input=request(reference, TOP),
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        predicted = json.loads(answer.read_text()) if done.returncode == 0 else None
    if predicted is not None:
        return _compared(name, reference, predicted)
    said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")[
        :_LONGEST_LINE
    ]
    if done.returncode == probe.NOT_INSTALLED:
        return _judgement(LoaderVerdict.UNKNOWN, (f"{python} cannot try it: {said}",), {}, f"install {name} there")
    return _judgement(LoaderVerdict.REFUSES, (f"tried: {said}",), {})


def _environment() -> dict[str, str]:
    """The environment without qbatch's own variables, which may hold passwords."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QBATCH_")}
    return kept | {"HF_HUB_OFFLINE": "1"}


def _compared(name: str, reference: PredictionReference, predicted: Mapping[str, Any]) -> LoaderJudgement:
    versions = predicted["versions"]
    try:
        comparison = compare(reference, predicted)
        rest = quantized_rest(reference, predicted) if name in _QUANTIZES_REST else None
    except (KeyError, ValueError) as error:
        return _judgement(LoaderVerdict.DIFFERS, (f"tried: other outputs ({one_line(error)})",), versions)
    reasons = (f"tried: {comparison}", *(() if rest is None else (str(rest),)))
    if not comparison.is_same or (rest is not None and rest.is_quantized):
        return _judgement(LoaderVerdict.DIFFERS, reasons, versions)
    if rest is not None and not rest.is_told:
        advice = f"ask verify --for {name} without --try, which judges by the layers' names"
        return _judgement(LoaderVerdict.UNKNOWN, reasons, versions, advice)
    return _judgement(LoaderVerdict.LOADS, reasons, versions)


def _judgement(
    verdict: LoaderVerdict, reasons: tuple[str, ...], versions: Mapping[str, str], advice: str | None = None
) -> LoaderJudgement:
    return LoaderJudgement(
        verdict=verdict,
        version=", ".join(f"{package} {version}" for package, version in versions.items()) or "not loaded",
        read_on=str(datetime.now(UTC).date()),
        reasons=reasons,
        advice=(advice,) if advice is not None else (),
    )
