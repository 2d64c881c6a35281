"""Keeps layers away from bitsandbytes' fast CPU kernel, as where it does not support their shape."""

from __future__ import annotations

from typing import Any

# The kernel packs output rows in blocks of this many (bitsandbytes.functional._convert_weight_packed_for_cpu).
_ROWS_PER_BLOCK = 32


def avoid_packed_kernel(model: Any, device: str) -> int:
    """Make 4-bit layers use the generic kernel if the packed AVX512-BF16 kernel would fail on them.

    The packed layout needs out_features to be a multiple of 32, and whole quantization blocks in each row. Without
    this, a classifier with two labels, which transformers does quantize, could not run on a CPU. Returns the number of
    such layers, 0 on other devices. May be called repeatedly.
    """
    if device != "cpu":
        return 0
    unsupported = [module for module in model.modules() if _is_4bit(module) and not _fits(module)]
    for module in unsupported:
        module.support_avx512bf16_for_cpu = False
    return len(unsupported)


def use_generic_kernel(model: Any) -> None:
    """Make all 4-bit layers use the generic kernel. To be called before a pass has packed them."""
    for module in filter(_is_4bit, model.modules()):
        module.support_avx512bf16_for_cpu = False


def _is_4bit(module: Any) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def _fits(module: Any) -> bool:
    blocksize: int = module.weight.quant_state.blocksize
    return not (module.out_features % _ROWS_PER_BLOCK or module.in_features % blocksize)
