"""docs/measurements.md names every figure that is stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from qbatch.core.domain import Protocol
from qbatch.core.measured.measurement import MEASURED_COLUMNS
from qbatch.worker.measuring.quality.reference import prepare_reference
from qbatch.worker.measuring.speed.energy import Energy
from qbatch.worker.measuring.why.decode_kernels import KernelsAlone
from qbatch.worker.measuring.why.profile import StepProfile
from qbatch.worker.measuring.why.roofs import Roofs
from qbatch.worker.measuring.why.traffic import StepWork
from tests import tiny
from tests.unit.benchmark_models import NF4, QUICK, TEXT, loaded_on_cpu, measured, quantized

DOCS = (Path(__file__).parents[2] / "docs" / "measurements.md").read_text(encoding="utf-8")
# A GPU's alone: what a CPU's result does not have.
ON_GPU = [field.name for cls in (StepProfile, StepWork, Roofs, KernelsAlone, Energy) for field in fields(cls)]


def missing(names: Iterator[str] | list[str]) -> set[str]:
    return {name for name in names if not re.search(rf"\b{name.removesuffix('_se')}\b", DOCS)}


def names_in(found: Any) -> Iterator[str]:
    for name, value in found.items() if isinstance(found, Mapping) else ():
        yield name
        yield from names_in(value)


def test_the_columns_the_protocol_and_what_a_gpu_adds() -> None:
    assert missing([*MEASURED_COLUMNS, *(field.name for field in fields(Protocol)), *ON_GPU]) == set()


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_the_details_of_a_result(tmp_path: Path, kind: str) -> None:
    source = tiny.make_causal(tmp_path / "model") if kind == "causal" else tiny.make_encoder(tmp_path / "model")
    reference = prepare_reference(loaded_on_cpu(source), QUICK, TEXT, tmp_path / "reference")
    folder = quantized(source, tmp_path / "nf4", NF4)
    found = measured(folder, NF4, reference=reference)
    libraries = set(found.details.to_json()["versions"])
    assert missing(names_in(found.details)) - libraries == set()
