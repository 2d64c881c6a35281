"""``--measure``: a row has the parts that were asked for, and is no failure where others are missing."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qbatch.core.domain import BASELINE, DeviceKind, DType, Method, Protocol, ProtocolOptions, Scheme, Stage
from qbatch.core.errors import BenchmarkError
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.measurement import Measurement
from qbatch.worker.measuring.model_benchmark import ModelBenchmark
from qbatch.worker.measuring.row_benchmark import RowBenchmark
from qbatch.worker.measuring.subject import Subject
from qbatch.worker.runner.bundle import Bundle
from qbatch.worker.runner.timing_pauses import TimingPauses
from tests import tiny
from tests.unit.benchmark_models import QUICK, TEXT, loaded_on_cpu
from tests.unit.test_benchmark_rounds import TEXT_HASH, RoundsEar, order

SIZE, QUALITY, SPEED = MeasuredPart.SIZE, MeasuredPart.QUALITY, MeasuredPart.SPEED
SCHEMES = (BASELINE, Scheme(method=Method.NF4))
FULL = frozenset({SIZE, QUALITY, SPEED})


def measured(
    folder: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: Set[MeasuredPart],
    schemes: tuple[Scheme, ...] = SCHEMES,
) -> tuple[RoundsEar, list[Measurement]]:
    chosen = {part.value: part in parts for part in (QUALITY, SPEED)}

    def quick(_options: ProtocolOptions, _kind: DeviceKind) -> Protocol:
        return replace(QUICK, eval_text_sha256=TEXT_HASH, rounds=2, **chosen)

    monkeypatch.setattr(ProtocolOptions, "for_device", quick)
    ear = RoundsEar()
    Bundle(order(folder, source, schemes=schemes), ear, TimingPauses()).run()
    return ear, [done.measurement for _, done in sorted(ear.measured().items())]


def known(row: Measurement) -> dict[str, bool]:
    return {
        "size": row.weights_bytes > 0 and row.disk_bytes > 0 and row.details.size.buffer_bytes is not None,
        "loaded": row.load_model_s is not None,
        "quality": row.perplexity is not None,
        "speed": row.decode_tokens_per_s is not None and row.details.memory.is_known,
    }


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({SIZE}, {"size"}),
        ({SIZE, QUALITY}, {"size", "loaded", "quality"}),
        ({SIZE, SPEED}, {"size", "loaded", "speed"}),
        (FULL, {"size", "loaded", "quality", "speed"}),
    ],
)
def test_a_row_has_the_parts_that_were_asked_for(
    parts: Set[MeasuredPart], expected: Set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ear, rows = measured(tmp_path, tiny.make_causal(tmp_path / "llama"), monkeypatch, parts)
    assert ear.failed() == {}
    assert [{name for name, is_known in known(row).items() if is_known} for row in rows] == [expected, expected]
    baseline, quantized = rows
    assert (quantized.kl_mean is not None) == (QUALITY in parts)
    assert baseline.details.protocol_hash == quantized.details.protocol_hash
    assert quantized.details.audit.is_known
    assert quantized.details.checkpoint_key
    assert bool(ear.entered(Stage.LOADING)) == (parts != {SIZE})


@pytest.mark.parametrize("make", [tiny.make_speech, tiny.make_fused_qkv], ids=["speech", "no tokenizer"])
def test_a_model_that_cannot_be_measured_has_a_size(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its quantized checkpoint is what was asked for: nothing that needs the model to run can fail."""
    source = make(tmp_path / "source")
    ear, rows = measured(tmp_path, source, monkeypatch, {SIZE})
    assert ear.failed() == {}
    assert ear.entered(Stage.LOADING) == []
    assert rows[1].weights_bytes < rows[0].weights_bytes


def test_a_size_that_is_counted_is_that_of_the_loaded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.make_causal(tmp_path / "llama")
    _, counted = measured(tmp_path, source, monkeypatch, {SIZE})
    _, loaded = measured(tmp_path, source, monkeypatch, {SIZE, SPEED})
    assert [row.details.size for row in counted] == [row.details.size for row in loaded]
    for name in ("num_parameters", "quantized_fraction", "bits_per_param", "disk_bytes", "memory_footprint_bytes"):
        assert [getattr(row, name) for row in counted] == [getattr(row, name) for row in loaded]


def test_a_source_that_cannot_be_loaded_fails_without_being_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.make_causal(tmp_path / "llama")
    (source / "config.json").write_text(
        (source / "config.json").read_text().replace('"hidden_size": 128', '"hidden_size": 64')
    )
    ear, rows = measured(tmp_path, source, monkeypatch, {SIZE})
    assert ear.failed().keys() == {1, 2}
    assert rows == []


def test_energy_alone_is_measured_without_times(tmp_path: Path) -> None:
    """Up to the counter, which only a GPU has: what is missing there is named."""
    row = observed(tmp_path, replace(QUICK, quality=False, speed=False, energy=True))
    assert row.captured_shape is None
    measurement = row.measurement(kernels=None, interleaved_with=())
    assert measurement.details.why.energy.reason is not None
    assert measurement.details.why.verdict is None
    assert measurement.details.shapes.prompt_tokens == 16
    assert measurement.details.stats is not None
    assert measurement.details.stats.keys() == {"load_model"}


def test_what_is_given_up_after_it_was_observed_is_not_captured(tmp_path: Path) -> None:
    row = observed(tmp_path, replace(QUICK, quality=False, why=True))
    assert row.captured_shape is not None
    row.give_up_speed(BenchmarkError("it cannot be loaded again"))
    assert row.captured_shape is None
    assert (row.measurement(kernels=None, interleaved_with=()).details.not_measured or {}).keys() == {"speed", "why"}


def observed(tmp_path: Path, protocol: Protocol) -> RowBenchmark:
    """A row of a model that counts as explainable, timed if the protocol asks for that, and observed."""
    loaded = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    subject = Subject(
        folder=tmp_path / "llama",
        dtype=DType.BFLOAT16,
        compute_dtype=DType.BFLOAT16,
        protocol=protocol,
        eval_text=TEXT,
        texts={},
        on_step=lambda _: None,
    )
    model = ModelBenchmark(subject)
    model.prepare(loaded)
    model.is_explainable = True
    row = RowBenchmark(model, protocol, lambda _: None)
    for _ in range(row.rounds_to_time):
        row.time(loaded)
    row.observe(loaded)
    return row
