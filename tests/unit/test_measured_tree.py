"""What is stored of a measurement reads as it was written, whoever wrote it, and loses nothing."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbatch.core.domain import DType
from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import MEASURED_COLUMNS, Measurement
from qbatch.core.measured.metrics import ALL_METRICS, GRAPH_DECODE
from qbatch.core.measured.quality_figures import Quality, QualityFloor, Score, TaskScores
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.measured.speed_figures import Phase
from qbatch.core.stored_json import Stored, as_json, field_names, omitted_if_unknown, omitted_unless
from tests.unit.measured_rows import result, stats
from tests.unit.printed import Preference, comparison, read, rendered, results_table, show_jobs
from tests.unit.test_golden_views import REAL, SETS, VARIANTS
from tests.unit.test_show import NF4, RECORD


def made_anew(part: Any) -> Any:
    """The same values in parts that were read from nowhere."""
    if isinstance(part, TaskScores):
        return part
    if isinstance(part, Stored):
        return replace(part, **{name: made_anew(getattr(part, name)) for name in field_names(type(part))})
    if isinstance(part, Mapping):
        return {name: made_anew(item) for name, item in part.items()}
    return tuple(map(made_anew, part)) if isinstance(part, tuple) else part


# What a method adds to a checkpoint's audit; it alone reads it.
OF_A_METHOD = ("int8_zero_scales", "int8_infinite_scales")


def unknown_in(part: Any, path: str = "") -> Iterator[str]:
    if isinstance(part, Stored):
        yield from (f"{path}.{name}" for name in part.unknown())
        for name in field_names(type(part)):
            yield from unknown_in(getattr(part, name), f"{path}.{name}")
    elif isinstance(part, Mapping):
        for name, item in part.items():
            yield from unknown_in(item, f"{path}.{name}")


@pytest.mark.parametrize("row", REAL, ids=lambda row: row["job_id"])
def test_a_typed_tree_is_written_as_workers_wrote_it_before(row: dict[str, Any]) -> None:
    """The very keys, in the very order: what is stored and shown as JSON did not change."""
    details = Details.from_json(row["details"])
    assert set(unknown_in(details)) <= {f".audit.{name}" for name in OF_A_METHOD}
    audit = {name: value for name, value in row["details"].get("audit", {}).items() if name not in OF_A_METHOD}
    written = row["details"] | ({"audit": audit} if audit else {})
    assert json.dumps(made_anew(details).to_json()) == json.dumps(written)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_an_older_or_newer_version_wrote_is_kept_whole(name: str) -> None:
    for row in SETS[name]():
        assert json.dumps(ResultRow.from_json(row).to_json()) == json.dumps(row)


def test_absent_is_none_and_an_empty_part_can_be_asked_on() -> None:
    details = Details.from_json({})
    assert details.quality.floor.kl_mean is None
    assert details.why.energy.decode.net_j is None
    assert details.times(Phase.DECODE).mean is None
    assert not details.quality.is_known
    assert Details.from_json(None) == details
    assert (details.to_json(), as_json(details), as_json(Details())) == ({}, {}, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart(Stored):
    value: float | None = None
    error: float | None = omitted_unless("value")
    note: str | None = omitted_if_unknown()
    count: int | None = omitted_if_unknown()
    flags: Mapping[str, bool] | None = omitted_if_unknown()
    times: tuple[float, ...] | None = omitted_if_unknown()
    inner: QualityFloor = field(default_factory=QualityFloor)


def test_what_is_not_known_is_null_or_left_out_as_its_field_says() -> None:
    assert StoredPart().to_json() == {"value": None, "inner": None}
    assert StoredPart(value=0.0, note="").to_json() == {"value": 0.0, "error": None, "note": "", "inner": None}
    assert StoredPart(value=float("nan")).to_json() == {"value": None, "error": None, "inner": None}
    assert StoredPart(inner=QualityFloor(rows=3)).to_json()["inner"] == {"rows": 3}


WRONG: list[Any] = ["text", True, [], {}, [{}], {"x": []}, None, 1.5, ["a"], -3]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_value_of_another_type_is_none_and_stays_in_the_json(wrong: Any) -> None:
    stored = dict.fromkeys(("value", "error", "note", "count", "flags", "times", "inner"), wrong)
    part = StoredPart.from_json(stored)
    assert part.to_json() == stored
    assert isinstance(part.value, float | int | None)
    assert not isinstance(part.value, bool)
    assert isinstance(part.note, str | None)
    assert isinstance(part.count, int | None)
    assert all(isinstance(flag, bool) for flag in (part.flags or {}).values())
    assert all(isinstance(time, float) for time in part.times or ())
    assert isinstance(part.inner, QualityFloor)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for name, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(item, (*path, name))


def with_wrong(value: Any, path: tuple[Any, ...], wrong: Any) -> Any:
    if not path:
        return wrong
    if isinstance(value, list):
        return [with_wrong(item, path[1:], wrong) if at == path[0] else item for at, item in enumerate(value)]
    return value | {path[0]: with_wrong(value[path[0]], path[1:], wrong)}


# What identifies a row comes from columns of the database, which have types.
MEASURED = [*MEASURED_COLUMNS, "details"]
ASKED = ("dtype", "compute_dtype")
PLACES = [
    (row, path)
    for row in (REAL[0], REAL[2], REAL[4], NF4 | RECORD)
    for path in paths({name: row[name] for name in MEASURED if name not in ASKED})
    if path
]


@given(st.sampled_from(PLACES), st.sampled_from(WRONG))
@settings(max_examples=100, deadline=None)
def test_a_row_with_a_wrong_value_anywhere_is_still_shown(place: tuple[Any, Any], wrong: Any) -> None:
    row, path = place
    changed = with_wrong(row, path, wrong)
    rows = [REAL[0] | {"job_id": "j1"}, changed | {"job_id": "j2"}]
    assert "j2" in results_table(rows)
    assert "j2" in show_jobs([(changed | {"job_id": "j2"}, REAL[0])])
    for prefer in ("size", "speed", "quality"):
        for form in ("table", "json", "csv"):
            assert "j2" in comparison(rows, Preference(prefer=prefer), by="figure", format=form)
    assert json.loads(rendered([changed], "json")) == json.loads(json.dumps([changed]))


def test_a_measurement_travels_between_processes_and_through_the_spool() -> None:
    row = REAL[2]
    values = {name: row[name] for name in MEASURED}
    found = Measurement.from_json(values)
    assert found.dtype is DType.BFLOAT16
    assert found.to_json() == values
    assert pickle.loads(pickle.dumps(found)) == found  # noqa: S301  (our own)
    with pytest.raises(TypeError, match="num_parameters"):
        Measurement.from_json({name: value for name, value in values.items() if name != "num_parameters"})


def test_a_task_s_scores_are_stored_under_their_own_names() -> None:
    scores = {"acc": Score(value=0.5, error=0.1), "f1,strict": Score(value=float("nan"), error=None)}
    task = TaskScores.of(
        scores,
        n_samples=4,
        num_fewshot=0,
        version="1",
        higher_is_better={"acc": True},
        config_hash="c",
        samples_hash="s",
    )
    assert list(task.to_json())[:4] == ["acc", "acc_stderr", "f1,strict", "f1,strict_stderr"]
    assert task.scores == {"acc": Score(value=0.5, error=0.1), "f1,strict": Score(value=None, error=None)}
    assert task.n_samples == 4


def at(value: Any, key: str) -> Any:
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def test_a_metric_s_key_is_where_its_value_stands_in_the_json() -> None:
    for metric in ALL_METRICS:
        if metric is GRAPH_DECODE:
            continue  # it is derived: see test_the_graph_s_rate_follows_from_what_is_stored
        row = result(1, "bnb-nf4")
        *outer, last = metric.key.split(".")
        part = row
        for name in outer:
            part[name] = part.get(name) or {}
            part = part[name]
        part[last] = 123.0
        assert metric.value(ResultRow.from_json(row)) == 123.0, metric.key
    assert len({metric.key for metric in ALL_METRICS}) == len(ALL_METRICS)
    for row in read(REAL):
        assert [metric.value(row) for metric in ALL_METRICS] == [
            at(row.to_json(), metric.key) for metric in ALL_METRICS
        ]


def test_a_metric_in_two_places_is_the_same_in_both() -> None:
    """``show`` reads of a column's value what the details have of it."""
    quality = Quality(kl_mean=0.1, top1_agreement=0.9)
    row = replace(ResultRow.from_json(result(1)), kl_mean=0.1, top1_agreement=0.9, details=Details(quality=quality))
    for metric in ALL_METRICS:
        assert metric.line_value(row) == metric.value(row)


def test_a_phase_that_newer_code_times_is_shown_under_its_own_name() -> None:
    row = REAL[2] | {"details": REAL[2]["details"] | {"stats": {"draft": stats(0.5)}}}
    assert "draft" in show_jobs([(row, None)])


def test_the_graph_s_rate_follows_from_what_is_stored() -> None:
    """So rows that were stored before it was shown have it as well, beside the eager rate."""
    why = {"kernels_alone": {"step_s": 0.005, "reason": None}}
    (stored,) = read([result(1, decode_tokens_per_s=53.0, details={"why": why, "shapes": {"batch_size": 8}})])
    written = replace(stored).to_json()
    assert written["graph_decode_tokens_per_s"] == pytest.approx(1600.0)
    names = list(written)
    assert names.index("graph_decode_tokens_per_s") == names.index("decode_tokens_per_s") + 1
    assert read([result(1, details={"why": why})])[0].graph_decode_tokens_per_s == pytest.approx(200.0)
    for step_s in (None, 0.0, "fast"):
        (without,) = read([result(1, details={"why": {"kernels_alone": {"step_s": step_s}}})])
        assert replace(without).to_json()["graph_decode_tokens_per_s"] is None
