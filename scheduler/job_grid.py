"""sources × schemes × shapes → the jobs of a batch, bundled by source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from qbatch.core.domain import BASELINE, DeviceKind, DType, JobSpec, Method, ProtocolOptions, Scheme, SourceRef
from qbatch.core.errors import UsageError
from qbatch.core.methods.description import MethodOption, Options
from qbatch.core.methods.registry import every_option, known_bits, selected_by_bits
from qbatch.core.recovery import Recovery
from qbatch.core.search.bound import Bound
from qbatch.core.search.search_protocol import SearchProtocol
from qbatch.core.search.search_request import SearchRequest

_BASELINE_BITS = 16
_SEARCHED_BITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What to do to each model of a list.

    ``bits`` ask for the methods that are usual, of several with as many bits for those in ``quant_types`` (empty: the
    first); ``methods`` ask for others by name. ``options`` are the methods' own. ``recoveries`` are the adapters that
    are made for each scheme that can have some, besides its plain checkpoint. ``bound`` asks for the layers that a
    checkpoint of 4 bits must leave at 16 to keep to it. An empty tuple of a shape's sizes is the device's default, and
    so is None for a part of the measurement.
    """

    bits: tuple[int, ...] = ()
    quant_types: tuple[Method, ...] = ()
    methods: tuple[Method, ...] = ()
    options: Options = field(default_factory=dict)
    compute_dtype: DType = DType.AUTO
    dtype: DType = DType.AUTO
    device: DeviceKind = DeviceKind.AUTO
    baseline: bool = True
    force: bool = False
    skip_modules: tuple[str, ...] = ()
    max_shard_bytes: int | None = None
    allow_pickle: bool = False
    batch_sizes: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    new_tokens: tuple[int, ...] = ()
    quality: bool | None = None
    speed: bool | None = None
    why: bool | None = None
    energy: bool | None = None
    share_speed: bool | None = None
    recoveries: tuple[Recovery, ...] = ()
    bound: Bound | None = None

    def __post_init__(self) -> None:
        if not self.bits and not self.methods and self.bound is None:
            raise UsageError(f"no bit width was given; give --bits or --scheme ({_known_bits()})")
        for bits in self.bits:
            if bits not in (*known_bits(), _BASELINE_BITS):
                raise UsageError(f"{bits} is not a supported bit width ({_known_bits()})")
        self._refuse_misplaced_options()
        self._refuse_misplaced_recovery()
        self._refuse_compute_dtype()
        self._refuse_bound()
        for method in self._quantizing():
            method.description.refuse_device(self.device)
            method.description.refuse_dtype(self.dtype)
        if min((*self.batch_sizes, *self.prompt_tokens), default=1) < 1:
            raise UsageError("the batch size and the number of prompt tokens must be at least 1")
        if min(self.new_tokens, default=2) < 2:
            raise UsageError("the number of new tokens must be at least 2: decoding is timed from the second token on")
        if self.speed is False and not self.energy and (self.batch_sizes or self.prompt_tokens or self.new_tokens):
            raise UsageError(
                "--batch-size, --prompt-tokens and --new-tokens are about speed and energy, which --measure leaves out"
            )
        if self.speed is False and self.share_speed:
            raise UsageError("--speed shape is about speed, which --measure leaves out")
        if self.energy and self.share_speed:
            raise UsageError("--speed shape would time each model all the same: energy is measured of each")
        if self.device is DeviceKind.CPU:
            self._refuse_what_only_gpus_have()

    def _refuse_what_only_gpus_have(self) -> None:
        asked = {"what limits the speed": self.why, "energy": self.energy, "--speed shape": self.share_speed}
        for what, is_asked in asked.items():
            if is_asked:
                raise UsageError(f"{what} is about GPUs, and --device cpu was asked for")

    def _refuse_misplaced_options(self) -> None:
        """An option that nothing asked for takes would be ignored, while whoever gave it expects an effect."""
        taken = {option.name for method in self._quantizing() for option in method.description.options}
        for option in every_option():
            if option.of(self.options) != option.default and option.name not in taken:
                raise UsageError(
                    option.error_if_unused or f"{option.flag} {_applies_to(option)}, which was not asked for"
                )
        for method in self.quant_types:
            if method not in self._quantizing():
                what = f"--quant-type {method.description.quant_type}"
                raise UsageError(f"{what} applies to {method.description.bits} bits, which were not asked for")
        if not self._quantizing() and (self.skip_modules or self.max_shard_bytes is not None):
            raise UsageError("--skip-modules and --max-shard-size are about checkpoints, and the baseline writes none")

    def _refuse_misplaced_recovery(self) -> None:
        if self.recoveries and not any(method.description.is_recoverable for method in self._methods()):
            able = " or ".join(method for method in Method if method.description.is_recoverable)
            raise UsageError(f"--recover is for 4 bits ({able}), which were not asked for")

    def _refuse_compute_dtype(self) -> None:
        methods = self._quantizing()
        if self.compute_dtype is DType.AUTO or any(m.description.takes_compute_dtype for m in methods):
            return
        raise UsageError(
            f"{methods[0] if methods else 'the baseline'} computes in the type of its inputs: leave --compute-dtype out"
        )

    def _refuse_bound(self) -> None:
        """A bound on quality is judged by the comparison with the baseline."""
        if self.bound is None or not self.bound.is_about_quality:
            return
        if self.quality is False:
            raise UsageError(f"{self.bound.flag} is about quality, which --measure leaves out")
        if not self._wants_baseline:
            raise UsageError(f"{self.bound.flag} compares with the baseline, which --no-baseline leaves out")

    @property
    def _wants_baseline(self) -> bool:
        return self.baseline or _BASELINE_BITS in self.bits or Method.NONE in self.methods

    def schemes(self) -> tuple[Scheme, ...]:
        """The baseline first, then the others, those of more bits first, each once, and with its adapters after it.
        Without those that are searched."""
        quantized = [scheme for method in self._methods() for scheme in self._with_recoveries(self._scheme(method))]
        return (*([BASELINE] if self._wants_baseline else []), *quantized)

    def _with_recoveries(self, scheme: Scheme) -> Iterator[Scheme]:
        yield scheme
        if scheme.description.is_recoverable:
            yield from (replace(scheme, recovery=recovery) for recovery in self.recoveries)

    def every_scheme(self) -> tuple[Scheme, ...]:
        """``schemes``, and those of which mixtures are looked for."""
        return (*self.schemes(), *self._searched())

    def _searched(self) -> tuple[Scheme, ...]:
        return () if self.bound is None else tuple(map(self._scheme, self._of_bits(_SEARCHED_BITS)))

    def _quantizing(self) -> list[Method]:
        """The methods of ``every_scheme``, without the baseline."""
        searched = self._of_bits(_SEARCHED_BITS) if self.bound is not None else ()
        return list(dict.fromkeys([*self._methods(), *searched]))

    def _methods(self) -> list[Method]:
        """The requested methods, without the baseline."""
        asked = [method for bits in self.bits for method in self._of_bits(bits)]
        distinct = dict.fromkeys([*asked, *(method for method in self.methods if method is not Method.NONE)])
        return sorted(distinct, key=lambda method: -(method.description.bits or 0))

    def _of_bits(self, bits: int) -> Iterator[Method]:
        usual = selected_by_bits(bits)
        chosen = [method for method in self.quant_types if method in usual]
        yield from chosen or usual[:1]

    def _scheme(self, method: Method) -> Scheme:
        own = {option.name: option.of(self.options) for option in method.description.options}
        return Scheme.of(
            method,
            compute_dtype=self.compute_dtype if method.description.takes_compute_dtype else DType.AUTO,
            skip_modules=tuple(sorted(set(self.skip_modules))),
            max_shard_bytes=self.max_shard_bytes,
            **own,
        )

    def bundle(
        self, source: SourceRef, protocol: ProtocolOptions, searching: SearchProtocol | None = None
    ) -> Sequence[JobSpec]:
        """All jobs of one source, shape by shape, each with its baseline first and its searches, which need the
        protocol ``searching``, last."""
        return [
            JobSpec(
                source=source,
                scheme=scheme,
                dtype=self.dtype,
                device=self.device,
                protocol=shaped,
                force=self.force,
                allow_pickle=self.allow_pickle,
                search=search,
            )
            for shaped in self._shaped(protocol)
            for scheme, search in self._asked(searching)
        ]

    def _asked(self, searching: SearchProtocol | None) -> Iterator[tuple[Scheme, SearchRequest | None]]:
        yield from ((scheme, None) for scheme in self.schemes())
        if self.bound is not None and searching is not None:
            request = SearchRequest(bound=self.bound, protocol=searching)
            yield from ((scheme, request) for scheme in self._searched())

    def _shaped(self, protocol: ProtocolOptions) -> Iterator[ProtocolOptions]:
        """``protocol`` with every combination of the requested sizes, without duplicates."""
        requested = (self.batch_sizes, self.prompt_tokens, self.new_tokens)
        for batch_size, prompt_tokens, new_tokens in product(*(dict.fromkeys(sizes or (None,)) for sizes in requested)):
            yield replace(
                protocol,
                batch_size=batch_size,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                quality=self.quality,
                speed=self.speed,
                why=self.why,
                energy=self.energy,
                share_speed=self.share_speed,
            )


def _applies_to(option: MethodOption[Any]) -> str:
    names = [method.value for method in Method if option in method.description.options]
    return f"applies only to {' and '.join(names)}"


def _known_bits() -> str:
    *others, last = map(str, (*known_bits(), _BASELINE_BITS))
    return f"use {', '.join(others)} or {last}"
