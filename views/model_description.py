"""The output of ``qbatch inspect``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qbatch.views.formats import NOTHING, printable
from qbatch.views.units import show_bytes_exactly, show_count


def inspection_table(inspection: Mapping[str, Any]) -> str:
    """The mapping of ``qbatch.core.inspection.inspect_source``, one figure per line."""
    lines = [(title, printable(text)) for title, text in _lines(inspection)]
    width = max(len(title) for title, _ in lines)
    return "\n".join(f"{title.ljust(width)}  {text}" for title, text in lines)


def _lines(inspection: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    revision = inspection["commit"] or inspection["revision"]
    yield "model", inspection["model"] + (f" at {revision}" if revision else "")
    yield "architecture", inspection["architecture"] or NOTHING
    yield "model type", inspection["model_type"] or NOTHING
    if inspection["quantization"]:
        yield "quantization", inspection["quantization"]
    yield "parameters", _parameters(inspection["num_parameters"])
    yield "tensors", f"{inspection['num_tensors']:,}"
    yield (
        "dtype",
        ", ".join(
            f"{dtype} ({share['parameters']:,} elements)" if len(inspection["dtypes"]) > 1 else dtype
            for dtype, share in inspection["dtypes"].items()
        ),
    )
    yield "in memory as stored", show_bytes_exactly(inspection["memory_bytes"])
    for dtype, count in (inspection["memory_bytes_by_dtype"] or {}).items():
        yield f"in memory as {dtype}", show_bytes_exactly(count)
    files = len(inspection["files"])
    yield "on disk", f"{show_bytes_exactly(inspection['disk_bytes'])} in {files} file{'s' if files > 1 else ''}"


def _parameters(count: int | None) -> str:
    if count is None:
        return f"{NOTHING} (unknown: the headers of this quantization do not show it)"
    return f"{count:,} ({show_count(count)})" if count >= 1000 else str(count)
