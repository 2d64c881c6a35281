"""The script that writes docs/coverage.md works: nothing else would notice before somebody writes it anew."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaForCausalLM

from benchmarks.families import Family, tried


def test_a_family_gets_its_line(tmp_path: Path) -> None:
    assert tried("llama", LlamaForCausalLM, tmp_path) == Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        published="yes",
        identical="yes",
        runs="yes",
        measured="perplexity, KL, decode",
    )
