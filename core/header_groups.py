"""How many groups of layers a search would find in a model, judged by its headers alone, for an estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qbatch.core.expert_names import experts_of
from qbatch.core.loaders.engine_names import EngineArchitecture, engine
from qbatch.core.sources import Header


def count_groups(headers: Sequence[Header], config: Mapping[str, object]) -> int:
    """The matrices within numbered blocks, where those that an engine fuses are one, and so are the experts of a layer.
    The worker finds out which layers really read one input; mostly those are the same."""
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else None
    architecture = engine("vllm").architecture(name) or EngineArchitecture()
    matrices = (
        tensor.name.removesuffix(".weight")
        for header in headers
        for tensor in header.tensors
        if len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    )
    return len({_group(name, architecture) for name in matrices if any(part.isdigit() for part in name.split("."))})


def _group(module: str, architecture: EngineArchitecture) -> str:
    experts = experts_of(module)
    if experts is not None:
        return experts
    fused = architecture.group_of(module)
    return module if fused is None else fused.name
