"""Quantizing by pieces, and by the short ways on a CPU, gives bitsandbytes' own bytes."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from models_db.domain import Method, Scheme
from worker.quantize.eightbit import quantize_int8
from worker.quantize.fourbit import _trusted_table, quantize_4bit
from worker.quantize.packing import PIECE_STEP, Packing, block_maxima, pack


@pytest.fixture
def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-6, 3, 96).view(-1, 1)
    return (torch.randn(96, 512, generator=generator) * sizes).to(torch.bfloat16)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_short_4_bit_way_is_taken_and_gives_the_same(
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


@pytest.mark.parametrize("spoilt", [None, 0.0, float("inf")])
def test_the_short_8_bit_way_gives_the_same(spoilt: float | None, weight: torch.Tensor) -> None:
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
    packing = Packing.of(Scheme(method=Method.NF4, double_quant=True))
    flat = weight.view(-1)
    expected, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    offset = float(block_maxima(flat, packing).mean())
    assert offset == state.offset.item()
    packed = {}
    for key, (dtype, shape) in packing.part_shapes(*weight.shape).items():
        packed[key] = torch.zeros(shape, dtype=dtype).view(-1)
    for start in range(0, len(flat), PIECE_STEP):
        for key, part in pack(flat[start : start + PIECE_STEP], packing, offset).parts.items():
            first = packing.part_start(key, start, weight.shape[1]) // part.itemsize
            packed[key][first : first + part.numel()] = part.view(-1)
    assert torch.equal(packed["weight"], expected.view(-1))
    assert torch.equal(packed["absmax"], state.absmax)
    assert torch.equal(packed["nested_absmax"], state.state2.absmax)
