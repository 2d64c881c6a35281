"""Sizes in powers of two."""

from __future__ import annotations

KIB, MIB, GIB = 2**10, 2**20, 2**30


def mib(nbytes: int) -> str:
    """``11.2 MiB``"""
    return f"{nbytes / MIB:.1f} MiB"
