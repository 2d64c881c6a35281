"""A model made ready for a search: its groups, both versions of its weights, and what it answers at 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from qbatch.core.domain import Scheme
from qbatch.core.errors import Unsupported
from qbatch.core.search.sensitivity import LayerGroup
from qbatch.worker.measuring.quality.divergence import Divergence, divergence
from qbatch.worker.measuring.quality.floor import arithmetic_floor
from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.measuring.quality.replay import logits_of
from qbatch.worker.measuring.speed.size import measure_size
from qbatch.worker.methods.implementations import weights_of
from qbatch.worker.methods.packing import Packing
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel
from qbatch.worker.quantizing.planning.skeleton import quantized_linears
from qbatch.worker.searching.backward_memory import free_bytes
from qbatch.worker.searching.base_logits import BaseLogits
from qbatch.worker.searching.layer_groups import ModelLayers, model_layers
from qbatch.worker.searching.layer_outputs import WindowOutputs, is_replayable, nbytes, recorded, replayed
from qbatch.worker.searching.mixed_model import MixedModel
from qbatch.worker.searching.mixture_quality import MixtureQuality

# The shares of the free memory that may be taken by the base's logits, and by the outputs of the blocks, of which
# there may be two sets at a time.
_LOGITS_SHARE, _OUTPUTS_SHARE = 8, 6

# The pass of the model at 16 bits, and what rounding every weight takes of another.
_READY_PASSES = 1.25

Progress = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class OpenedSearch:
    """``passes`` counts what was done so far, in passes through the whole model over all windows. ``quantized``: the
    mixture without any group at 16 bits, once it was measured. ``floor_kl``: that of 16-bit arithmetic alone, None in
    float32."""

    loaded: LoadedModel
    scheme: Scheme
    probes: Sequence[Probe]
    layers: ModelLayers
    mixed: MixedModel
    base: BaseLogits
    bytes_at_16_bits: int
    report: Progress
    passes: float = _READY_PASSES
    quantized: MixtureQuality | None = None
    floor_kl: float | None = None

    @property
    def groups(self) -> Mapping[str, LayerGroup]:
        return {group.name: group for group in self.layers.groups}

    def weights_bytes(self, at_16_bits: Set[str]) -> int:
        """The bytes of the weights of a checkpoint that keeps these groups at 16 bits."""
        groups = (*self.layers.groups, *self.layers.unreached)
        saved = (group.extra_bytes for group in groups if group.name not in at_16_bits)
        return self.bytes_at_16_bits - sum(saved)

    def cost(self, group: str) -> float:
        """What measuring a mixture costs that differs from one with known outputs in this group, in passes."""
        return 1 - self.layers.start[group] / len(self.layers.blocks) if self.layers.blocks else 1.0

    def measure(
        self, at_16_bits: Set[str], *, beside: MixtureQuality | None = None, changed: str = "", keep_outputs: bool
    ) -> MixtureQuality:
        """Measure a mixture on every window. ``beside``: one that differs in the group ``changed`` alone, whose blocks
        before it need not run again."""
        skipped = self.layers.blocks[: self.layers.start[changed]] if beside is not None and beside.outputs else ()
        self.mixed.keep(at_16_bits)
        known = beside.outputs if beside is not None and beside.outputs else [{} for _ in self.probes]
        results = [self._window(number, known[number], skipped, keep_outputs) for number in range(len(self.probes))]
        self.passes += self.cost(changed) if skipped else 1.0
        return MixtureQuality(
            at_16_bits=frozenset(at_16_bits),
            windows=[found for found, _ in results],
            outputs=[outputs for _, outputs in results] if keep_outputs and self.layers.blocks else [],
        )

    def _window(
        self, number: int, known: WindowOutputs, skipped: Sequence[str], keep_outputs: bool
    ) -> tuple[Divergence, WindowOutputs]:
        model, probe = self.loaded.model, self.probes[number]
        run = self.layers.blocks[len(skipped) :] if keep_outputs else ()
        with replayed(model, known, skipped) if skipped else nullcontext(), recorded(model, run) as outputs:
            logits = logits_of(model, probe, self.loaded.device)
        earlier = {name: known[name] for name in skipped}
        return divergence(self.base.of(number), logits, probe.targets), earlier | outputs


@contextmanager
def opened_search(
    loaded: LoadedModel, probes: Sequence[Probe], scheme: Scheme, report: Progress = lambda _: None
) -> Iterator[OpenedSearch]:
    """``loaded``: the model at 16 bits, in the dtype in which it would be published. On a CPU it is computed in
    float32, which it stays in; its weights are those that it came with again after the context.

    Raises Unsupported if the scheme is not one of 4 bits by bitsandbytes, if the model answers nothing that can be
    compared token by token, or if no layer of it is quantized.
    """
    packing = _packing(loaded, scheme, probes)
    model, device = loaded.model, loaded.device
    names = quantized_linears(type(model), model.config, scheme.skip_modules)
    if not names:
        raise Unsupported(f"{scheme.method} quantizes no layer of {type(model).__name__}")
    layers = model_layers(model, names, probes[0], device, packing)
    if not layers.groups:
        raise Unsupported(f"text reaches none of the layers of {type(model).__name__} that {scheme.method} quantizes")
    bytes_at_16_bits = measure_size(model).weights_bytes
    if device == "cpu":
        model.float()
    if layers.blocks and not is_replayable(model, layers.blocks, layers.start.values(), probes[0], device):
        report("its blocks hand on more than their outputs, so every mixture runs whole")
        layers = _without_blocks(layers)
    report("the model at 16 bits")
    floor = arithmetic_floor(loaded, probes)
    with recorded(model, layers.blocks) as outputs:
        base = BaseLogits(model, probes, device, most_bytes=free_bytes(device) // _LOGITS_SHARE)
    layers = _restartable(layers, len(probes) * sum(map(nbytes, outputs.values())), device)
    outputs.clear()
    report("rounding every weight")
    mixed = MixedModel(model, layers.groups, packing, copies=_copies_on(layers, device))
    try:
        yield OpenedSearch(
            loaded=loaded,
            scheme=scheme,
            probes=probes,
            layers=layers,
            mixed=mixed,
            base=base,
            bytes_at_16_bits=bytes_at_16_bits,
            report=report,
            floor_kl=None if floor is None else floor.kl_mean,
        )
    finally:
        mixed.keep(mixed.all_groups)


def _packing(loaded: LoadedModel, scheme: Scheme, probes: Sequence[Probe]) -> Packing:
    if loaded.kind is ModelKind.ENCODER:
        raise Unsupported(f"{type(loaded.model).__name__} predicts nothing, so no KL divergence can rank its layers")
    if not probes:
        raise Unsupported(f"{type(loaded.model).__name__} has no text to be compared on: {loaded.why_no_tokenizer}")
    packing = weights_of(scheme.description).packing(scheme) if not scheme.is_baseline else None
    if packing is None or not packing.is_weight_only:
        raise Unsupported(f"layers are ranked for schemes that quantize nothing but weights, not for {scheme.method}")
    return packing


def _copies_on(layers: ModelLayers, device: str) -> str:
    """The rounded weights lie beside the others where there is room for them; those are the model's own."""
    itemsize = torch.float32.itemsize if device == "cpu" else torch.bfloat16.itemsize
    needed = itemsize * sum(group.parameters for group in layers.groups)
    return device if 2 * needed < free_bytes(device) else "cpu"


def _restartable(layers: ModelLayers, outputs_bytes: int, device: str) -> ModelLayers:
    """``layers`` without its blocks if their outputs on all windows would take too much memory."""
    fits = outputs_bytes * _OUTPUTS_SHARE < free_bytes(device)
    return layers if fits else _without_blocks(layers)


def _without_blocks(layers: ModelLayers) -> ModelLayers:
    return replace(layers, blocks=(), start=dict.fromkeys(layers.start, 0))
