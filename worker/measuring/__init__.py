"""Latency, memory, size and quality of a loaded model."""

from __future__ import annotations

from pathlib import Path

DEFAULT_EVAL_TEXT = Path(__file__).with_name("eval_text.txt")
EVAL_TEXTS = {
    "prose": DEFAULT_EVAL_TEXT,
    "code": Path(__file__).with_name("code_text.txt"),
    "dialogue": Path(__file__).with_name("dialogue_text.txt"),
}
"""The texts that come with qbatch, by name. Those of code are its own modules, the others were written for it."""
