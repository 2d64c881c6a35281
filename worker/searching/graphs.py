"""A graph for a backward pass that reaches the layers' outputs, but no parameter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter gets a gradient within the context."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def with_graph(output: torch.Tensor) -> torch.Tensor:
    """``output`` with a graph. Nothing before the first of the layers needs a gradient, so it begins there; a copy,
    since what begins a graph must not be changed in place."""
    return output if output.requires_grad else output.detach().requires_grad_().clone()
