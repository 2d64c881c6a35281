"""How long a job will take, from those that have ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qbatch.core.job_duration import Basis, JobWork, PastRun, TimeEstimate, estimate_duration, share_of_bundle
from qbatch.core.kinds import DeviceKind
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.pass_duration import estimate_passes, search_tokens, training_tokens
from qbatch.core.recovery import Recovery, RecoveryKind
from qbatch.core.search.search_protocol import SearchProtocol

_B = 10**9
WORK = JobWork(
    method="bnb-nf4",
    device_kind=DeviceKind.CUDA,
    protocol_hash="a",
    parts=frozenset({MeasuredPart.SIZE, MeasuredPart.SPEED}),
    has_tasks=False,
    location="org/model",
    parameters=2 * _B,
)


def _run(seconds: float, **changes: object) -> PastRun:
    return PastRun(work=replace(WORK, **changes), seconds=seconds)  # type: ignore[arg-type]


def _seconds(estimate: TimeEstimate | None) -> float:
    assert estimate is not None
    return estimate.seconds


def test_nothing_is_known_without_runs_of_the_same_parts_and_device() -> None:
    assert estimate_duration(WORK, []) is None
    others = [_run(9, device_kind=DeviceKind.CPU), _run(9, has_tasks=True), _run(9, parts=frozenset())]
    assert estimate_duration(WORK, others) is None


def test_the_best_founded_runs_that_there_are_decide() -> None:
    runs = [_run(40, method="none")]
    assert estimate_duration(WORK, runs) == TimeEstimate(seconds=40, runs=1, basis=Basis.ANY_METHOD)
    runs.append(_run(30, protocol_hash="b"))
    assert estimate_duration(WORK, runs) == TimeEstimate(seconds=30, runs=1, basis=Basis.SAME_METHOD)
    runs += [_run(20), _run(22), _run(90)]
    estimate = estimate_duration(WORK, runs)
    assert estimate == TimeEstimate(seconds=22, runs=3, basis=Basis.SAME_MEASUREMENT)
    assert not estimate.is_rough


def test_time_rises_evenly_between_the_sizes_that_were_seen() -> None:
    runs = [_run(10, parameters=_B), _run(30, parameters=3 * _B)]
    assert _seconds(estimate_duration(WORK, runs)) == pytest.approx(20)
    assert _seconds(estimate_duration(replace(WORK, parameters=5 * _B), runs)) == pytest.approx(50)
    assert _seconds(estimate_duration(replace(WORK, parameters=1000), runs)) == 10


def test_one_size_alone_is_scaled_in_proportion_and_not_too_far() -> None:
    runs = [_run(10, parameters=_B)]
    larger = estimate_duration(WORK, runs)
    assert larger is not None
    assert (larger.seconds, larger.is_beyond, larger.is_rough) == (20, True, True)
    assert estimate_duration(replace(WORK, parameters=11 * _B), runs) is None


def test_a_model_of_unknown_size_has_that_of_its_own_runs() -> None:
    unknown = replace(WORK, parameters=None)
    runs = [_run(10, parameters=_B), _run(30, parameters=3 * _B, location="org/other")]
    assert _seconds(estimate_duration(unknown, runs)) == 10
    assert estimate_duration(replace(unknown, location="org/new"), runs) is None


def test_wider_runs_serve_where_closer_ones_are_of_far_smaller_models() -> None:
    runs = [_run(1, parameters=1000), _run(40, method="none")]
    estimate = estimate_duration(WORK, runs)
    assert estimate is not None
    assert estimate.basis is Basis.ANY_METHOD
    assert not estimate.is_beyond


def test_the_jobs_of_a_bundle_share_its_time_in_which_overlaps_count_once() -> None:
    assert share_of_bundle([(0, 60), (0, 50), (0, 55)], 3) == 20
    assert share_of_bundle([(0, 10), (20, 30)], 2) == 10


TRAINED = replace(WORK, recovery=RecoveryKind.QLORA, steps=100)


def test_a_first_adapter_takes_at_least_what_its_checkpoint_does() -> None:
    runs = [_run(20), _run(22), _run(21)]
    first = estimate_duration(TRAINED, runs)
    assert first == TimeEstimate(seconds=21, runs=3, basis=Basis.WITHOUT_ADAPTER, is_least=True)
    assert first.is_rough
    runs.append(_run(121, recovery=RecoveryKind.QLORA, steps=200))
    assert estimate_duration(TRAINED, runs) == TimeEstimate(seconds=71, runs=1, basis=Basis.SAME_METHOD)
    assert _seconds(estimate_duration(WORK, runs)) == 21, "and is no measure of anything else"
    assert _seconds(estimate_duration(replace(WORK, recovery=RecoveryKind.SVD), runs)) == 21


def test_a_first_search_or_training_takes_as_long_as_prefills() -> None:
    assert search_tokens(SearchProtocol(text_sha256=""), 48) == (5.5 + 48) * 16 * 256
    assert search_tokens(SearchProtocol(text_sha256=""), 100) == (10 + 100) * 16 * 256
    assert training_tokens(Recovery.of(RecoveryKind.QLORA, 8, "", 10)) == 10 * 4 * 256 * 4
    assert training_tokens(Recovery.of(RecoveryKind.SVD, 8, "")) == 0
    search = JobWork.of_search("bnb-nf4", DeviceKind.CUDA, "org/new", 2 * _B)
    timed = replace(_run(20, method="none", parameters=_B), token_s=1e-4)
    on_cpu = replace(timed, work=replace(timed.work, device_kind=DeviceKind.CPU), token_s=1.0)
    assert estimate_passes(search, 1000, [_run(20), on_cpu]) is None
    estimate = estimate_passes(search, 1000, [_run(20), on_cpu, timed])
    assert estimate == TimeEstimate(seconds=pytest.approx(0.2), runs=1, basis=Basis.PREFILLS, is_beyond=True)
    assert estimate.is_rough
