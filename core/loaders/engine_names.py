"""What a serving engine calls a model's modules, by architecture (data of ``benchmarks/read_engine_names.py``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

# What most architectures have, for one that is not in the data.
_USUAL_GROUPS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# In vLLM's order, of those that its adapters replace by a causal model.
_ADAPTED_HEADS = (
    "ForTextEncoding",
    "EmbeddingModel",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForRewardModeling",
    "RewardModel",
    "Model",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArchitecture:
    """How an engine builds one architecture.

    ``fused`` maps the last component of a fused module's name to those of its members. ``parts`` and ``prefixes`` are
    what it replaces in a name, in this order. ``refused`` says why it cannot load bitsandbytes checkpoints of it;
    ``is_generic``: it is run by the engine's wrapper around transformers, whose names were not read.
    """

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(_USUAL_GROUPS))
    parts: Mapping[str, str] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    refused: str | None = None
    is_generic: bool = False

    def renamed(self, module: str) -> str:
        """The engine's name of a module, before it is fused with others."""
        name = f"{module}."
        for old, new in self.parts.items():
            name = name.replace(old, new, 1)
        for old, new in self.prefixes.items():
            if name.startswith(old):
                name = name.replace(old, new, 1)
        return name.removesuffix(".")

    def module_name(self, module: str) -> str:
        """The engine's name of the module that holds ``module``, alone or fused with others."""
        name = self.renamed(module)
        group = self.group_of(name)
        return group.name if group is not None else name

    def group_of(self, module: str) -> FusedGroup | None:
        """The group that ``module`` (in either's names) is a member of; None if it stands alone."""
        for whole, members in self.fused.items():
            member = next((one for one in members if f".{module}".endswith(f".{one}") and whole != one), None)
            if member is not None:
                stem = module.removesuffix(member)
                return FusedGroup(name=stem + whole, members=tuple(stem + one for one in members))
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedGroup:
    """Modules that an engine computes as one, and the name of that one."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A serving engine, and what was read of it. ``architectures`` are those that it knows."""

    package: str
    version: str
    read_on: str
    architectures: Mapping[str, EngineArchitecture]
    adapts_heads: bool = False

    def architecture(self, name: str | None) -> EngineArchitecture | None:
        """Its own, or that of the causal model of the same family, to which vLLM gives another head."""
        if name is None or name in self.architectures or not self.adapts_heads:
            return self.architectures.get(name or "")
        stem = next((name.removesuffix(head) for head in _ADAPTED_HEADS if name.endswith(head)), None)
        return None if stem is None else self.architectures.get(f"{stem}ForCausalLM")


@cache
def engine(package: str) -> Engine:
    """What is known of the engine ``vllm`` or ``sglang``."""
    value = json.loads((Path(__file__).parent / f"{package}.json").read_text())
    return Engine(
        package=value["package"],
        version=value["version"],
        read_on=value["read_on"],
        architectures={name: _architecture(one) for name, one in value["architectures"].items()},
        adapts_heads=package == "vllm",
    )


def _architecture(value: Mapping[str, Mapping[str, str]]) -> EngineArchitecture:
    fused = {name: tuple(members) for name, members in value.get("fused", {}).items()}
    return EngineArchitecture(
        fused=fused if "fused" in value else dict(_USUAL_GROUPS),
        parts=value.get("parts", {}),
        prefixes=value.get("prefixes", {}),
        refused=str(value["refused"]) if "refused" in value else None,
        is_generic="generic" in value,
    )
