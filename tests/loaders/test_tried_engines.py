"""Checkpoints are loaded by the engine that the interpreter ENGINE_PYTHON has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qbatch.core.domain import Scheme
from tests.loaders.test_tried_loaders import SCHEMES, assert_loads, tried
from tests.tiny import make_causal


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=["nf4", "double", "skips"])
def test_vllm(scheme: Scheme, tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    assert_loads(tried(source, tmp_path / "out", scheme, "vllm", python=os.environ["ENGINE_PYTHON"]))
