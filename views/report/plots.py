"""The charts of a report as files, PNG and SVG, drawn with matplotlib, which the extra ``plots`` installs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbatch.core.errors import UsageError
from qbatch.views.formats import printable
from qbatch.views.report.chart_data import ScatterData, ScatterPoint, SpeedLine, scatter_charts, speed_lines
from qbatch.views.report.judged_group import JudgedGroup
from qbatch.views.report.log_axis import LogAxis, show_round_bytes
from qbatch.views.report.relative_speed import RelativeSpeed
from qbatch.views.report.scatter_layout import WIDE, ScatterLayout, scatter_layout
from qbatch.views.report.speed_colour import SCALE, speed_colour
from qbatch.views.report.speed_layout import MOST_LINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P")
_KINDS = ("png", "svg")
_DECODE, _PREFILL, _PICK = "#0b5cad", "#8a4b08", "#0d6338"
_LONGEST_NAME = 40


def write_plots(groups: Sequence[JudgedGroup], folder: Path) -> list[Path]:
    """Write the charts and return their files; none where there is nothing to draw.

    Raises UsageError if matplotlib is not installed, or the folder cannot be written.
    """
    _require_matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [path for name, draw in _charts(groups) for path in _save(draw(), folder / name)]
    except OSError as error:
        raise UsageError(f"the charts cannot be written to {folder}: {error.strerror}") from error


def _require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--plots needs matplotlib, which is not installed here: pip install 'qbatch[plots]'"
        ) from error


def _charts(groups: Sequence[JudgedGroup]) -> Iterable[tuple[str, Callable[[], Figure]]]:
    scatters = scatter_charts(groups)
    for number, data in enumerate(scatters, start=1):
        name = "size-against-divergence" + (f"-{number}" if len(scatters) > 1 else "")
        yield name, lambda data=data: _scatter(data)  # type: ignore[misc]
    if lines := speed_lines(groups)[:MOST_LINES]:
        yield "speed-against-baseline", lambda: _speed(lines)


def _save(figure: Figure, path: Path) -> list[Path]:
    import matplotlib as mpl

    files = [path.with_name(f"{path.name}.{kind}") for kind in _KINDS]
    # Text stays text, and two runs of the same figures give the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qbatch"}):
        for file in files:
            figure.savefig(file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def _text(text: str) -> str:
    """``text`` for matplotlib, which would take what is between two dollar signs for a formula."""
    shown = printable(text).replace("$", r"\$")
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True, color="#e8ebee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _scatter(data: ScatterData) -> Figure:
    figure, axes = _figure(9, 5.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for point in data.points:
        _draw_point(axes, point, _MARKERS[data.schemes.index(point.label.scheme) % len(_MARKERS)])
    for limit in data.limits:
        axes.axhline(limit, color="#a81e1e", linestyle="--", linewidth=1)
    _place(axes, scatter_layout(data, WIDE))
    axes.set_xlabel("weights")
    axes.set_ylabel(f"{data.title} (lower is better)")
    axes.set_title(_text(data.setting) or "Size against divergence", loc="left", size=10)
    _scatter_legend(axes, data)
    return figure


def _draw_point(axes: Axes, point: ScatterPoint, marker: str) -> None:
    where = ([point.weights_bytes], [point.cost])
    if point.error is not None:
        axes.errorbar(*where, yerr=[point.error], fmt="none", ecolor="#39424e", elinewidth=0.8)
    if point.is_pick:
        axes.scatter(*where, s=120, facecolors="none", edgecolors=_PICK, linewidths=1.6)
    face = speed_colour(point.speed).hexadecimal or "none"
    axes.scatter(*where, s=45, marker=marker, c=face, edgecolors="#39424e", linewidths=0.7, zorder=3)


def _place(axes: Axes, layout: ScatterLayout) -> None:
    """The axes and the names where the page has them."""
    across, up = layout.x_axis, layout.y_axis
    axes.set_xlim(across.low, across.high)
    axes.set_ylim(up.low, up.high)
    axes.set_xticks(across.binary_ticks(), [show_round_bytes(tick) for tick in across.binary_ticks()])
    axes.set_yticks(up.decimal_ticks(), [f"{tick:g}" for tick in up.decimal_ticks()])
    axes.minorticks_off()
    for label in layout.labels:
        share = (
            (label.x - across.start) / (across.end - across.start),
            (label.y - up.start) / (up.end - up.start),
        )
        side, gap = {"start": ("left", 3), "middle": ("center", 0), "end": ("right", -3)}[label.anchor]
        where: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (gap, 0), "textcoords": "offset points"}
        axes.annotate(_text(label.text), share, ha=side, size=8, color="#566070", **where)


def _scatter_legend(axes: Axes, data: ScatterData) -> None:
    from matplotlib.lines import Line2D

    def mark(marker: str, face: str, text: str) -> Line2D:
        return Line2D([], [], linestyle="none", marker=marker, color="#39424e", markerfacecolor=face, label=text)

    used = {speed_colour(point.speed) for point in data.points}
    schemes = [mark(_MARKERS[n % len(_MARKERS)], "#566070", _text(name)) for n, name in enumerate(data.schemes)]
    colours = [mark("o", colour.hexadecimal or "none", colour.text) for colour in SCALE if colour in used]
    pick = mark("o", "none", "recommended")
    pick.set(markersize=11, markeredgecolor=_PICK)
    axes.legend(
        handles=[*schemes, *colours, pick], fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
    )


def _speed(lines: Sequence[SpeedLine]) -> Figure:
    figure, axes = _figure(9, 1.4 + 0.28 * len(lines))
    axes.set_xscale("log")
    for number, line in enumerate(lines):
        for speed, marker, colour in ((line.prefill, "D", _PREFILL), (line.decode, "o", _DECODE)):
            if speed is not None:
                face = "white" if speed.is_same else colour
                axes.scatter([speed.factor], [number], s=36, marker=marker, c=face, edgecolors=colour, zorder=3)
    axes.axvline(1, color="#566070", linestyle=":", linewidth=1.2)
    axes.set_yticks(range(len(lines)), [_name(line) for line in lines], size=8)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    _speed_ticks(axes, [speed for line in lines for speed in line.speeds])
    axes.set_xlabel("times the baseline's speed (further right is faster)")
    axes.set_title("decoding ●   prompt ◆   hollow: not distinguishable", loc="left", size=9)
    return figure


def _name(line: SpeedLine) -> str:
    return " · ".join(_text(part) for part in (line.label.model, line.label.scheme, line.label.setting) if part)


def _speed_ticks(axes: Axes, speeds: Sequence[RelativeSpeed]) -> None:
    axis = LogAxis.around([1.0, *(speed.factor for speed in speeds)], start=0, end=1)
    marked = sorted({*axis.decimal_ticks(), 1.0})
    axes.set_xlim(axis.low, axis.high)
    axes.set_xticks(marked, [f"×{value:g}" for value in marked])
    axes.minorticks_off()
