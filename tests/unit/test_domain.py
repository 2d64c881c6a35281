"""Values that cross every boundary: what goes out as JSON comes back equal, and an invalid one cannot be built."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbatch.core.domain import (
    BASELINE,
    LARGEST_ID,
    DeviceKind,
    DType,
    JobState,
    Method,
    Protocol,
    ProtocolOptions,
    Scheme,
    content_hash,
    find_id,
    format_batch_id,
    format_job_id,
    stored_dtype,
)
from qbatch.core.errors import ERROR_KINDS, JobError, UsageError, job_error
from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import MEASURED_COLUMNS, Measurement

PROTOCOL = ProtocolOptions(eval_text_sha256="0" * 64).for_device(DeviceKind.CPU)

schemes = st.builds(
    Scheme.of,
    method=st.sampled_from([Method.NF4, Method.FP4]),
    double_quant=st.booleans(),
    compute_dtype=st.sampled_from(DType),
    skip_modules=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    int8_threshold=st.floats(0, 100),
    max_shard_bytes=st.none() | st.integers(1, 2**40),
)


@given(schemes)
def test_a_scheme_survives_json(scheme: Scheme) -> None:
    assert Scheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


@given(st.builds(ProtocolOptions, eval_text_sha256=st.text(min_size=1), batch_size=st.none() | st.integers(1, 99)))
def test_protocol_options_survive_json(options: ProtocolOptions) -> None:
    assert ProtocolOptions.from_json(json.loads(json.dumps(options.to_json()))) == options


def test_a_protocol_survives_json_with_its_hash() -> None:
    again = Protocol.from_json(json.loads(json.dumps(PROTOCOL.to_json())))
    assert again == PROTOCOL
    assert again.hash == PROTOCOL.hash


def test_a_measurement_survives_json() -> None:
    sizes = {"disk_bytes": 1, "memory_footprint_bytes": 2, "weights_bytes": 3}
    measurement = Measurement(
        device_name="a CPU",
        dtype=DType.FLOAT16,
        compute_dtype=DType.BFLOAT16,
        num_parameters=10,
        quantized_fraction=0.25,
        bits_per_param=7.5,
        details=Details.from_json({"nested": {"p99": [0.1, None]}}),
        **sizes,
    )
    assert Measurement.from_json(json.loads(json.dumps(measurement.to_json()))) == measurement
    assert set(MEASURED_COLUMNS) == set(measurement.to_json()) - {"details"}


@pytest.mark.parametrize(
    "fields",
    [
        {"method": Method.INT8, "double_quant": True},
        {"method": Method.NONE, "double_quant": True},
        {"method": Method.INT8, "int8_threshold": -0.1},
        {"method": Method.INT8, "int8_threshold": float("nan")},
        {"method": Method.NF4, "max_shard_bytes": 0},
    ],
)
def test_an_invalid_scheme_cannot_be_built(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Scheme.of(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("prompt_tokens", 0),
        ("min_iterations", 0),
        ("eval_window", 0),
        ("eval_stride", 0),
        ("new_tokens", 1),
        ("warmup_tokens", 1),
        ("prefill_iterations", -1),
    ],
)
def test_an_invalid_protocol_is_refused_by_the_name_of_its_field(field: str, value: int) -> None:
    with pytest.raises(UsageError, match=field):
        Protocol.from_json(PROTOCOL.to_json() | {field: value})


def test_every_field_of_a_protocol_decides_its_hash() -> None:
    for field, value in PROTOCOL.to_json().items():
        other = value + "x" if isinstance(value, str) else value + 1
        assert Protocol.from_json(PROTOCOL.to_json() | {field: other}).hash != PROTOCOL.hash, field


def test_a_protocol_of_0_1_0_is_read_and_keeps_its_hash() -> None:
    """It has no ``warmup_tokens`` and no ``prefill_iterations``, and means what it meant."""
    stored = {
        "batch_size": 1, "prompt_tokens": 256, "new_tokens": 64, "warmup_iterations": 2, "min_iterations": 6,
        "min_duration_s": 3.0, "eval_text_sha256": "0" * 64, "eval_window": 1024, "eval_stride": 1024,
        "eval_max_windows": 32, "rounds": 3, "why": True,
    }  # fmt: skip
    protocol = Protocol.from_json(stored)
    assert (protocol.warmup_tokens, protocol.prefill_iterations) == (None, 0)
    assert protocol.to_json() == stored
    assert protocol.hash == content_hash(stored)
    assert ProtocolOptions(eval_text_sha256="0" * 64).for_device(DeviceKind.CUDA).hash != protocol.hash


@pytest.mark.parametrize("kind", [DeviceKind.CPU, DeviceKind.CUDA])
def test_every_device_s_default_has_the_rounds_that_an_error_needs(kind: DeviceKind) -> None:
    """With two rounds hardly any difference could be confirmed."""
    assert ProtocolOptions(eval_text_sha256="0" * 64).for_device(kind).rounds >= 3


def test_what_was_asked_of_a_protocol_goes_before_the_devices_default() -> None:
    options = ProtocolOptions(eval_text_sha256="0" * 64, batch_size=7)
    cuda, cpu = options.for_device(DeviceKind.CUDA), options.for_device(DeviceKind.CPU)
    assert cuda.batch_size == cpu.batch_size == 7
    assert cuda.prompt_tokens > cpu.prompt_tokens


@pytest.mark.parametrize(
    ("requested", "source", "stored"),
    [
        (DType.AUTO, DType.FLOAT16, DType.FLOAT16),
        (DType.AUTO, DType.BFLOAT16, DType.BFLOAT16),
        (DType.AUTO, DType.FLOAT32, DType.BFLOAT16),
        (DType.AUTO, DType.AUTO, DType.BFLOAT16),
        (DType.FLOAT32, DType.FLOAT16, DType.FLOAT32),
        (DType.FLOAT16, DType.FLOAT32, DType.FLOAT16),
    ],
)
def test_what_stays_unquantized_keeps_a_16_bit_dtype_unless_told(
    requested: DType, source: DType, stored: DType
) -> None:
    assert stored_dtype(requested, source) is stored


@pytest.mark.parametrize(
    ("scheme", "dtype", "bits"),
    [
        (Scheme(method=Method.NF4), DType.FLOAT32, 4),
        (Scheme(method=Method.FP4), DType.BFLOAT16, 4),
        (Scheme(method=Method.INT8), DType.FLOAT32, 8),
        (BASELINE, DType.BFLOAT16, 16),
        (BASELINE, DType.AUTO, 16),
        (BASELINE, DType.FLOAT32, 32),
    ],
)
def test_the_nominal_bits_follow_scheme_and_dtype(scheme: Scheme, dtype: DType, bits: int) -> None:
    assert scheme.bits(dtype) == bits


def test_a_scheme_is_resolved_once() -> None:
    asked = Scheme(method=Method.NF4)
    assert asked.resolved(DType.FLOAT16).compute_dtype is DType.FLOAT16
    assert asked.resolved(DType.FLOAT16).resolved(DType.BFLOAT16).compute_dtype is DType.FLOAT16


def test_only_three_states_are_ends() -> None:
    assert [state for state in JobState if state.ended] == [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED]


def test_the_content_hash_ignores_order_and_sees_every_value() -> None:
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash({"a": 1, "b": [1, 2]}) != content_hash({"a": 1, "b": [2, 1]})


@given(st.integers(1, LARGEST_ID))
def test_an_id_reads_back(number: int) -> None:
    assert find_id(format_batch_id(number)) == ("b", number)
    assert find_id(format_job_id(number)) == ("j", number)


@pytest.mark.parametrize(
    "text", ["", "b", "12", "b0", "b01", "B12", "j-1", "b1 2", "b1.0", "b١", "x3", "b2147483648", "b" + "9" * 19, " b1"]
)
def test_what_is_no_id_is_not_taken_for_one(text: str) -> None:
    assert find_id(text) is None


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_an_error_survives_as_kind_and_message(kind: str) -> None:
    error = job_error(kind, "why")
    assert isinstance(error, JobError)
    assert (error.kind, str(error)) == (kind, "why")


def test_an_unknown_error_kind_is_not_guessed_at() -> None:
    with pytest.raises(KeyError):
        job_error("no_such_kind", "why")
