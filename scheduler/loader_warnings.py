"""What serving engines would make of the checkpoints that a submit asks for, said before any of them is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qbatch.core.domain import DType, JobSpec, Scheme, stored_dtype
from qbatch.core.loaders.checkpoint_facts import SKIP_LIST, CheckpointFacts
from qbatch.core.loaders.engine_names import EngineArchitecture, engine
from qbatch.core.loaders.known_loaders import LOADERS, Loader
from qbatch.core.loaders.skip_rules import transformers_skips
from qbatch.core.measured.loader_judgement import LoaderVerdict
from qbatch.core.sources import Header


def loader_warnings(
    specs: Iterable[JobSpec], headers: tuple[Header, ...], config: Mapping[str, Any], source_dtype: DType
) -> Iterator[str]:
    """One line for each engine that would load a scheme otherwise than it is measured, and for each that other options
    would keep from refusing it. Predicted from the source's names, which may not be those of the model."""
    asked = dict.fromkeys((spec.scheme, stored_dtype(spec.dtype, source_dtype)) for spec in specs)
    resolved = [scheme.resolved(dtype) for scheme, dtype in asked]
    judged = [(scheme, config_) for scheme in resolved if (config_ := _config_of(scheme)) is not None]
    if not judged:
        return
    plain = CheckpointFacts.of_tensors(config, (tensor for header in headers for tensor in header.tensors))
    engines = [loader for loader in LOADERS.values() if loader.is_engine]
    for scheme, quantization in judged:
        facts = _predicted(plain, scheme, quantization)
        yield from (line for loader in engines for line in _lines(loader, facts, scheme))


def _lines(loader: Loader, facts: CheckpointFacts, scheme: Scheme) -> Iterator[str]:
    for finding in loader.findings(facts):
        if finding.verdict is LoaderVerdict.DIFFERS or (finding.verdict is LoaderVerdict.REFUSES and finding.is_chosen):
            advice = f"; {finding.advice}" if finding.advice is not None else ""
            yield f"{scheme.description.name} of {facts.architecture}: {finding.reason}{advice}"


def _config_of(scheme: Scheme) -> Mapping[str, Any] | None:
    return scheme.description.config_for_loaders(scheme.options, scheme.compute_dtype)


def _predicted(plain: CheckpointFacts, scheme: Scheme, quantization: Mapping[str, Any]) -> CheckpointFacts:
    """What the checkpoint would look like."""
    kept, listed = _skipped(plain, scheme.skip_modules)
    return CheckpointFacts(
        config={**plain.config, "quantization_config": {**quantization, SKIP_LIST: listed}},
        packed=plain.kept - kept,
        kept=kept,
        experts=plain.experts,
    )


def _skipped(plain: CheckpointFacts, asked: tuple[str, ...]) -> tuple[set[str], list[str] | None]:
    """The layers that the user's patterns keep, and the list that would be published, as far as engines read it."""
    if not asked:
        return set(), None
    skips = transformers_skips(asked)
    kept = {name for name in plain.kept if skips(name)}
    architecture = engine("vllm").architecture(plain.architecture) or EngineArchitecture()
    packed_in_part = {architecture.module_name(name) for name in plain.kept - kept}
    return kept, sorted(kept | ({architecture.module_name(name) for name in kept} - packed_in_part))
