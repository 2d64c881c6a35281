"""Traced tensors remember what was done to them, and joins that are undone cancel out."""

from __future__ import annotations

import torch

from qbatch.worker.quantizing.tensors.trace import (
    Call,
    Cast,
    FromSource,
    TracedTensor,
    is_elementwise,
    replay,
    simplified,
    sources_of,
)

DATA = {name: torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("abcd")}


def traced(name: str) -> TracedTensor:
    return TracedTensor.of(torch.empty(4, 6, device="meta"), FromSource(name))


def test_what_changes_no_value_leaves_no_trace() -> None:
    parameter = torch.nn.Parameter(traced("a")[...].contiguous(), requires_grad=False)
    assert isinstance(parameter, torch.nn.Parameter)
    origin = parameter.detach().origin  # type: ignore[attr-defined]
    assert isinstance(origin, FromSource)
    assert is_elementwise(origin)


def test_a_cast_is_replayed() -> None:
    origin = traced("a").to(device="meta", dtype=torch.float16).origin  # type: ignore[attr-defined]
    assert isinstance(origin, Cast)
    assert is_elementwise(origin)
    assert torch.equal(replay(origin, DATA.__getitem__), DATA["a"].half())


def test_experts_fused_and_taken_apart_are_the_experts() -> None:
    gates, ups = (torch.stack([traced(name) for name in names], dim=0) for names in ("ab", "cd"))
    fused = torch.cat([gates, ups], dim=1)
    for half, names in zip(torch.chunk(fused, 2, dim=1), ("ab", "cd"), strict=True):
        for expert, name in zip(torch.chunk(half.contiguous(), 2, dim=0), names, strict=True):
            origin = simplified(expert.squeeze(0).origin)  # type: ignore[attr-defined]
            assert isinstance(origin, FromSource)
            assert origin.name == name


def test_what_does_not_cancel_out_is_computed() -> None:
    joined = torch.cat([traced("a"), traced("b")], dim=1)
    third = torch.chunk(joined, 3, dim=1)[1]
    origin = simplified(third.origin)  # type: ignore[attr-defined]
    assert isinstance(origin, Call)
    assert sources_of(origin) == {"a", "b"}
    expected = torch.chunk(torch.cat([DATA["a"], DATA["b"]], dim=1), 3, dim=1)[1]
    assert torch.equal(replay(origin, DATA.__getitem__), expected)
