"""vLLM and SGLang. Read: vLLM 0.33.0 with vllm-bnb-plugin 0.0.3, and SGLang 0.5.23, on 2026-11-28."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qbatch.core.loaders.checkpoint_facts import CheckpointFacts
from qbatch.core.loaders.engine_names import EngineArchitecture, engine
from qbatch.core.loaders.finding import Finding
from qbatch.core.loaders.skip_rules import vllm_skips
from qbatch.core.measured.loader_judgement import LoaderVerdict

VLLM_PLUGIN = "0.0.3"
_WITH_TRANSFORMERS = "serve it with transformers (`transformers serve`), or serve the source"
_SHOWN = 3


def vllm(facts: CheckpointFacts) -> Iterator[Finding]:
    known = engine("vllm").architecture(facts.architecture)
    if facts.method != "bitsandbytes":
        yield _unread("vLLM", facts)
        return
    yield Finding(
        verdict=LoaderVerdict.LOADS,
        reason=f"vLLM needs vllm-bnb-plugin from 0.28 on ({VLLM_PLUGIN} was read), and has no tensor parallelism",
        advice="pip install vllm-bnb-plugin; on several GPUs use --pipeline-parallel-size",
    )
    if known is None or known.is_generic:
        yield Finding(
            verdict=LoaderVerdict.UNKNOWN,
            reason=f"vLLM runs {facts.architecture}, if at all, by its wrapper of transformers, which was not read",
            advice="try it: `qbatch verify --for vllm --try --python ENGINES_PYTHON`",
        )
    elif known.refused is not None:
        yield Finding(
            verdict=LoaderVerdict.REFUSES,
            reason=f"vLLM's class {facts.architecture} cannot load bitsandbytes checkpoints ({known.refused})",
            advice=_WITH_TRANSFORMERS,
        )
    else:
        yield from _storage("vLLM", facts)
        yield from _vllm_layers(facts, known)
        yield from _vllm_experts(facts)
        yield from _vllm_int8(facts, known)
        yield from _arithmetic(facts)


def sglang(facts: CheckpointFacts) -> Iterator[Finding]:
    known = engine("sglang").architecture(facts.architecture)
    if facts.method != "bitsandbytes":
        yield _unread("SGLang", facts)
        return
    if known is None or known.refused is not None:
        why = known.refused if known is not None else "it has no class of that name"
        yield Finding(
            verdict=LoaderVerdict.REFUSES,
            reason=f"SGLang cannot load bitsandbytes checkpoints of {facts.architecture} ({why})",
            advice=_WITH_TRANSFORMERS,
        )
        return
    yield Finding(
        verdict=LoaderVerdict.LOADS, reason="SGLang does not support tensor parallelism for packed checkpoints"
    )
    yield from _storage("SGLang", facts)
    if taken := sorted(_not_skipped(facts, known) | facts.experts):
        yield Finding(
            verdict=LoaderVerdict.REFUSES,
            reason=f"SGLang loads 16-bit weights into packed ones, which fails: {_first(taken)}",
            advice=_skip_advice(facts, known, taken),
            is_chosen=bool(facts.skip_list),
        )
    yield from _arithmetic(facts)


def _unread(name: str, facts: CheckpointFacts) -> Finding:
    return Finding(
        verdict=LoaderVerdict.UNKNOWN,
        reason=f"how {name} loads a {facts.method or 'plain'} checkpoint is not known: its source was not read",
        advice=f"try it: `qbatch verify --for {name.lower()} --try --python ENGINES_PYTHON`",
    )


def _storage(name: str, facts: CheckpointFacts) -> Iterator[Finding]:
    if not facts.is_int8 and facts.storage != "uint8":
        yield Finding(
            verdict=LoaderVerdict.REFUSES,
            reason=f"{name} supports packed codes only if they are stored as uint8, not as {facts.storage}",
            advice="quantize with --quant-storage uint8",
            is_chosen=True,
        )


def _vllm_layers(facts: CheckpointFacts, known: EngineArchitecture) -> Iterator[Finding]:
    skips = vllm_skips(facts.skip_list)
    lost = sorted(name for name in facts.packed if skips(known.module_name(name))) if facts.skip_list else []
    if lost:
        yield Finding(
            verdict=LoaderVerdict.REFUSES,
            reason=f"vLLM treats packed layers as skipped ones: {_first(lost)}",
            advice="quantize it again with this version of qbatch, which lists full names",
            is_chosen=True,
        )
    taken = sorted(_not_skipped(facts, known))
    if not taken:
        return
    what = f"{len(taken)} layers of 16 bits" if len(taken) > 1 else "a layer of 16 bits"
    yield Finding(
        verdict=LoaderVerdict.REFUSES if facts.is_int8 else LoaderVerdict.DIFFERS,
        reason=f"vLLM cannot load {what} as int8: {_first(taken)}"
        if facts.is_int8
        else f"vLLM quantizes {what} to NF4 with double quantization in loading, without a message: {_first(taken)}",
        advice=_skip_advice(facts, known, taken),
        is_chosen=True,
    )


def _not_skipped(facts: CheckpointFacts, known: EngineArchitecture) -> set[str]:
    """The layers of 16 bits that the engine does not take for skipped."""
    skips = vllm_skips(facts.skip_list)
    return {name for name in facts.kept if not skips(known.module_name(name))}


def _skip_advice(facts: CheckpointFacts, known: EngineArchitecture, taken: Sequence[str]) -> str:
    """Which layers to skip so that the engine skips them too."""
    groups = {group for name in taken if (group := known.group_of(known.renamed(name))) is not None}
    renamed = {known.renamed(name) for name in facts.packed}
    partly = sorted(group.name.rpartition(".")[2] for group in groups if not renamed.isdisjoint(group.members))
    if partly:
        group = next(group for group in groups if group.name.endswith(partly[0]))
        members = ",".join(member.rpartition(".")[2] for member in group.members)
        return f"{partly[0]} is one layer there: use --skip-modules {members}, or skip none of them"
    return f"quantize it again with --skip-modules {taken[0].rpartition('.')[2]}, which lists the full names"


def _vllm_experts(facts: CheckpointFacts) -> Iterator[Finding]:
    if not facts.experts:
        return
    if facts.is_int8:
        yield Finding(
            verdict=LoaderVerdict.REFUSES,
            reason="vLLM cannot load int8 checkpoints of mixtures of experts",
            advice="quantize it to 4 bits",
            is_chosen=True,
        )
        return
    yield Finding(
        verdict=LoaderVerdict.DIFFERS,
        reason="vLLM quantizes the experts, which transformers leaves at 16 bits, to NF4 while it loads them",
        advice=f"{_WITH_TRANSFORMERS}; the figures measured here are not those of what vLLM serves",
    )


def _vllm_int8(facts: CheckpointFacts, known: EngineArchitecture) -> Iterator[Finding]:
    if not facts.is_int8:
        return
    yield Finding(verdict=LoaderVerdict.LOADS, reason="vLLM runs int8 without CUDA graphs, and its outputs are float16")
    if lost := sorted(name for name in facts.packed if known.renamed(name) != known.renamed(name).lower()):
        yield Finding(
            verdict=LoaderVerdict.REFUSES,
            reason=f"vLLM looks up int8 scales by names in lower case, and loses those of {_first(lost)}",
            advice="quantize it to 4 bits",
            is_chosen=True,
        )


def _arithmetic(facts: CheckpointFacts) -> Iterator[Finding]:
    if not facts.is_int8 and facts.compute_dtype != "bfloat16":
        yield Finding(
            verdict=LoaderVerdict.LOADS, reason=f"it computes in bfloat16, and was measured in {facts.compute_dtype}"
        )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
