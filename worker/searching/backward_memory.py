"""Whether a backward pass fits the memory, predicted before it is tried: on a CPU the kernel would kill the process."""

from __future__ import annotations

from typing import Any

import torch

from qbatch.worker.machine.host_memory import available_memory
from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.measuring.quality.replay import forward_logits
from qbatch.worker.searching.graphs import frozen, with_graph
from qbatch.worker.searching.input_trace import shortened
from qbatch.worker.searching.mixed_model import MixedModel

# Two short passes are watched, of an eighth and a quarter of the tokens, but of no less than this.
_LEAST_TOKENS = 8
# What a pass needs for each logit: itself, that of the base, and in float32 both probabilities and the gradient.
_FLOAT32_LOGITS = 3
_CONTRACTED_WEIGHTS = 3
_MARGIN = 1.25


class _Saved:
    """The distinct tensors that a graph keeps and the inputs that are kept besides, apart from the weights. They are
    held, so that no two have one address."""

    def __init__(self, model: Any) -> None:
        self._weights = {parameter.data_ptr() for parameter in model.parameters()}
        self._storages: dict[int, int] = {}
        self._held: list[torch.Tensor] = []

    def add_input(self, _module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        self.add(args[0].detach())
        return with_graph(output)

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in self._weights:
            self._held.append(tensor)
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(self._storages.values())


def backward_bytes(mixed: MixedModel, probe: Probe, device: str) -> int:
    """The memory that a forward and a backward pass over ``probe`` are predicted to need, besides the weights: what
    short passes keep, extrapolated to its tokens with a linear and a quadratic term."""
    tokens = max(len(probe.ids), len(probe.labels))
    first, second = (max(_LEAST_TOKENS, tokens // part) for part in (8, 4))
    if second == first:
        second = first + _LEAST_TOKENS
    kept = [_kept_bytes(mixed, shortened(probe, count), device) for count in (first, second)]
    slope = (kept[1] / second - kept[0] / first) / (second - first)
    quadratic = max(0.0, slope)
    linear = max(kept[0] / first - quadratic * first, 0.0)
    largest = max(module.weight.nbytes for module in mixed.linears().values())
    activations = linear * tokens + quadratic * tokens**2
    return int(_MARGIN * (activations + _logits_bytes(mixed, tokens) + _CONTRACTED_WEIGHTS * largest))


def free_bytes(device: str) -> int:
    """What can still be allocated on ``device``."""
    if not device.startswith("cuda"):
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _kept_bytes(mixed: MixedModel, probe: Probe, device: str) -> int:
    """What the graph of a pass keeps, and the inputs of the layers, which are kept besides."""
    saved = _Saved(mixed.model)
    hooks = [module.register_forward_hook(saved.add_input) for module in mixed.linears().values()]
    try:
        with (
            torch.enable_grad(),
            frozen(mixed.model),
            torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor),
        ):
            logits = forward_logits(mixed.model, probe, device)
            return saved.nbytes if logits.requires_grad else 0
    finally:
        for hook in hooks:
            hook.remove()


def _logits_bytes(mixed: MixedModel, tokens: int) -> int:
    head = mixed.model.get_output_embeddings()
    if head is None:
        return 0
    vocabulary, itemsize = head.weight.shape[0], head.weight.itemsize
    return int(tokens * vocabulary * (2 * itemsize + _FLOAT32_LOGITS * 4))
