"""Checkpoints are loaded by what the interpreter LOADERS_PYTHON has: transformers, PEFT and sentence-transformers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.measured.loader_judgement import LoaderJudgement, LoaderVerdict
from qbatch.worker.checkpoints.trying.tried_loaders import try_loaders
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from tests.tiny import make_causal, make_encoder

SCHEMES = (
    Scheme(method=Method.NF4),
    Scheme.of(Method.NF4, double_quant=True),
    Scheme(method=Method.NF4, skip_modules=(".*self_attn",)),
    Scheme(method=Method.INT8),
    Scheme(method=Method.TORCHAO_INT8),
)
PYTHON = os.environ.get("LOADERS_PYTHON", "")


def tried(source: Path, folder: Path, scheme: Scheme, *names: str, python: str = PYTHON) -> dict[str, LoaderJudgement]:
    folder.mkdir()
    target = Target(scheme=scheme.resolved(DType.BFLOAT16), folder=folder)
    (outcome,) = write_checkpoints(source, [target], dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None)
    assert isinstance(outcome, Written)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)
    return try_loaders(folder, names, python=python)


def assert_loads(found: dict[str, LoaderJudgement]) -> None:
    assert found
    assert all(one.verdict == LoaderVerdict.LOADS for one in found.values()), found


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.method} {scheme.skip_modules}")
def test_a_causal_model(scheme: Scheme, tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    assert_loads(tried(source, tmp_path / "out", scheme, "transformers", "peft"))


@pytest.mark.parametrize("make", [lambda folder: make_causal(folder, "mixtral", dtype="bfloat16")], ids=["mixtral"])
def test_a_mixture(make: Callable[[Path], Path], tmp_path: Path) -> None:
    assert_loads(tried(make(tmp_path / "source"), tmp_path / "out", SCHEMES[0], "transformers", "peft"))


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[3]], ids=["nf4", "int8"])
def test_an_encoder(scheme: Scheme, tmp_path: Path) -> None:
    source = make_encoder(tmp_path / "source", dtype="bfloat16")
    assert_loads(tried(source, tmp_path / "out", scheme, "transformers", "peft", "sentence-transformers"))
