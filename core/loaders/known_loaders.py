"""The loaders that ``verify --for`` knows, and the judgement of a checkpoint by each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qbatch.core.loaders.checkpoint_facts import CheckpointFacts
from qbatch.core.loaders.engine_names import engine
from qbatch.core.loaders.finding import Finding
from qbatch.core.loaders.judgements import converters, python_libraries, serving_engines
from qbatch.core.measured.loader_judgement import LoaderJudgement, LoaderVerdict

_READ_ON = "2026-11-28"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """``version`` is what was read or tried, on ``read_on``."""

    name: str
    version: str
    findings: Callable[[CheckpointFacts], Iterator[Finding]]
    read_on: str = _READ_ON
    is_engine: bool = False

    def judge(self, facts: CheckpointFacts) -> LoaderJudgement:
        return self.judgement(list(self.findings(facts)))

    def judgement(self, findings: Iterable[Finding]) -> LoaderJudgement:
        """The worst verdict decides, and what it is about is said first."""
        order = list(LoaderVerdict)
        found = sorted(findings, key=lambda one: -order.index(one.verdict))
        return LoaderJudgement(
            verdict=found[0].verdict if found else LoaderVerdict.LOADS,
            version=self.version,
            read_on=self.read_on,
            reasons=tuple(one.reason for one in found),
            advice=tuple(dict.fromkeys(one.advice for one in found if one.advice is not None)),
        )


def _loaders() -> Iterator[Loader]:
    vllm, sglang = engine("vllm"), engine("sglang")
    yield Loader(name="transformers", version="transformers 5.23.0", findings=python_libraries.transformers)
    yield Loader(name="peft", version="PEFT 0.21.2", findings=python_libraries.peft)
    yield Loader(name="fsdp", version="torch 2.13.0, accelerate 1.15.0", findings=python_libraries.fsdp)
    yield Loader(
        name="vllm",
        version=f"vLLM {vllm.version}, vllm-bnb-plugin {serving_engines.VLLM_PLUGIN}",
        read_on=vllm.read_on,
        findings=serving_engines.vllm,
        is_engine=True,
    )
    yield Loader(
        name="sglang",
        version=f"SGLang {sglang.version}",
        read_on=sglang.read_on,
        findings=serving_engines.sglang,
        is_engine=True,
    )
    yield Loader(name="gguf", version="llama.cpp, Ollama", findings=converters.gguf)
    yield Loader(
        name="sentence-transformers",
        version="sentence-transformers 6.2.0",
        findings=python_libraries.sentence_transformers,
    )


LOADERS: Mapping[str, Loader] = {loader.name: loader for loader in _loaders()}
# A checkpoint without pooling modules is not meant for the others.
JUDGED_AT_PUBLISHING = ("transformers", "peft", "fsdp", "vllm", "sglang", "gguf")


def judge_folder(folder: Path, names: Iterable[str]) -> dict[str, LoaderJudgement]:
    """The judgements of the checkpoint in ``folder``, by loader. Raises JobError if its files are broken."""
    facts = CheckpointFacts.of_folder(folder)
    return {name: LOADERS[name].judge(facts) for name in names}
