"""A job queue that quantizes models in batches, benchmarks them, and recommends which to ship.

    import qbatch

    batch = qbatch.submit(["org/model", "./folder"], bits=[4, 8])
    batch.wait()
    frame = batch.results().frame()

The folders next to this file are links to those at the top of the repository, which are imported as ``qbatch.worker``
and so on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qbatch.commands.client import ResultRows, SubmittedBatch, results, submit, wait
    from qbatch.core.errors import QbatchError
    from qbatch.core.measured.result_row import ResultRow

__all__ = ["QbatchError", "ResultRow", "ResultRows", "SubmittedBatch", "results", "submit", "wait"]

_ELSEWHERE = {"QbatchError": "qbatch.core.errors", "ResultRow": "qbatch.core.measured.result_row"}


def __getattr__(name: str) -> Any:
    # Every process of qbatch imports this package, and few need these.
    if name not in __all__:
        raise AttributeError(f"module 'qbatch' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ELSEWHERE.get(name, "qbatch.commands.client")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
