"""From a mixture to the scheme that publishes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qbatch.core.domain import Scheme
from qbatch.core.search.frontier import FrontierPoint
from qbatch.worker.quantizing.planning.skeleton import skip_list_keeping


def scheme_of_point(cls: Any, config: Any, scheme: Scheme, point: FrontierPoint) -> Scheme:
    """``scheme`` with the skip list, as it is published, that keeps the layers of ``point`` at 16 bits besides those
    that the scheme keeps already. ``cls`` and ``config`` are those of the model."""
    if not point.modules and not scheme.skip_modules:
        return scheme
    return replace(scheme, skip_modules=skip_list_keeping(cls, config, scheme.skip_modules, set(point.modules)))
