"""The groups of linear layers that are quantized together, found from the model's own modules.

Two layers belong together if they have one parent and read one input (query, key and value; gate and up), in any of the
model's blocks, or if a serving engine fuses them. All layers of all experts of a layer belong together: engines compute
them as one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from qbatch.core.expert_names import experts_of, without_expert_number
from qbatch.core.loaders.engine_names import EngineArchitecture, engine
from qbatch.core.search.sensitivity import LayerGroup
from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.methods.packing import Packing
from qbatch.worker.searching.input_trace import InputTrace, trace_inputs

_ANY = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayers:
    """``groups`` in the order in which they run; ``unreached`` are those that a text does not reach, like the layers
    that read images. ``blocks``: the repeated blocks in their order, empty if one of them runs more than once.
    ``start``: by group, how many of the ``blocks`` have ended before the group changes anything."""

    groups: tuple[LayerGroup, ...]
    unreached: tuple[LayerGroup, ...]
    blocks: tuple[str, ...]
    start: Mapping[str, int]


def model_layers(model: Any, names: Set[str], probe: Probe, device: str, packing: Packing) -> ModelLayers:
    """The groups of an unquantized ``model`` whose layers ``names`` a method with this ``packing`` quantizes. The
    weights must have the dtype in which they would be published."""
    linears = {name: module for name, module in model.named_modules() if name in names}
    modules = dict(model.named_modules())
    block_of = {name: _block(name, modules) for name in linears}
    blocks = {block: modules[block] for block in block_of.values() if block is not None}
    trace = trace_inputs(model, linears, blocks, probe, device)
    architecture = engine("vllm").architecture(type(model).__name__) or EngineArchitecture()
    members = sorted(_members(linears, trace, architecture), key=lambda group: _first_call(group, trace, linears))
    can_restart = all(trace.calls[block] <= 1 for block in blocks)
    found = [_layer_group(group, linears, block_of[group[0]], packing) for group in members]
    groups = tuple(group for group in found if _is_reached(group, trace))
    return ModelLayers(
        groups=groups,
        unreached=tuple(group for group in found if not _is_reached(group, trace)),
        blocks=tuple(trace.ended) if can_restart else (),
        start={group.name: _start(group, trace) if can_restart else 0 for group in groups},
    )


def weight_shape(module: Any) -> tuple[int, int]:
    """[rows, columns] of the layer's weight as it is quantized: outputs, inputs."""
    first, second = module.weight.shape
    return (first, second) if isinstance(module, torch.nn.Linear) else (second, first)


def _members(
    linears: Mapping[str, Any], trace: InputTrace, architecture: EngineArchitecture
) -> Iterable[Sequence[str]]:
    """The names of each group's layers. What is joined in one block is joined in all: not every expert is called."""
    together = [{_role(name) for name in readers} for readers in trace.readers]
    experts: defaultdict[str, set[str]] = defaultdict(set)
    for name in linears:
        if (whole := experts_of(name)) is not None:
            experts[whole].add(_role(name))
        fused = architecture.group_of(name)
        together.append({_role(member) for member in (name, *(fused.members if fused else ())) if member in linears})
    root = _roots([*together, *experts.values()])
    groups: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in linears:
        groups[_numbers(name), root[_role(name)]].append(name)
    return groups.values()


def _roots(together: Iterable[Set[str]]) -> dict[str, str]:
    """One name for all that are connected by the sets in ``together``."""
    root: dict[str, str] = {}
    for names in together:
        old = {root.get(name, name) for name in names}
        new = min(old)
        root |= dict.fromkeys(names, new)
        root |= {name: new for name, its in root.items() if its in old}
    return root


def _first_call(group: Sequence[str], trace: InputTrace, linears: Mapping[str, Any]) -> tuple[int, int]:
    order = list(trace.ended_before)
    called = [order.index(name) for name in group if name in trace.ended_before]
    return min(called, default=len(order)), list(linears).index(group[0])


def _is_reached(group: LayerGroup, trace: InputTrace) -> bool:
    return any(name in trace.ended_before for name in group.modules)


def _start(group: LayerGroup, trace: InputTrace) -> int:
    if group.layer is not None:
        return trace.ended_before[group.layer]
    return min(trace.ended_before[name] for name in group.modules if name in trace.ended_before)


def _layer_group(names: Sequence[str], linears: Mapping[str, Any], block: str | None, packing: Packing) -> LayerGroup:
    weights = [linears[name].weight for name in names]
    parts = [packing.part_shapes(*weight_shape(linears[name])).values() for name in names]
    return LayerGroup(
        name=_group_name(names),
        layer=block,
        modules=tuple(names),
        parameters=sum(weight.numel() for weight in weights),
        bytes_at_16_bits=sum(weight.nbytes for weight in weights),
        bytes_quantized=sum(_bytes(dtype, shape) for each in parts for dtype, shape in each)
        + len(names) * packing.table_bytes(),
    )


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel()) * dtype.itemsize


def _group_name(names: Sequence[str]) -> str:
    """``model.layers.0.mlp.gate_proj+up_proj``"""
    paths = list(dict.fromkeys(tuple(without_expert_number(name)) for name in names))
    if len(paths) == 1:
        return ".".join(paths[0])
    shared = 0
    while len({path[: shared + 1] for path in paths}) == 1:
        shared += 1
    return ".".join((*paths[0][:shared], "+".join(".".join(path[shared:]) for path in paths)))


def _role(name: str) -> str:
    return ".".join(_ANY if part.isdigit() else part for part in without_expert_number(name))


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in without_expert_number(name) if part.isdigit())


def _block(name: str, modules: Mapping[str, Any]) -> str | None:
    """The innermost numbered module above the layer whose siblings are all of its own class; if there is none, the
    outermost numbered one. An expert is none."""
    parts = without_expert_number(name)
    numbered = [".".join(parts[: index + 1]) for index, part in enumerate(parts[:-1]) if part.isdigit()]
    alike = [path for path in numbered if len(set(map(type, modules[path.rpartition(".")[0]].children()))) == 1]
    return alike[-1] if alike else next(iter(numbered), None)
