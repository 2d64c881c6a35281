"""Compared rows for programs: mappings for JSON, and flat mappings for the lines of a CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qbatch.core.measured.metric import BaselineComparison
from qbatch.core.measured.metrics import COMPARE_COLUMNS, COMPARE_CSV, COMPARED_METRICS
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.stored_json import Stored
from qbatch.views.answer_comparisons import baseline_pairs, compare_answers
from qbatch.views.audit_text import audit_warnings
from qbatch.views.comparison import Preference
from qbatch.views.groups import Group, ModelRows
from qbatch.views.noise import is_noise
from qbatch.views.protocol import differences, version_differences
from qbatch.views.ratios import ratio_of
from qbatch.views.recommend import Recommendation, recommend
from qbatch.views.scheme import show_scheme
from qbatch.views.speed_explanation import explain_speed


def group_differences(model: ModelRows) -> list[str]:
    """How the groups of one model differ, such as ``prompt_tokens (64, 256)``."""
    first_rows = [group.rows[0] for group in model.groups]
    sources = {row.details.fingerprint for row in first_rows}
    return differences(first_rows) + (["the model's content"] if len(sources) > 1 else [])


def model_as_mapping(model: ModelRows, preference: Preference) -> dict[str, Any]:
    return {
        "model": model.name,
        "groups_differ_in": group_differences(model) if len(model.groups) > 1 else [],
        "groups": [_group_as_mapping(group, preference) for group in model.groups],
        "without_result": [
            {
                "job_id": row.job_id,
                "scheme": row.scheme,
                "state": row.state,
                "error_kind": row.error_kind,
                "error_message": row.error_message,
            }
            for row in model.unmeasured
        ],
    }


def _group_as_mapping(group: Group, preference: Preference) -> dict[str, Any]:
    first = group.rows[0]
    recommendation = recommend(group, preference)
    return {
        "protocol_hash": first.protocol_hash,
        "protocol": _stored(first.protocol),
        "device_name": group.device_name,
        "fingerprint": first.details.fingerprint,
        "rows": [_row_as_mapping(row, group) for row in group.rows],
        "superseded": dict(group.superseded),
        "versions_differ_in": version_differences(group.rows),
        "answers_compared": [each.as_mapping() for each in compare_answers(baseline_pairs(group))],
        "recommendation": _recommendation_as_mapping(recommendation),
    }


def _recommendation_as_mapping(recommendation: Recommendation) -> dict[str, Any]:
    return {
        "ship": None if recommendation.ship is None else recommendation.ship.job_id,
        "sentence": recommendation.sentence,
        "prefer": recommendation.prefer,
        "bounds": list(recommendation.bounds),
        "rejected": {job_id: list(reasons) for job_id, reasons in recommendation.rejected.items()},
        "not_distinguishable_from": list(recommendation.alike),
    }


def _row_as_mapping(row: ResultRow, group: Group) -> dict[str, Any]:
    baseline = group.baselines.get(row.job_id)
    shown = [metric for column in COMPARE_COLUMNS if (metric := column.metric_of(row)) is not None]
    ratios = {metric.key: ratio_of(metric, row, baseline) for metric in shown}
    details = row.details.to_json()
    return {
        **{key: value for key, value in row.to_json().items() if key not in ("details", "protocol", "protocol_hash")},
        "label": show_scheme(row),
        "compared_with": None if baseline is None else baseline.job_id,
        "ratios": {key: ratio for key, ratio in ratios.items() if ratio is not None},
        "not_distinguishable": [metric.key for metric in shown if is_noise(metric, row, baseline)],
        "quality": details.get("quality"),
        "more_texts": details.get("more_texts"),
        "tasks": details.get("tasks"),
        "warnings": list(audit_warnings(row)),
        "why": explain_speed(row, baseline),
    }


def _stored(part: Stored) -> dict[str, Any] | None:
    return part.to_json() if part.is_known else None


def flat_rows(model: ModelRows, preference: Preference) -> Iterable[Mapping[str, Any]]:
    compared = [metric for metric in COMPARED_METRICS if metric.comparison is not BaselineComparison.NOTHING]
    for group in model.groups:
        ship = recommend(group, preference).ship
        for row in group.rows:
            full = _row_as_mapping(row, group)
            yield {
                "model": model.name,
                "device_name": group.device_name,
                "protocol_hash": row.protocol_hash,
                "recommended": ship is not None and ship.job_id == row.job_id,
                **{key: value for key, value in full.items() if not isinstance(value, dict)},
                **{metric.csv_name: metric.value(row) for metric in COMPARE_CSV},
                **{f"{metric.csv_name}_ratio": full["ratios"].get(metric.key) for metric in compared},
            }
