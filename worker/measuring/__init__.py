"""Latency, memory, size and quality of a loaded model."""

from __future__ import annotations

from pathlib import Path

DEFAULT_EVAL_TEXT = Path(__file__).with_name("eval_text.txt")
