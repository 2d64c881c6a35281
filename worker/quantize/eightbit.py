"""bitsandbytes' LLM.int8 quantization of a weight; on a CPU bit for bit the same at half the time.

Its CPU kernel works in float16, which processors convert at every step. Here the values are converted once. Whether the
result still is the library's is checked on first use, and rows that it treats oddly are left to it.
"""

from __future__ import annotations

from functools import cache

import bitsandbytes as bnb
import torch

_HIGHEST = 127.0


def quantize_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8 [rows, columns] and scales float32 [rows] of ``values`` [rows, columns], and what they stand for:
    float32 [rows, columns]."""
    if values.device.type == "cpu" and _is_trusted():
        return _quantize(values)
    return _by_library(values)


def _quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rounded = values.to(torch.float16).float()
    scales = rounded.abs().amax(dim=1)
    # A row of zeros divides zero by zero, and one with an infinity is not much better.
    if not bool((scales > 0).all()) or not bool(scales.isfinite().all()):
        return _by_library(values)
    steps = rounded.mul_((_HIGHEST / scales).unsqueeze(-1)).round_()
    return steps.to(torch.int8), scales, steps.mul_((scales / _HIGHEST).unsqueeze(-1))


def _by_library(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(values.to(torch.float16))
    return codes, scales, bnb.functional.int8_vectorwise_dequant(codes, scales)


@cache
def _is_trusted() -> bool:
    """Whether the short way gives what this version of bitsandbytes gives."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(160, 96, generator=generator) * torch.logspace(-7, 4, 160).view(-1, 1)
    (codes, scales, _), (theirs, their_scales, _) = _quantize(sample), _by_library(sample)
    return torch.equal(codes, theirs) and torch.equal(scales, their_scales)
