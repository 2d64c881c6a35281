"""Layers that bitsandbytes' fast CPU kernel cannot take."""

from __future__ import annotations

from typing import Any

# The kernel packs output rows in blocks of this many (bitsandbytes.functional._convert_weight_packed_for_cpu).
_ROWS_PER_BLOCK = 32


def avoid_packed_kernel(model: Any, device: str) -> int:
    """Send the 4-bit layers that the packed AVX512-BF16 kernel would fail on through the generic one.

    The packed layout wants out_features in multiples of 32 and whole quantization blocks in a row; without this a
    classifier of two labels, which transformers does quantize, could not be run on a CPU. Returns their number, and
    may be called again.
    """
    if device != "cpu":
        return 0
    odd = [module for module in model.modules() if _is_4bit(module) and not _fits(module)]
    for module in odd:
        module.support_avx512bf16_for_cpu = False
    return len(odd)


def _is_4bit(module: Any) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def _fits(module: Any) -> bool:
    blocksize: int = module.weight.quant_state.blocksize
    return not (module.out_features % _ROWS_PER_BLOCK or module.in_features % blocksize)
