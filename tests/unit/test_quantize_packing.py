"""Quantizing by pieces, and by the short ways on a CPU, gives bitsandbytes' own bytes."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from qbatch.worker.methods.bnb_fourbit import _trusted_table, quantize_4bit
from qbatch.worker.methods.bnb_int8 import quantize_int8
from qbatch.worker.methods.bnb_packing import PIECE_STEP, FourBitPacking


@pytest.fixture
def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-6, 3, 96).view(-1, 1)
    return (torch.randn(96, 512, generator=generator) * sizes).to(torch.bfloat16)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_fast_4_bit_path_is_used_and_gives_equal_bytes(
    quant_type: str, dtype: torch.dtype, weight: torch.Tensor
) -> None:
    assert _trusted_table(quant_type) is not None
    values = weight.to(dtype)
    values[0, :64] = 0
    values[1, 3] = float("nan")
    values[2, 3] = float("inf")
    codes, absmax = quantize_4bit(values.view(-1), quant_type, torch.uint8)
    expected, state = bnb.functional.quantize_4bit(values, quant_type=quant_type)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax.view(torch.int32), state.absmax.view(torch.int32))


# Where bfloat16 and float16 part: what float16 rounds, what it rounds to zero, its largest value and more.
EDGES = [
    2.0**-9,
    2.0**-10,
    2.0**-14,
    2.0**-17,
    2.0**-18 * 1.5,
    2.0**-24,
    2.0**-26,
    65280.0,
    65536.0,
    float("nan"),
    -3.0,
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("largest", EDGES)
def test_the_fast_8_bit_path_is_exact_at_the_limits_of_float16(dtype: torch.dtype, largest: float) -> None:
    values = (torch.randn(4, 256, generator=torch.Generator().manual_seed(2)) * 0.02).clamp(-0.05, 0.05)
    values[:, ::2] *= 1e-4
    values[1] = torch.tensor(EDGES[1:7]).repeat(43)[:256] * torch.tensor([1.0, -1.0]).repeat(128)
    values[1, 0] = values[3, 7] = largest
    values[1] = values[1].clamp(-abs(largest), abs(largest))
    codes, scales, _ = quantize_int8(values.to(dtype))
    expected, expected_scales, _ = bnb.functional.int8_vectorwise_quant(values.to(dtype).half())
    assert torch.equal(codes, expected)
    assert torch.equal(scales.view(torch.int32), expected_scales.view(torch.int32))


def test_rows_that_need_no_rounding_are_not_rounded(monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor) -> None:
    def fail(_: torch.Tensor) -> None:
        raise AssertionError("left to the library")

    quantize_int8(weight)
    monkeypatch.setattr("qbatch.worker.methods.bnb_int8._by_library", fail)
    plain = weight[-16:].clone()
    codes, _, restored = quantize_int8(plain)
    assert codes.abs().amax() == 127
    torch.testing.assert_close(restored, plain.float(), rtol=0, atol=float(plain.float().abs().amax()) / 127)


@pytest.mark.parametrize("spoilt", [None, 0.0, float("inf")])
def test_the_fast_8_bit_path_gives_equal_bytes(spoilt: float | None, weight: torch.Tensor) -> None:
    if spoilt is not None:
        weight[5] = spoilt
    codes, scales, restored = quantize_int8(weight)
    expected, expected_scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    assert torch.equal(codes, expected)
    assert torch.equal(scales, expected_scales)
    torch.testing.assert_close(
        restored, bnb.functional.int8_vectorwise_dequant(expected, expected_scales), equal_nan=True
    )


def test_pieces_of_a_doubly_quantized_weight_are_those_of_the_whole(weight: torch.Tensor) -> None:
    packing = FourBitPacking(quant_type="nf4", nested=True, storage=torch.uint8)
    flat = weight.view(-1)
    expected, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    offset = float(packing.block_maxima(flat).mean())
    assert offset == state.offset.item()
    packed = {}
    for key, (dtype, shape) in packing.part_shapes(*weight.shape).items():
        packed[key] = torch.zeros(shape, dtype=dtype).view(-1)
    for start in range(0, len(flat), PIECE_STEP):
        for key, part in packing.pack(flat[start : start + PIECE_STEP], weight.shape[1], offset).parts.items():
            first = packing.part_start(key, start, weight.shape[1]) // part.itemsize
            packed[key][first : first + part.numel()] = part.view(-1)
    assert torch.equal(packed["weight"], expected.view(-1))
    assert torch.equal(packed["absmax"], state.absmax)
    assert torch.equal(packed["nested_absmax"], state.state2.absmax)
