"""Which jobs a submit makes of one model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click
import pytest

from qbatch.commands.parameter_types import Counts
from qbatch.core.domain import (
    BASELINE,
    DeviceKind,
    DType,
    JobSpec,
    Method,
    Protocol,
    ProtocolOptions,
    Scheme,
    SourceRef,
    content_hash,
)
from qbatch.core.errors import UsageError
from qbatch.core.identity import settle
from qbatch.core.recovery import Recovery, RecoveryKind
from qbatch.core.search.bound import Bound
from qbatch.core.search.search_request import SearchRequest
from qbatch.scheduler.job_grid import Grid
from tests.found import SEARCH_PROTOCOL


def methods(**options: Any) -> list[Method]:
    return [scheme.method for scheme in Grid(**options).schemes()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": (4, 8)}, [Method.NONE, Method.INT8, Method.NF4]),
        ({"bits": (8, 4, 8, 4)}, [Method.NONE, Method.INT8, Method.NF4]),
        ({"bits": (4, 8), "baseline": False}, [Method.INT8, Method.NF4]),
        ({"bits": (16,), "baseline": False}, [Method.NONE]),
        ({"bits": (4, 16)}, [Method.NONE, Method.NF4]),
        ({"bits": (4,), "quant_types": (Method.FP4, Method.NF4, Method.FP4)}, [Method.NONE, Method.FP4, Method.NF4]),
    ],
)
def test_the_baseline_comes_first_then_eight_then_four_bits_each_once(
    options: dict[str, Any], expected: list[Method]
) -> None:
    assert methods(**options) == expected


@pytest.mark.parametrize("bits", [(), (3,), (4, 5), (0,), (-4,)])
def test_bits_that_do_not_exist_are_refused(bits: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="4, 8 or 16"):
        Grid(bits=bits)


def test_double_quantization_needs_four_bits() -> None:
    with pytest.raises(UsageError, match="4-bit scheme"):
        Grid(bits=(8,), options={"double_quant": True})
    eight, four = Grid(bits=(4, 8), options={"double_quant": True}, baseline=False).schemes()
    assert (eight.options["double_quant"], four.options["double_quant"]) == (False, True)


def test_an_option_reaches_the_schemes_it_belongs_to_and_no_others() -> None:
    grid = Grid(
        bits=(4, 8),
        compute_dtype=DType.FLOAT16,
        skip_modules=("b", "a", "b"),
        options={"int8_threshold": 0.0, "quant_storage": "bfloat16"},
        max_shard_bytes=10,
    )
    baseline, eight, four = grid.schemes()
    assert baseline == BASELINE, "one baseline serves every choice of options"
    assert (eight.options["int8_threshold"], four.options["int8_threshold"]) == (0.0, 6.0)
    assert (eight.options["quant_storage"], four.options["quant_storage"]) == ("uint8", "bfloat16")
    for scheme in (eight, four):
        assert scheme.compute_dtype is DType.FLOAT16
        assert scheme.skip_modules == ("a", "b"), "the order in which they were named is no identity"
        assert scheme.max_shard_bytes == 10


def test_every_combination_of_sizes_is_a_shape_with_its_own_baseline() -> None:
    grid = Grid(bits=(4,), batch_sizes=(1, 8, 1), new_tokens=(32, 64), why=False, energy=True)
    source, protocol = SourceRef(name="a", location="a"), ProtocolOptions(eval_text_sha256="0" * 64)
    specs = grid.bundle(source, protocol)
    shapes = [(1, None, 32), (1, None, 64), (8, None, 32), (8, None, 64)]
    asked = [(s.protocol.batch_size, s.protocol.prompt_tokens, s.protocol.new_tokens) for s in specs]
    assert asked == [shape for shape in shapes for _ in grid.schemes()]
    assert [spec.scheme.method for spec in specs] == [Method.NONE, Method.NF4] * 4
    assert {(spec.protocol.why, spec.protocol.energy) for spec in specs} == {(False, True)}
    assert len({spec.protocol.for_device(DeviceKind.CPU).hash for spec in specs}) == 4


@pytest.mark.parametrize("sizes", [{"batch_sizes": (1, 0)}, {"prompt_tokens": (0,)}, {"new_tokens": (64, 1)}])
def test_a_shape_without_tokens_is_refused(sizes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(UsageError, match="at least"):
        Grid(bits=(4,), **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0", "8,", "1.5", "-1", "a", "", "1_0", "99999999999"])
def test_what_is_no_list_of_counts_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="comma-separated list of whole numbers of at least 1"):
        Counts(1).convert(text, None, None)


def test_a_list_of_counts_keeps_its_order() -> None:
    assert Counts(1).convert("8, 1,64", None, None) == (8, 1, 64)
    with pytest.raises(click.BadParameter, match="at least 2"):
        Counts(2).convert("64,1", None, None)


def test_why_is_asked_on_a_gpu_and_energy_only_on_request() -> None:
    """On a CPU neither can be had, so asking is no other protocol there."""
    cuda, cpu = DeviceKind.CUDA, DeviceKind.CPU
    silent = ProtocolOptions(eval_text_sha256="0" * 64)
    eager = ProtocolOptions(eval_text_sha256="0" * 64, why=True, energy=True)
    refusing = ProtocolOptions(eval_text_sha256="0" * 64, why=False)
    asked = [(p.why, p.energy) for p in (options.for_device(cuda) for options in (silent, eager, refusing))]
    assert asked == [(True, False), (True, True), (False, False)]
    assert silent.for_device(cpu) == eager.for_device(cpu) == refusing.for_device(cpu)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"share_speed": True, "energy": True}, "--speed shape would time each model all the same"),
        (
            {"share_speed": True, "device": DeviceKind.CPU},
            "--speed shape is about GPUs, and --device cpu was asked for",
        ),
        ({"energy": True, "device": DeviceKind.CPU}, "energy is about GPUs, and --device cpu was asked for"),
        (
            {"why": True, "device": DeviceKind.CPU},
            "what limits the speed is about GPUs, and --device cpu was asked for",
        ),
    ],
)
def test_what_could_have_no_effect_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Grid(bits=(4,), **asked)
    Grid(bits=(4,), **{**asked, "energy": False, "device": DeviceKind.AUTO})


def test_what_was_stored_before_rounds_is_one_round_not_asked_why() -> None:
    asked = {"eval_text_sha256": "0" * 64, "batch_size": 2, "prompt_tokens": None, "new_tokens": None}
    assert ProtocolOptions.from_json(asked) == ProtocolOptions(eval_text_sha256="0" * 64, batch_size=2)
    protocol = ProtocolOptions.from_json(asked).for_device(DeviceKind.CUDA)
    stored = {name: value for name, value in protocol.to_json().items() if name not in ("rounds", "why", "energy")}
    earlier = Protocol.from_json(stored)
    assert (earlier.rounds, earlier.why, earlier.energy) == (1, False, False)
    assert earlier.hash == content_hash(stored) != protocol.hash
    assert Protocol.from_json(protocol.to_json()) == protocol


def test_a_bundle_holds_one_job_for_each_scheme() -> None:
    grid = Grid(bits=(4,), dtype=DType.FLOAT16, device=DeviceKind.CPU, force=True)
    source, protocol = SourceRef(name="a", location="a"), ProtocolOptions(eval_text_sha256="0" * 64)
    specs = grid.bundle(source, protocol)
    assert [spec.scheme for spec in specs] == list(grid.schemes())
    for spec in specs:
        assert (spec.source, spec.protocol) == (source, protocol)
        assert (spec.dtype, spec.device, spec.force) == (DType.FLOAT16, DeviceKind.CPU, True)


def test_adapters_follow_the_scheme_that_they_are_for() -> None:
    asked = (Recovery(kind=RecoveryKind.SVD, rank=8), Recovery(kind=RecoveryKind.SVD, rank=2))
    schemes = Grid(bits=(4, 8), quant_types=(Method.NF4, Method.FP4), recoveries=asked).schemes()
    assert [(scheme.method, scheme.recovery and scheme.recovery.rank) for scheme in schemes] == [
        (Method.NONE, None),
        (Method.INT8, None),
        *((method, rank) for method in (Method.NF4, Method.FP4) for rank in (None, 8, 2)),
    ]


@pytest.mark.parametrize("options", [{"bits": (8,)}, {"bits": (16,)}, {"methods": (Method.TORCHAO_INT4,)}])
def test_adapters_without_such_a_scheme_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"--recover is for 4 bits \(bnb-nf4 or bnb-fp4\), which were not asked for"):
        Grid(recoveries=(Recovery(kind=RecoveryKind.SVD, rank=8),), **options)


def test_a_scheme_without_an_adapter_keeps_the_key_that_it_had() -> None:
    plain = Scheme(method=Method.NF4)
    assert "recovery" not in plain.to_json()
    adapted = replace(plain, recovery=Recovery.of(RecoveryKind.SVD_ACT, 4, "0" * 64))
    assert Scheme.from_json(adapted.to_json()) == adapted
    assert adapted.base == plain
    with pytest.raises(UsageError, match="nothing can be recovered for bnb-int8"):
        Scheme(method=Method.INT8, recovery=adapted.recovery)


# What a search chooses


def searched(grid: Grid) -> list[JobSpec]:
    source, protocol = SourceRef(name="a", location="a"), ProtocolOptions(eval_text_sha256="0" * 64)
    return list(grid.bundle(source, protocol, SEARCH_PROTOCOL))


def test_a_bound_asks_for_a_search_beside_the_schemes() -> None:
    baseline, eight, search = searched(Grid(bits=(8,), bound=Bound(max_kl=0.01), options={"double_quant": True}))
    assert (baseline.search, eight.search) == (None, None)
    assert search.search == SearchRequest(bound=Bound(max_kl=0.01), protocol=SEARCH_PROTOCOL)
    assert (search.scheme.method, search.scheme.options["double_quant"]) == (Method.NF4, True)
    (_, search) = searched(Grid(bound=Bound(max_weights_bytes=5), quant_types=(Method.FP4,)))
    assert (search.scheme.method, search.scheme.bits(DType.BFLOAT16)) == (Method.FP4, 4)


def test_a_bound_on_quality_needs_quality_and_the_baseline() -> None:
    for refused, words in (({"quality": False}, "--measure leaves out"), ({"baseline": False}, "--no-baseline")):
        with pytest.raises(UsageError, match=f"--max-kl .*{words}"):
            Grid(bound=Bound(max_kl=0.01), **refused)  # type: ignore[arg-type]
        Grid(bound=Bound(max_weights_bytes=5), **refused)  # type: ignore[arg-type]


def test_one_search_answers_every_bound() -> None:
    def key(bound: Bound | None) -> str:
        spec = searched(Grid(bits=(4,), bound=bound))[-1]
        return settle(spec, fingerprint="sha256:a", source=DType.BFLOAT16, device_kind=DeviceKind.CPU).key

    assert key(Bound(max_kl=0.01)) == key(Bound(max_weights_bytes=7)) != key(None)
