"""bitsandbytes' LLM.int8 quantization of a weight; on a CPU bit for bit identical, in half the time.

The library's CPU kernel works in float16, which processors convert at every step. Here the values are converted once,
or not at all if that cannot change a code. The first use checks that the result equals that of the installed version
of the library. Weights with special rows (zeros, infinities) are left to the library.
"""

from __future__ import annotations

from functools import cache

import bitsandbytes as bnb
import torch

from qbatch.worker.methods.scratch import as_floats

_HIGHEST = 127.0
_LOWEST_FLOAT16, _HIGHEST_FLOAT16 = 2.0**-24, 65504.0
# float16 represents every bfloat16 from 2**-17 to _HIGHEST_FLOAT16 exactly. Smaller values get the code 0 in both
# types if the scale of their row is at least this: 2**-17 * 127 / 2**-9 is less than one half.
_SAFE_SCALE = 2.0**-9
_MAGNITUDE_BITS = 0x7FFF


def quantize_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize ``values`` [rows, columns]. Returns codes int8 [rows, columns], scales float32 [rows], and the
    dequantized values float32 [rows, columns]; on a CPU those are valid until this thread's next call."""
    if values.device.type == "cpu" and _is_trusted():
        return _quantize(values)
    return _by_library(values)


def _quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scales = _maxima(values) if values.dtype is torch.bfloat16 else None
    if scales is None or not _within(scales, _SAFE_SCALE, _HIGHEST_FLOAT16):
        values = values.to(torch.float16)
        scales = _maxima(values)
        # A row of zeros would divide zero by zero, and an infinity makes the scale infinite.
        if not _within(scales, _LOWEST_FLOAT16, _HIGHEST_FLOAT16):
            return _by_library(values)
    steps = as_floats(values, "steps").mul_((_HIGHEST / scales).unsqueeze(-1)).round_()
    return steps.to(torch.int8), scales, steps.mul_((scales / _HIGHEST).unsqueeze(-1))


def _maxima(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each row of 16-bit floats, float32 [rows]. Without the sign bit, floats sort like their
    bits read as integers (NaN last), and integers compare faster."""
    largest = values.view(torch.int16).bitwise_and(_MAGNITUDE_BITS).amax(dim=1)
    return largest.view(values.dtype).float()


def _within(scales: torch.Tensor, lowest: float, highest: float) -> bool:
    """Whether all ``scales`` lie in [lowest, highest]. False if any is NaN."""
    return bool(((scales >= lowest) & (scales <= highest)).all())


def _by_library(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(values.to(torch.float16))
    return codes, scales, bnb.functional.int8_vectorwise_dequant(codes, scales)


@cache
def _is_trusted() -> bool:
    """Whether ``_quantize`` gives the same results as the installed version of bitsandbytes."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(160, 96, generator=generator) * torch.logspace(-7, 4, 160).view(-1, 1)
    # Rows that are not converted to float16, with values that the conversion would change.
    plain = sample[-80:].clone()
    plain[:, ::3] *= 1e-7
    return all(_agrees(values) for values in (sample, sample.to(torch.bfloat16), plain.to(torch.bfloat16)))


def _agrees(values: torch.Tensor) -> bool:
    (codes, scales, _), (library_codes, library_scales, _) = _quantize(values), _by_library(values)
    return torch.equal(codes, library_codes) and torch.equal(scales, library_scales)
