"""What the marks and columns of the tables of results mean: in one line, or at length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.audit_text import first_names
from qbatch.views.formats import printable
from qbatch.views.noise import NOISE_MARK, NOT_DISTINGUISHABLE, UNSTEADY_MARK
from qbatch.views.protocol import NOTHING_RUN, show_protocol
from qbatch.views.ratios import OTHER_DTYPE_MARK

PICK_MARK = "✓"
_SHORT = {
    PICK_MARK: "ship",
    "×": "of baseline",
    NOISE_MARK: "within noise",
    UNSTEADY_MARK: "uncertain",
    OTHER_DTYPE_MARK: "source of another dtype",
}
NOISE_LEGEND = (
    f"{NOISE_MARK} means {NOT_DISTINGUISHABLE} from the baseline: the rounds do not confirm a small difference in "
    "speed, or a difference in quality is below one standard error or no larger than rounding to 16 bits causes by "
    "itself."
)
UNSTEADY_LEGEND = (
    f"{UNSTEADY_MARK} means that a speed is uncertain: it differed much between its rounds (`qbatch show --all JOB` "
    "says by how much), or they do not confirm a difference of that size, which the host may have caused."
)
OTHER_DTYPE_LEGEND = (
    f"{OTHER_DTYPE_MARK} means that the source's files have another dtype than the baseline in memory, such as float32 "
    "for bfloat16: a part of this ratio is not due to quantization. The ratio of the weights has one dtype."
)
_IN_FULL = {NOISE_MARK: NOISE_LEGEND, UNSTEADY_MARK: UNSTEADY_LEGEND, OTHER_DTYPE_MARK: OTHER_DTYPE_LEGEND}


def short_legend(texts: Iterable[str], more: Sequence[str]) -> str:
    """``✓ ship · × of baseline · more: --legend``: what the marks among ``texts`` mean."""
    shown = "".join(texts)
    parts = [f"{mark} {meaning}" for mark, meaning in _SHORT.items() if mark in shown]
    return " · ".join([*parts, *([f"more: {', '.join(more)}"] if more else [])])


def mark_sentences(texts: Iterable[str]) -> Iterable[str]:
    """A sentence for each mark among ``texts``."""
    shown = "".join(texts)
    yield from (sentence for mark, sentence in _IN_FULL.items() if mark in shown)


def full_legend(rows: Sequence[ResultRow], texts: Sequence[str], *, is_one_protocol: bool) -> Iterable[str]:
    """The sentences about measured ``rows``, whose table has ``texts``."""
    if any(PICK_MARK in text for text in texts):
        yield f"{PICK_MARK} marks what `qbatch compare` recommends of each model."
    if any(row.baseline_job_id is not None for row in rows):
        yield (
            "× is a figure divided by that of the baseline, the same model unquantized: ×0.5 is half the size, half "
            "the time or half the speed. Perplexity, where lower is better, is shown with its change in percent."
        )
    if any(row.graph_decode_tokens_per_s is not None for row in rows):
        yield (
            "Graph decode is the rate of the same kernels under a CUDA graph, without the host: a program that uses "
            "graphs can come near it, `generate` does not."
        )
    if any(row.kl_mean is not None for row in rows):
        yield (
            "KL is the mean Kullback-Leibler divergence of the model's predictions from its baseline's, in nats. top-1 "
            "is how often the most likely token is the same."
        )
    if any(row.details.quality.rank_correlation is not None for row in rows):
        yield "Rank corr is the rank correlation between its similarities of texts and the baseline's."
    yield from mark_sentences(texts)
    if is_one_protocol:
        yield from _shapes(rows)
    timed = [row for row in rows if MeasuredPart.SPEED not in row.not_measured]
    devices = sorted({printable(str(row.device_name)) for row in timed})
    if devices:
        yield f"Speed and memory were measured on {' and '.join(devices)}; other devices give other figures."


def _shapes(rows: Sequence[ResultRow]) -> Iterable[str]:
    """Yield the shapes that were run under one protocol, which depend on a model's maximum length and task."""
    shapes: dict[str, list[str]] = {}
    for row in rows:
        shapes.setdefault(show_protocol(row), []).append(row.job_id)
    for shape, jobs in shapes.items():
        if shape != NOTHING_RUN:
            yield f"{'All' if len(shapes) == 1 else first_names(jobs)} were measured with {shape}."
