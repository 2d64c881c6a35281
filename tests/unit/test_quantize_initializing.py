"""Whatever transformers' initialization does to a loaded tensor is seen, and nothing else is taken for that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qbatch.worker.quantizing.planning.initializing import why_overwritten
from qbatch.worker.quantizing.tensors.trace import FromSource, TracedTensor


class Model(torch.nn.Module):
    """One loaded parameter, one that the source lacks, and an initialization."""

    def __init__(self, initialize: Callable[[Model], object]) -> None:
        super().__init__()
        traced = TracedTensor.of(torch.empty(4, 6, device="meta"), FromSource("w"))
        self.loaded = torch.nn.Parameter(traced, requires_grad=False)
        self.missing = torch.nn.Parameter(torch.empty(4, 6, device="meta"), requires_grad=False)
        self._initialize = initialize

    def mark_tied_weights_as_initialized(self, _info: object) -> None:
        pass

    def initialize_weights(self) -> None:
        self._initialize(self)


@pytest.mark.parametrize(
    "write",
    [
        lambda model: torch.nn.init.zeros_(model.loaded[1]),
        lambda model: torch.nn.init.normal_(model.loaded.data[1]),
        lambda model: model.loaded.__setitem__(-1, -1.0),
        lambda model: model.loaded.copy_(torch.ones(4, 6)),
        lambda model: torch.add(model.missing, 1, out=model.loaded.data),
    ],
    ids=["slice", "data", "item", "copy", "out"],
)
def test_a_write_to_a_loaded_tensor_is_seen(write: Callable[[Model], object]) -> None:
    assert "values of loaded " in (why_overwritten(Model(write), None) or "")


@pytest.mark.parametrize(
    "write",
    [
        lambda model: torch.nn.init.normal_(model.missing),
        lambda model: model.missing.copy_(model.loaded),
        lambda model: torch.zeros_like(model.loaded).fill_(1.0),
        lambda model: model.loaded.clone().mul_(2),
    ],
    ids=["missing", "read", "like", "clone"],
)
def test_writes_to_other_tensors_are_ignored(write: Callable[[Model], object]) -> None:
    assert why_overwritten(Model(write), None) is None


def test_an_initialization_that_needs_values_is_reported() -> None:
    assert "without data" in (why_overwritten(Model(lambda model: model.loaded[0, 0].item()), None) or "")


def test_tracing_leaves_the_random_state_unchanged() -> None:
    before = torch.get_rng_state()
    assert why_overwritten(Model(lambda model: model.missing.copy_(torch.rand(4, 6))), None) is None
    assert torch.equal(torch.get_rng_state(), before)
