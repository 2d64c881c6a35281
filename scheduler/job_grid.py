"""sources × schemes × shapes → the jobs of a batch, bundled by source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from qbatch.core.domain import BASELINE, DeviceKind, DType, JobSpec, Method, ProtocolOptions, Scheme, SourceRef
from qbatch.core.errors import UsageError

BITS = (4, 8, 16)
QUANT_TYPES = {"nf4": Method.NF4, "fp4": Method.FP4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What to do with each model of a list.

    Empty tuples of sizes, and None for ``why`` and ``energy``, mean the default of the device.
    """

    bits: tuple[int, ...]
    quant_types: tuple[str, ...] = ("nf4",)
    double_quant: bool = False
    compute_dtype: DType = DType.AUTO
    dtype: DType = DType.AUTO
    device: DeviceKind = DeviceKind.AUTO
    baseline: bool = True
    force: bool = False
    skip_modules: tuple[str, ...] = ()
    int8_threshold: float = 6.0
    quant_storage: str = "uint8"
    max_shard_bytes: int | None = None
    allow_pickle: bool = False
    batch_sizes: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    new_tokens: tuple[int, ...] = ()
    why: bool | None = None
    energy: bool | None = None

    def __post_init__(self) -> None:
        if not self.bits:
            raise UsageError("no bit width was given (use 4, 8 or 16)")
        for bits in self.bits:
            if bits not in BITS:
                raise UsageError(f"{bits} is not a supported bit width (use 4, 8 or 16)")
        if self.double_quant and 4 not in self.bits:
            raise UsageError("double quantization needs a 4-bit scheme: add 4 to the bit widths")
        if min((*self.batch_sizes, *self.prompt_tokens), default=1) < 1:
            raise UsageError("the batch size and the number of prompt tokens must be at least 1")
        if min(self.new_tokens, default=2) < 2:
            raise UsageError("the number of new tokens must be at least 2: decoding is timed from the second token on")

    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes without duplicates: the baseline first, then 8 bits, then 4 bits."""
        schemes: list[Scheme] = []
        if self.baseline or 16 in self.bits:
            schemes.append(BASELINE)
        if 8 in self.bits:
            schemes.append(self._scheme(Method.INT8, int8_threshold=self.int8_threshold))
        if 4 in self.bits:
            schemes += [
                self._scheme(QUANT_TYPES[name], double_quant=self.double_quant, quant_storage=self.quant_storage)
                for name in dict.fromkeys(self.quant_types)
            ]
        return tuple(schemes)

    def _scheme(self, method: Method, **own: Any) -> Scheme:
        return Scheme(
            method=method,
            compute_dtype=self.compute_dtype,
            skip_modules=tuple(sorted(set(self.skip_modules))),
            max_shard_bytes=self.max_shard_bytes,
            **own,
        )

    def bundle(self, source: SourceRef, protocol: ProtocolOptions) -> Sequence[JobSpec]:
        """All jobs of one source, shape by shape, each with its baseline first."""
        return [
            JobSpec(
                source=source,
                scheme=scheme,
                dtype=self.dtype,
                device=self.device,
                protocol=shaped,
                force=self.force,
                allow_pickle=self.allow_pickle,
            )
            for shaped in self._shaped(protocol)
            for scheme in self.schemes()
        ]

    def _shaped(self, protocol: ProtocolOptions) -> Iterator[ProtocolOptions]:
        """``protocol`` with every combination of the requested sizes, without duplicates."""
        requested = (self.batch_sizes, self.prompt_tokens, self.new_tokens)
        for batch_size, prompt_tokens, new_tokens in product(*(dict.fromkeys(sizes or (None,)) for sizes in requested)):
            yield replace(
                protocol,
                batch_size=batch_size,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                why=self.why,
                energy=self.energy,
            )
