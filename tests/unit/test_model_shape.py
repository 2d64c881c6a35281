"""Which models have the same shape, and which rows may have the speed of another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qbatch.core.domain import DeviceKind, Method, Scheme
from qbatch.core.measured.details import Details
from qbatch.core.model_shape import shape_of
from qbatch.worker.runner.shared_speeds import may_be_shared
from tests import tiny

CUDA, CPU = DeviceKind.CUDA, DeviceKind.CPU


def configured(folder: Path, file: str = "config.json", **fields: Any) -> Path:
    path = folder / file
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(stored | fields))
    return folder


def test_fine_tunes_have_one_shape_whatever_their_weights_and_names_are(tmp_path: Path) -> None:
    first = tiny.make_causal(tmp_path / "a", seed=0)
    second = tiny.make_causal(tmp_path / "b", seed=1, max_shard_size="200KB")
    configured(second, _name_or_path="somebody/b", transformers_version="4.40.0")
    assert shape_of(first) == shape_of(second) is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: tiny.make_causal(folder, dtype="bfloat16"),
        lambda folder: tiny.make_causal(folder, intermediate_size=320),
        lambda folder: configured(tiny.make_causal(folder), rope_theta=5e5),
        lambda folder: configured(tiny.make_causal(folder), sliding_window=128),
        lambda folder: configured(tiny.make_causal(folder), "generation_config.json", num_beams=4),
    ],
    ids=["dtype", "tensors", "config", "attention", "generation config"],
)
def test_what_may_change_the_speed_is_another_shape(make: Callable[[Path], Path], tmp_path: Path) -> None:
    assert shape_of(make(tmp_path / "b")) not in (None, shape_of(tiny.make_causal(tmp_path / "a")))


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: tiny.make_causal(folder, "mixtral"),
        tiny.make_llama4,
        lambda folder: configured(tiny.make_causal(folder), text_config={"n_routed_experts": 8}),
        lambda folder: configured(tiny.make_causal(folder), early_exit_layers=[1]),
        lambda folder: configured(tiny.make_causal(folder), auto_map={"AutoModelForCausalLM": "own.Model"}),
        lambda folder: configured(
            tiny.make_causal(folder), "tokenizer_config.json", auto_map={"AutoTokenizer": "own.T"}
        ),
    ],
    ids=["mixture", "some experts", "nested", "early exit", "own code", "own tokenizer"],
)
def test_what_may_compute_by_value_has_none(make: Callable[[Path], Path], tmp_path: Path) -> None:
    assert shape_of(make(tmp_path / "model")) is None


def test_a_field_that_switches_experts_off_makes_no_mixture(tmp_path: Path) -> None:
    assert shape_of(configured(tiny.make_causal(tmp_path), num_experts=0, moe_layers=None)) is not None


def test_only_outliers_make_the_speed_of_a_method_depend_on_values() -> None:
    schemes = [
        *(Scheme(method=method) for method in Method),
        Scheme.of(Method.INT8, int8_threshold=0.0),
    ]
    depends = [one for one in schemes if one.description.speed_depends_on_values(one.options)]
    assert depends == [Scheme(method=Method.INT8)]


@pytest.mark.parametrize(
    ("flags", "kind", "expected"),
    [
        ({"throttled": False, "clocks_changed": False}, CUDA, True),
        ({"throttled": True, "clocks_changed": False}, CUDA, False),
        ({"throttled": False, "clocks_changed": True}, CUDA, False),
        (None, CUDA, False),
        (None, CPU, True),
    ],
)
def test_a_capped_clock_shares_nothing(flags: dict[str, bool] | None, kind: DeviceKind, expected: bool) -> None:
    """The power that a weight's values take lowers it. Where NVML says nothing, it may have been."""
    assert may_be_shared(Details(flags=flags), kind) is expected
