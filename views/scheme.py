"""A short name for a row's scheme, which distinguishes it from the other rows of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qbatch.core.measured.result_row import ResultRow
from qbatch.core.methods.registry import describe_row
from qbatch.core.recovery import with_adapter_mark
from qbatch.core.search.mixture_origin import MixtureOrigin
from qbatch.views.formats import printable
from qbatch.views.units import show_bytes


def show_scheme(row: ResultRow) -> str:
    """``baseline bfloat16``, or the method with the options that differ from their defaults."""
    if row.is_baseline:
        return f"baseline {row.dtype}"
    description, options = describe_row(row.scheme), _options(row)
    compute = row.compute_dtype
    elsewhere = "" if compute in ("auto", row.dtype) else f" in {compute}"
    title = description.title(options)
    adapted = title if row.recovery is None else with_adapter_mark(title, row.recovery.slug)
    name = f"{adapted}{_mixture(row) or _skipped(options)}"
    return f"{name}{description.nondefault_options(options)}{_sharded(options)}{elsewhere}"


def _mixture(row: ResultRow) -> str:
    """`` auto, KL ≤ 0.005`` or `` mixture 3 of j7``: the layers are too many to name."""
    bound = row.mixture.bound
    return row.mixture.title if bound is None else f"{row.mixture.title}, {show_bound(bound)}"


def show_scheme_alone(row: ResultRow) -> str:
    """The name of a row's scheme for people who have the checkpoint but not the database: its search is not named."""
    kept = row.options.get("skip_modules")
    if not row.mixture.is_known:
        return show_scheme(row)
    plain = replace(row, mixture=MixtureOrigin(), options={**row.options, "skip_modules": []})
    return f"{show_scheme(plain)}{' with some layers at 16 bits' if kept else ''}"


def show_bound(bound: Mapping[str, Any]) -> str:
    """``KL ≤ 0.005``"""
    if "max_kl" in bound:
        return f"KL ≤ {bound['max_kl']:g}"
    if "max_ppl_ratio" in bound:
        return f"perplexity ≤ ×{bound['max_ppl_ratio']:g}"
    return f"weights ≤ {show_bytes(bound['max_weights_bytes'])}"


def brief_schemes(rows: Sequence[ResultRow]) -> list[str]:
    """The names of the schemes of ``rows``, where space is scarce. If all baselines have one dtype, it is left out."""
    is_same = len({row.dtype for row in rows if row.is_baseline}) < 2
    return ["baseline" if row.is_baseline and is_same else show_scheme(row) for row in rows]


def _options(row: ResultRow) -> dict[str, Any]:
    return {**row.options, "double_quant": row.double_quant}


def _skipped(options: Mapping[str, Any]) -> str:
    skipped = options.get("skip_modules")
    return printable(f" without {','.join(skipped)}") if skipped else ""


def _sharded(options: Mapping[str, Any]) -> str:
    most = options.get("max_shard_bytes")
    return "" if most is None else f" in shards of {show_bytes(most)}"
