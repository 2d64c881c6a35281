"""A row's scheme in words: what tells it from the other rows of its model."""

from __future__ import annotations

from qbatch.core.domain import BASELINE
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.formats import printable
from qbatch.views.units import show_bytes

_USUAL = BASELINE.to_json()


def show_scheme(row: ResultRow) -> str:
    """``baseline bfloat16``, ``bnb-nf4 double``, ``bnb-int8 threshold 0``: the method, and what is not as usual."""
    if row.is_baseline:
        return f"baseline {row.dtype}"
    double = " double" if row.double_quant else ""
    compute = row.compute_dtype
    return f"{row.scheme}{double}{_unusual(row)}" + ("" if compute in ("auto", row.dtype) else f" in {compute}")


def _unusual(row: ResultRow) -> str:
    """The options beside the data types that differ from their defaults."""
    options = _USUAL | dict(row.options)
    words = []
    if options["skip_modules"]:
        words.append(printable(f" without {','.join(options['skip_modules'])}"))
    if row.scheme == "bnb-int8" and options["int8_threshold"] != _USUAL["int8_threshold"]:
        words.append(f" threshold {options['int8_threshold']:g}")
    if row.bits == 4 and options["quant_storage"] != _USUAL["quant_storage"]:
        words.append(f" stored as {options['quant_storage']}")
    if options["max_shard_bytes"] != _USUAL["max_shard_bytes"]:
        words.append(f" in shards of {show_bytes(options['max_shard_bytes'])}")
    return "".join(words)
