"""The quality of a model's predictions, by themselves and compared with its base's. Losses and divergences are in nats;
``_se`` is a standard error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from qbatch.core.stored_json import Stored, as_json, omitted_if_unknown, omitted_unless, when_known

_ERROR = "_stderr"
ITS_OUTPUTS_NOT_FINITE = "its outputs are NaN or infinite"
BASE_OUTPUTS_NOT_FINITE = "the outputs of its baseline are NaN or infinite"
BASE_OUTPUTS_MISSING = "the outputs of its baseline are not stored"
BASE_OUTPUTS_LOST = "the outputs of its baseline could not be stored"
"""Why a model is not compared with its base; see ``Quality.reason``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPerplexity(Stored):
    """The data of a perplexity: the summed negative log-likelihood and the number of scored tokens, per window.
    ``reason`` says why a causal language model has none."""

    mean_nll: float | None = None
    perplexity_se: float | None = None
    tokens: int | None = None
    windows: int | None = None
    window_nll: tuple[float, ...] | None = None
    window_tokens: tuple[int, ...] | None = None
    reason: str | None = omitted_if_unknown()


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityFloor(Stored):
    """How much 16-bit arithmetic alone changes the base's predictions. Differences not above this are rounding."""

    windows: int | None = omitted_if_unknown()
    rows: int | None = omitted_if_unknown()
    kl_mean: float | None = omitted_if_unknown()
    kl_median: float | None = omitted_if_unknown()
    kl_p90: float | None = omitted_if_unknown()
    kl_p95: float | None = omitted_if_unknown()
    kl_p99: float | None = omitted_if_unknown()
    kl_max: float | None = omitted_if_unknown()
    top1_agreement: float | None = omitted_if_unknown()
    ln_ppl_ratio: float | None = omitted_if_unknown()
    rms_delta_p: float | None = omitted_if_unknown()
    pieces: int | None = omitted_if_unknown()
    reason: str | None = omitted_if_unknown()
    cosine_mean: float | None = omitted_if_unknown()
    cosine_min: float | None = omitted_if_unknown()
    rank_correlation: float | None = omitted_if_unknown()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidenceBucket(Stored):
    """The mean KL over the ``rows`` at which the base gave its most probable token a probability of at least ``above``
    and, unless that is 1, less than ``below``. None without such rows."""

    above: float
    below: float
    rows: int
    kl_mean: float | None = None
    kl_mean_se: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality(Stored):
    """A model compared with its base: predictions token by token (``windows``, ``rows``), or an encoder's embeddings
    for each piece of text (``pieces``). ``window_kl``: the sum over the rows of each window, ``window_rows`` their
    number. ``reason`` says why there is no comparison."""

    windows: int | None = omitted_if_unknown()
    rows: int | None = omitted_if_unknown()
    kl_mean: float | None = omitted_if_unknown()
    kl_mean_se: float | None = omitted_unless("kl_mean")
    kl_median: float | None = omitted_if_unknown()
    kl_median_se: float | None = omitted_unless("kl_median")
    kl_p90: float | None = omitted_if_unknown()
    kl_p90_se: float | None = omitted_unless("kl_p90")
    kl_p95: float | None = omitted_if_unknown()
    kl_p95_se: float | None = omitted_unless("kl_p95")
    kl_p99: float | None = omitted_if_unknown()
    kl_p99_se: float | None = omitted_unless("kl_p99")
    kl_max: float | None = omitted_if_unknown()
    window_kl: tuple[float, ...] | None = omitted_if_unknown()
    window_rows: tuple[int, ...] | None = omitted_if_unknown()
    kl_by_confidence: tuple[ConfidenceBucket, ...] | None = omitted_if_unknown()
    top1_agreement: float | None = omitted_if_unknown()
    top1_agreement_se: float | None = omitted_unless("top1_agreement")
    window_nll: tuple[float, ...] | None = omitted_if_unknown()
    window_tokens: tuple[int, ...] | None = omitted_if_unknown()
    base_perplexity: float | None = omitted_if_unknown()
    base_perplexity_se: float | None = omitted_unless("base_perplexity")
    perplexity: float | None = omitted_if_unknown()
    perplexity_se: float | None = omitted_unless("perplexity")
    ln_ppl_ratio: float | None = omitted_if_unknown()
    ln_ppl_ratio_se: float | None = omitted_unless("ln_ppl_ratio")
    rms_delta_p: float | None = omitted_if_unknown()
    rms_delta_p_se: float | None = omitted_unless("rms_delta_p")
    pieces: int | None = omitted_if_unknown()
    reason: str | None = omitted_if_unknown()
    cosine_mean: float | None = omitted_if_unknown()
    cosine_min: float | None = omitted_if_unknown()
    rank_correlation: float | None = omitted_if_unknown()
    against: str | None = omitted_if_unknown()
    base_device_name: str | None = omitted_if_unknown()
    floor: QualityFloor = field(default_factory=QualityFloor, metadata=when_known("against"))


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherText(Stored):
    """The figures of a text besides the first: the model compared with its base, and its perplexity."""

    quality: Quality = field(default_factory=Quality)
    perplexity: TextPerplexity = field(default_factory=TextPerplexity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score in a task, and its standard error if the harness has one."""

    value: float | None
    error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores(Stored):
    """The results of lm-evaluation-harness for a task or group. The scores are stored in the same JSON object as these
    fields, under the harness's names."""

    n_samples: int | None = None
    num_fewshot: int | None = None
    version: str | None = None
    higher_is_better: Mapping[str, Any] | None = None
    config_hash: str | None = None
    samples_hash: str | None = None

    @classmethod
    def of(
        cls,
        scores: Mapping[str, Score],
        *,
        n_samples: int | None,
        num_fewshot: int | None,
        version: str | None,
        higher_is_better: Mapping[str, Any] | None,
        config_hash: str | None,
        samples_hash: str | None,
    ) -> Self:
        known = cls(
            n_samples=n_samples,
            num_fewshot=num_fewshot,
            version=version,
            higher_is_better=higher_is_better,
            config_hash=config_hash,
            samples_hash=samples_hash,
        )
        written: dict[str, Any] = {}
        for name, score in scores.items():
            written |= {name: as_json(score.value), f"{name}{_ERROR}": as_json(score.error)}
        return cls.from_json(written | known.to_json())

    @property
    def scores(self) -> dict[str, Score]:
        """The scores by metric: all entries for which a standard error is stored too, even if it is null."""
        return {
            name: Score(value=_number(value), error=_number(self.stored[f"{name}{_ERROR}"]))
            for name, value in self.unknown().items()
            if f"{name}{_ERROR}" in self.stored
        }


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
