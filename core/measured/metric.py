"""What a metric is: its name, its unit, which way is better, and what is noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from qbatch.core.measured.result_row import ResultRow
from qbatch.core.measured.speed_figures import Phase

Value = Callable[[ResultRow], float | None]


class Unit(StrEnum):
    """The unit of a metric, which determines how its values are formatted."""

    BITS = "bits"
    BYTES = "bytes"
    CORRELATION = "−1 to 1"
    JOULES = "joules"
    NATS = "nats"
    PLAIN = "a number"
    PROBABILITY = "probability"
    SAMPLES_PER_S = "samples/s"
    SECONDS = "seconds"
    SHARE = "share"
    TOKENS_PER_S = "tokens/s"


class Better(StrEnum):
    """Which of two values is better."""

    LOWER = "lower"
    HIGHER = "higher"
    NEITHER = "–"


class BaselineComparison(StrEnum):
    """What is shown after a value, if it can be compared with the baseline's."""

    NOTHING = "–"
    RATIO = "ratio"
    CHANGE = "change in percent"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonNoise:
    """The value is noise if its ``distance`` from the base is less than its standard ``error``, or not more than the
    distance caused by 16-bit arithmetic alone (``floor``)."""

    distance: Value
    error: Value
    floor: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class FloorNoise:
    """The value is noise if it is 1, or not below the value caused by 16-bit arithmetic alone (``floor``). For metrics
    without a standard error."""

    floor: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingNoise:
    """The value is noise if row and baseline differ by no more than the rounds of ``phase`` explain. ``of``: what of a
    round's times the value is made of."""

    phase: Phase
    of: Literal["median", "mean"]


Noise = ComparisonNoise | FloorNoise | TimingNoise


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric.

    ``key``: its dotted path in a row's JSON, which programs use; ``value`` reads the same from a ``ResultRow``.
    ``label``: the heading of its column; ``title``: its name in ``show``, if different. ``comparison``: what is shown
    after the value. ``on_device``: values are comparable only on the same device. ``error`` and ``floor``: the
    standard error, and the value for 16-bit arithmetic alone, both shown by ``show``. ``in_details``: where ``show``
    reads the value from, if not with ``value``. ``csv``: its column in ``compare``'s CSV, if not the last part of the
    key.
    """

    key: str
    label: str
    unit: Unit
    better: Better
    value: Value
    title: str = ""
    comparison: BaselineComparison = BaselineComparison.NOTHING
    on_device: bool = False
    noise: Noise | None = None
    error: Value | None = None
    floor: Value | None = None
    in_details: Value | None = None
    csv: str = ""

    def line_value(self, row: ResultRow) -> float | None:
        """The value that ``show`` prints."""
        return (self.in_details or self.value)(row)

    @property
    def csv_name(self) -> str:
        return self.csv or self.key.rpartition(".")[2]

    @property
    def option_name(self) -> str:
        """What it is called in an option: its label with dashes for spaces, without a comma, which separates names."""
        plain = self.label.casefold().replace("'s", "").replace(",", "").replace("δ", "delta-")
        return plain.replace(" ", "-")

    @property
    def line_title(self) -> str:
        return self.title or self.label


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricColumn:
    """A column of a table, which shows the first of its ``metrics`` that a row has. ``rank``: if the terminal is too
    narrow, columns with the highest rank are dropped first, and those of rank 0 never."""

    metrics: tuple[Metric, ...]
    rank: int = 0

    def metric_of(self, row: ResultRow) -> Metric | None:
        return next((metric for metric in self.metrics if metric.value(row) is not None), None)
