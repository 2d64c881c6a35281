"""llama.cpp's converter to GGUF, and Ollama, which uses it."""

from __future__ import annotations

from collections.abc import Iterator

from qbatch.core.loaders.checkpoint_facts import CheckpointFacts
from qbatch.core.loaders.finding import Finding
from qbatch.core.measured.loader_judgement import LoaderVerdict


def gguf(facts: CheckpointFacts) -> Iterator[Finding]:
    if facts.method is not None:
        yield Finding(
            verdict=LoaderVerdict.REFUSES,
            reason=f"llama.cpp and Ollama cannot convert {facts.method} checkpoints (llama.cpp#10965, ollama#6357)",
            advice="convert the source, and quantize it there",
        )
