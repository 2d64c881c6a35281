"""transformers, PEFT, sentence-transformers and FSDP: tried, or read, in the versions named in ``known_loaders.py``."""

from __future__ import annotations

from collections.abc import Iterator

from qbatch.core.loaders.checkpoint_facts import CheckpointFacts
from qbatch.core.loaders.finding import Finding
from qbatch.core.measured.loader_judgement import LoaderVerdict


def transformers(facts: CheckpointFacts) -> Iterator[Finding]:
    if facts.has_adapter:
        yield Finding(
            verdict=LoaderVerdict.REFUSES,
            reason="with PEFT installed, transformers applies the adapter_config.json next to the weights",
            advice="remove adapter_config.json from the folder",
        )
    if facts.needs_code:
        yield Finding(
            verdict=LoaderVerdict.LOADS,
            reason="its architecture is Python code that comes with the model",
            advice="pass trust_remote_code=True",
        )
    if facts.method == "bitsandbytes" and not facts.is_int8 and facts.compute_dtype != facts.dtype:
        yield Finding(
            verdict=LoaderVerdict.LOADS,
            reason=f"its layers compute in {facts.compute_dtype}, the others in {facts.dtype}",
        )


def peft(facts: CheckpointFacts) -> Iterator[Finding]:
    yield from transformers(facts)
    if facts.method == "torchao" and "int4" in str(facts.quantization.get("quant_type")).lower():
        yield Finding(
            verdict=LoaderVerdict.REFUSES,
            reason="PEFT supports torchao's weights with 8 bits only",
            advice="use bnb-nf4 or torchao-int8",
        )


def sentence_transformers(facts: CheckpointFacts) -> Iterator[Finding]:
    yield from transformers(facts)
    if facts.architecture is not None and not facts.architecture.endswith("Model"):
        yield Finding(
            verdict=LoaderVerdict.LOADS,
            reason=f"it drops the head of {facts.architecture} and pools what is below it",
        )


def fsdp(facts: CheckpointFacts) -> Iterator[Finding]:
    yield from peft(facts)
    if facts.method == "torchao":
        yield Finding(
            verdict=LoaderVerdict.UNKNOWN,
            reason="whether FSDP supports torchao's weights is not known: its source was not read",
        )
    elif facts.is_int8:
        yield Finding(
            verdict=LoaderVerdict.REFUSES,
            reason="FSDP shards parameters of one dtype together, and int8 codes are stored next to 16-bit weights",
            advice=f"quantize it to 4 bits with --quant-storage {facts.dtype}",
        )
    elif facts.storage != facts.dtype:
        yield Finding(
            verdict=LoaderVerdict.REFUSES,
            reason=f"FSDP shards parameters of one dtype together, and the codes are {facts.storage} next to "
            f"{facts.dtype}; FSDP2 keeps such codes whole on every GPU",
            advice=f"quantize it with --quant-storage {facts.dtype}; vLLM and SGLang do not support that",
        )
