"""Checkpoints are loaded by the engine that the interpreter ENGINE_PYTHON has."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from qbatch.core.domain import Scheme
from qbatch.core.measured.loader_judgement import LoaderJudgement, LoaderVerdict
from tests.loaders.test_tried_loaders import SCHEMES, assert_loads, tried
from tests.tiny import make_causal
from tests.trained import make_trained

NF4, DOUBLE, SKIPS, INT8 = SCHEMES[:4]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In one model quantizing to NF4 changes a hundred times what rounding does; in the other, of random weights, both
    change so little that rounding can look like more."""
    folder = tmp_path_factory.mktemp("sources")
    return {"trained": make_trained(folder), "random": make_causal(folder / "random", dtype="bfloat16")}


def in_vllm(source: Path, folder: Path, scheme: Scheme) -> dict[str, LoaderJudgement]:
    return tried(source, folder, scheme, "vllm", python=os.environ["ENGINE_PYTHON"])


@pytest.mark.parametrize(
    ("model", "scheme"),
    [("trained", NF4), ("trained", DOUBLE), ("trained", SKIPS), ("trained", INT8), ("random", DOUBLE)],
    ids=["nf4", "double", "skips", "int8", "double-random"],
)
def test_vllm(model: str, scheme: Scheme, sources: dict[str, Path], tmp_path: Path) -> None:
    assert_loads(in_vllm(sources[model], tmp_path / "out", scheme))


@pytest.mark.parametrize(
    ("model", "part"),
    [("trained", "gate_proj"), ("trained", "q_proj"), ("random", "q_proj")],
)
def test_vllm_quantizes_a_part_of_what_it_fuses(
    model: str, part: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """It says nothing of that. The figures beside such a checkpoint are not those of what it serves."""
    found = in_vllm(sources[model], tmp_path / "out", replace(NF4, skip_modules=(part,)))
    assert found["vllm"].verdict == LoaderVerdict.DIFFERS, found
    assert f"it quantizes {part}, left at 16 bits" in str(found["vllm"].reasons)
