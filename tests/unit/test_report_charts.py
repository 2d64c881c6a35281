"""The charts of a report: axes that hold their values, marks where the figures are, names that touch nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbatch.core.byte_units import GIB, KIB, MIB
from qbatch.core.measured.metric import Unit
from qbatch.views.comparison import Preference
from qbatch.views.groups import models_of
from qbatch.views.report import scatter_layout as scatter
from qbatch.views.report import speed_layout as speed
from qbatch.views.report.chart_data import ScatterData, scatter_charts, speed_lines
from qbatch.views.report.column_unit import column_unit
from qbatch.views.report.judged_group import judged_groups
from qbatch.views.report.log_axis import LogAxis, show_round_bytes
from qbatch.views.report.speed_colour import SAME, UNKNOWN, speed_colour
from tests.unit.measured_rows import result
from tests.unit.printed import read

positive = st.floats(1e-9, 1e15)


@given(st.lists(positive, min_size=1))
def test_an_axis_holds_its_values_and_marks_a_few(values: list[float]) -> None:
    axis = LogAxis.around(values, start=10, end=110)
    assert all(10 < axis.position(value) < 110 for value in values)
    assert axis.high / axis.low >= 3.99
    for marked in (axis.decimal_ticks(), axis.binary_ticks()):
        assert all(axis.low <= tick <= axis.high for tick in marked)
        assert len(marked) <= 7
    assert len(axis.decimal_ticks()) >= 2


@given(positive, positive)
def test_a_larger_value_stands_further_along(one: float, other: float) -> None:
    axis = LogAxis.around([one, other], start=0, end=10_000)
    assert (axis.position(one) <= axis.position(other)) == (one <= other) or math.isclose(one, other, rel_tol=1e-3)


@pytest.mark.parametrize(("value", "text"), [(2**30, "1 GiB"), (2**35, "32 GiB"), (2**29, "512 MiB"), (2**12, "4 KiB")])
def test_a_tick_is_a_round_number_of_bytes(value: float, text: str) -> None:
    assert show_round_bytes(value) == text


@pytest.mark.parametrize(
    ("unit", "values", "label", "texts"),
    [
        (Unit.BYTES, [15.0 * GIB, 1.14 * GIB], "GiB", ["15.00", "1.14"]),
        (Unit.BYTES, [15.0 * GIB, 12.0 * MIB], "MiB", ["15,360.0", "12.0"]),
        (Unit.BYTES, [3.0 * KIB, 400.0 * KIB], "KiB", ["3.00", "400.00"]),
        (Unit.SECONDS, [0.109, 0.0353], "ms", ["109.0", "35.3"]),
        (Unit.SECONDS, [20.0, 4.0], "s", ["20.00", "4.00"]),
        (Unit.TOKENS_PER_S, [48.8, 13.7], "tok/s", ["48.8", "13.7"]),
        (Unit.SHARE, [0.989], "%", ["98.9"]),
        (Unit.NATS, [0.0026], "nats", ["2.6e-03"]),
        (Unit.BYTES, [], "KiB", []),
        (Unit.SECONDS, [math.nan, math.inf, 0.5], "ms", []),
    ],
)
def test_a_column_has_one_unit_in_which_every_figure_is_legible(
    unit: Unit, values: list[float], label: str, texts: list[str]
) -> None:
    chosen = column_unit(unit, values)
    assert chosen.label == label
    assert [chosen.show(value) for value in values][: len(texts)] == texts


def charts(rows: Sequence[dict[str, Any]], **preference: Any) -> list[ScatterData]:
    return scatter_charts(judged_groups(models_of(read(rows)), Preference(**preference)))


def models(count: int, **quality: Any) -> list[dict[str, Any]]:
    """As many models, each with a baseline and two schemes, close to each other."""
    rows = []
    for number in range(count):
        base = 3 * number + 1
        own = {"model": f"org/a-model-with-a-name-{number}", "decode_tokens_per_s": 40.0}
        rows.append(result(base, weights_bytes=2**34, **own))
        for scheme, share in (("bnb-int8", 2), ("bnb-nf4", 1)):
            kl = {"kl_mean": 0.001 * (3 - share) * (1 + number / 9), "kl_mean_se": 1e-5, **quality}
            more = own | {"baseline_job_id": f"j{base}", "weights_bytes": 2**32 * share + number * 2**24}
            rows.append(result(base + share, scheme, kl_mean=kl["kl_mean"], details={"quality": kl}, **more))
    return rows


@pytest.mark.parametrize("size", [scatter.WIDE, scatter.NARROW], ids=lambda size: size.name)
@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_names_in_a_chart_touch_neither_marks_nor_each_other(count: int, size: scatter.ChartSize) -> None:
    (chart,) = charts(models(count))
    layout = scatter.scatter_layout(chart, size)
    boxes = [scatter.label_box(label) for label in layout.labels]
    assert not any(scatter.is_overlap(one, other) for one, other in itertools.combinations(boxes, 2))
    marks = [(point.x - 6, point.y - 6, point.x + 6, point.y + 6) for point in layout.points]
    assert not any(scatter.is_overlap(box, mark) for box in boxes for mark in marks)
    assert len(boxes) == count or count > 3 or size is scatter.NARROW


def test_every_mark_is_within_the_frame() -> None:
    (chart,) = charts(models(8))
    for size in (scatter.WIDE, scatter.NARROW):
        for point in scatter.scatter_layout(chart, size).points:
            assert size.left < point.x < size.width - size.right
            assert size.top < point.y < size.height - size.bottom


def test_the_limit_that_decided_is_drawn() -> None:
    (chart,) = charts(models(1), max_kl=0.0123)
    assert list(chart.limits) == [0.0123]
    assert [limit.text for limit in scatter.scatter_layout(chart, scatter.WIDE).limits] == ["limit 0.0123"]


def test_without_kl_the_loss_of_perplexity_is_drawn() -> None:
    rows = models(2, kl_mean=None, kl_mean_se=None, ln_ppl_ratio=0.01, ln_ppl_ratio_se=0.001)
    (chart,) = charts([row | {"kl_mean": None} for row in rows])
    assert chart.title == "perplexity ratio to the baseline − 1"
    assert [point.cost for point in chart.points] == [pytest.approx(0.01005, rel=1e-2)] * 4
    assert list(chart.limits) == [pytest.approx(0.02)]


def test_each_device_and_each_way_to_measure_has_a_chart() -> None:
    elsewhere = [row | {"device_name": "A100", "job_id": f"j{900 + n}"} for n, row in enumerate(models(1))]
    encoder = result(500, "bnb-int8", model="e", weights_bytes=2**28, details={"quality": {"rank_correlation": 0.99}})
    assert [chart.title for chart in charts([*models(1), *elsewhere, encoder])] == [
        "mean KL, nats",
        "mean KL, nats",
        "loss of rank correlation",
    ]


def test_a_speed_has_the_colour_of_its_ratio_and_grey_is_no_difference() -> None:
    rows = models(1)
    rows[1] |= {"decode_tokens_per_s": 10.0}
    (chart,) = charts(rows)
    assert [speed_colour(point.speed) for point in chart.points][1] is SAME
    assert speed_colour(chart.points[0].speed).name == "slow-3"
    assert speed_colour(None) is UNKNOWN


def test_a_time_of_half_as_long_is_twice_as_fast() -> None:
    rows = models(1)
    for row, seconds in zip(rows, (0.2, 0.1, 0.4), strict=True):
        row["prefill_s_p50"] = seconds
    lines = speed_lines(judged_groups(models_of(read(rows)), Preference()))
    factors = {line.label.scheme: line.prefill and line.prefill.factor for line in lines}
    assert factors == {"bnb-int8": 2.0, "bnb-nf4": 0.5}


@pytest.mark.parametrize("size", [speed.WIDE, speed.NARROW], ids=lambda size: size.name)
def test_the_label_of_a_speed_fits_beside_it(size: scatter.ChartSize) -> None:
    rows = [row | {"model": f"org/{'m' * 300}"} for row in models(1)]
    layout = speed.speed_layout(speed_lines(judged_groups(models_of(read(rows)), Preference())), size)
    for line in layout.lines:
        assert len(line.label) * 6.4 <= (size.left if size is speed.WIDE else size.width)
        assert line.label.endswith(("bnb-nf4", "bnb-int8"))
    assert any(tick.text == "×1" and tick.position == layout.one for tick in layout.x_ticks)
