"""Which jobs a submit makes of one model."""

from __future__ import annotations

from typing import Any

import pytest

from models_db.domain import BASELINE, DeviceKind, DType, Method, ProtocolOptions, SourceRef
from models_db.errors import UsageError
from scheduler.grid import Grid


def methods(**options: Any) -> list[Method]:
    return [scheme.method for scheme in Grid(**options).schemes()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": (4, 8)}, [Method.NONE, Method.INT8, Method.NF4]),
        ({"bits": (8, 4, 8, 4)}, [Method.NONE, Method.INT8, Method.NF4]),
        ({"bits": (4, 8), "baseline": False}, [Method.INT8, Method.NF4]),
        ({"bits": (16,), "baseline": False}, [Method.NONE]),
        ({"bits": (4, 16)}, [Method.NONE, Method.NF4]),
        ({"bits": (4,), "quant_types": ("fp4", "nf4", "fp4")}, [Method.NONE, Method.FP4, Method.NF4]),
    ],
)
def test_the_baseline_comes_first_then_eight_then_four_bits_each_once(
    options: dict[str, Any], expected: list[Method]
) -> None:
    assert methods(**options) == expected


@pytest.mark.parametrize("bits", [(), (3,), (4, 5), (0,), (-4,)])
def test_bits_that_do_not_exist_are_refused(bits: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="4, 8 and 16"):
        Grid(bits=bits)


def test_double_quantization_needs_four_bits() -> None:
    with pytest.raises(UsageError, match="4 bits"):
        Grid(bits=(8,), double_quant=True)
    eight, four = Grid(bits=(4, 8), double_quant=True, baseline=False).schemes()
    assert (eight.double_quant, four.double_quant) == (False, True)


def test_an_option_reaches_the_schemes_it_belongs_to_and_no_others() -> None:
    grid = Grid(
        bits=(4, 8),
        compute_dtype=DType.FLOAT16,
        skip_modules=("b", "a", "b"),
        int8_threshold=0.0,
        quant_storage="bfloat16",
        max_shard_bytes=10,
    )
    baseline, eight, four = grid.schemes()
    assert baseline == BASELINE, "one baseline serves every choice of options"
    assert (eight.int8_threshold, four.int8_threshold) == (0.0, 6.0)
    assert (eight.quant_storage, four.quant_storage) == ("uint8", "bfloat16")
    for scheme in (eight, four):
        assert scheme.compute_dtype is DType.FLOAT16
        assert scheme.skip_modules == ("a", "b"), "the order in which they were named is no identity"
        assert scheme.max_shard_bytes == 10


def test_a_bundle_holds_one_job_for_each_scheme() -> None:
    grid = Grid(bits=(4,), dtype=DType.FLOAT16, device=DeviceKind.CPU, force=True)
    source, protocol = SourceRef(name="a", location="a"), ProtocolOptions(eval_text_sha256="0" * 64)
    specs = grid.bundle(source, protocol)
    assert [spec.scheme for spec in specs] == list(grid.schemes())
    for spec in specs:
        assert (spec.source, spec.protocol) == (source, protocol)
        assert (spec.dtype, spec.device, spec.force) == (DType.FLOAT16, DeviceKind.CPU, True)
