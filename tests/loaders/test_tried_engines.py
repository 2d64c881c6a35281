"""Checkpoints are loaded by the engine that the interpreter ENGINE_PYTHON has."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from qbatch.core.domain import Scheme
from qbatch.core.measured.loader_judgement import LoaderVerdict
from tests.loaders.test_tried_loaders import SCHEMES, assert_loads, tried
from tests.tiny import make_causal


def test_vllm_quantizes_a_part_of_what_it_fuses(tmp_path: Path) -> None:
    """It says nothing of that. The figures beside such a checkpoint are not those of what it serves."""
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    scheme = replace(SCHEMES[0], skip_modules=("q_proj",))
    found = tried(source, tmp_path / "out", scheme, "vllm", python=os.environ["ENGINE_PYTHON"])
    assert found["vllm"].verdict == LoaderVerdict.DIFFERS, found


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=["nf4", "double", "skips"])
def test_vllm(scheme: Scheme, tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    assert_loads(tried(source, tmp_path / "out", scheme, "vllm", python=os.environ["ENGINE_PYTHON"]))
