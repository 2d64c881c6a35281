"""docs/measurements.md names every figure that is stored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from qbatch.core.domain import Protocol
from qbatch.core.measured.checkpoint_audit import CheckpointAudit
from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import MEASURED_COLUMNS
from qbatch.core.measured.metric import ComparisonNoise, FloorNoise, Metric, Noise, TimingNoise
from qbatch.core.measured.metrics import ALL_METRICS
from qbatch.core.stored_json import Stored, field_names
from qbatch.worker.measuring.quality.reference import prepare_reference
from tests import tiny
from tests.unit.benchmark_models import NF4, QUICK, TEXT, loaded_on_cpu, measured, quantized

DOCS_FILE = Path(__file__).parents[2] / "docs" / "measurements.md"
DOCS = DOCS_FILE.read_text(encoding="utf-8")
AUDIT_DOCS = DOCS_FILE.with_name("performance.md").read_text(encoding="utf-8")


def missing(names: Iterable[str], docs: str = DOCS) -> set[str]:
    return {name for name in names if not re.search(rf"\b{name.removesuffix('_se')}\b", docs)}


def names_of(cls: Any) -> set[str]:
    """The fields of a part of what is stored, and those of its parts."""
    if not (isinstance(cls, type) and issubclass(cls, Stored)):
        return set().union(*(names_of(argument) for argument in get_args(cls)))
    hints = get_type_hints(cls)
    return set(field_names(cls)).union(*(names_of(hints[name]) for name in field_names(cls)))


def names_in(found: Any) -> Iterator[str]:
    for name, value in found.items() if isinstance(found, Mapping) else ():
        yield name
        yield from names_in(value)


def test_the_columns_the_protocol_and_every_detail() -> None:
    known = {
        *MEASURED_COLUMNS,
        *(field.name for field in fields(Protocol)),
        *(names_of(Details) - names_of(CheckpointAudit)),
    }
    assert missing(sorted(known)) == set()


def test_what_a_checkpoint_s_audit_says_stands_where_it_is_defined() -> None:
    assert missing(sorted(names_of(CheckpointAudit)), AUDIT_DOCS + DOCS) == set()


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_the_details_of_a_result(tmp_path: Path, kind: str) -> None:
    source = tiny.make_causal(tmp_path / "model") if kind == "causal" else tiny.make_encoder(tmp_path / "model")
    reference = prepare_reference(loaded_on_cpu(source), QUICK, TEXT, tmp_path / "reference")
    folder = quantized(source, tmp_path / "nf4", NF4)
    details = measured(folder, NF4, reference=reference).details.to_json()
    assert missing(names_in(details)) - set(details["versions"]) == set()


def metric_table() -> list[str]:
    """The metrics of ``core/measured/metrics.py`` as lines of Markdown."""
    head = ["| metric | in tables | unit | better | comparison | noise by |", "|---|---|---|---|---|---|"]
    return head + [f"| {' | '.join(metric_cells(metric))} |" for metric in ALL_METRICS]


def metric_cells(metric: Metric) -> tuple[str, ...]:
    labels = dict.fromkeys((metric.label, metric.line_title))
    return (
        f"`{metric.key}`",
        ", ".join(labels),
        metric.unit,
        metric.better,
        metric.comparison,
        noise_in_words(metric.noise),
    )


def noise_in_words(noise: Noise | None) -> str:
    match noise:
        case None:
            return "–"
        case ComparisonNoise():
            return "error and floor"
        case FloorNoise():
            return "floor"
        case TimingNoise(phase=phase):
            return f"times of `{phase}`"


def test_the_table_of_metrics_is_the_registry_s() -> None:
    """Where it is not: ``python -m tests.unit.test_measurements_doc`` writes it."""
    assert "\n".join(metric_table()) in DOCS


def write_metric_table() -> None:
    lines = DOCS.splitlines()
    begin = lines.index(metric_table()[0])
    end = next(at for at in range(begin, len(lines)) if not lines[at].startswith("|"))
    DOCS_FILE.write_text("\n".join([*lines[:begin], *metric_table(), *lines[end:], ""]), encoding="utf-8")


if __name__ == "__main__":
    write_metric_table()
