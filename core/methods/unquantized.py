"""The baseline: the source's own weights at 16 (or 32) bits."""

from __future__ import annotations

from dataclasses import dataclass

from qbatch.core.methods import bnb
from qbatch.core.methods.description import MethodDescription, Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Unquantized(MethodDescription):
    """No quantization. Its rows store bitsandbytes' options, and its keys contain that library's version, because they
    did so in earlier versions."""

    def check(self, options: Options) -> None:
        bnb.refuse_double_quantization(self.name, options)


NONE = Unquantized(
    name="none",
    aliases=("baseline",),
    inactive_options=(bnb.DOUBLE_QUANT, bnb.INT8_THRESHOLD, bnb.QUANT_STORAGE),
    libraries=(bnb.LIBRARY,),
)
