"""Compared rows for programs: JSON, and CSV with a line for each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qbatch.views.comparison import Preference
from qbatch.views.figures import ALL_FIGURES, Row, dig
from qbatch.views.groups import Group, ModelRows
from qbatch.views.noise import is_noise
from qbatch.views.protocol import differences, version_differences
from qbatch.views.quantized_share import audit_warnings
from qbatch.views.recommend import Recommendation, recommend
from qbatch.views.scheme import show_scheme
from qbatch.views.why_words import why

_FLAT_QUALITY = ("kl_mean_se", "kl_p99", "ln_ppl_ratio", "ln_ppl_ratio_se", "top1_agreement_se", "rank_correlation")


def group_differences(model: ModelRows) -> list[str]:
    """What tells the groups of one model apart, in words."""
    first_rows = [group.rows[0] for group in model.groups]
    sources = {dig(row, "details.fingerprint") for row in first_rows}
    return differences(first_rows) + (["the model's content"] if len(sources) > 1 else [])


def model_as_mapping(model: ModelRows, preference: Preference) -> dict[str, Any]:
    return {
        "model": model.name,
        "groups_differ_in": group_differences(model) if len(model.groups) > 1 else [],
        "groups": [_group_as_mapping(group, preference) for group in model.groups],
        "without_result": [
            {key: row[key] for key in ("job_id", "scheme", "state", "error_kind", "error_message")}
            for row in model.unmeasured
        ],
    }


def _group_as_mapping(group: Group, preference: Preference) -> dict[str, Any]:
    first = group.rows[0]
    found = recommend(group, preference)
    return {
        "protocol_hash": first["protocol_hash"],
        "protocol": first["protocol"],
        "device_name": group.device_name,
        "fingerprint": dig(first, "details.fingerprint"),
        "rows": [_row_as_mapping(row, group) for row in group.rows],
        "superseded": dict(group.superseded),
        "versions_differ_in": version_differences(group.rows),
        "recommendation": _recommendation_as_mapping(found, preference),
    }


def _recommendation_as_mapping(found: Recommendation, preference: Preference) -> dict[str, Any]:
    return {
        "ship": None if found.ship is None else found.ship["job_id"],
        "sentence": found.sentence,
        "prefer": preference.prefer,
        "bounds": list(found.bounds),
        "rejected": {job_id: list(reasons) for job_id, reasons in found.rejected.items()},
        "not_distinguishable_from": list(found.alike),
    }


def _row_as_mapping(row: Row, group: Group) -> dict[str, Any]:
    baseline = group.baselines.get(row["job_id"])
    ratios, noise = {}, []
    for figure in ALL_FIGURES:
        key = figure.key(row)
        if key is None:
            continue
        other = dig(baseline, key) if baseline is not None and figure.ratio is not None else None
        if other:
            ratios[key] = dig(row, key) / other
        if is_noise(key, row, baseline):
            noise.append(key)
    return {
        **{key: value for key, value in row.items() if key not in ("details", "protocol", "protocol_hash")},
        "label": show_scheme(row),
        "compared_with": None if baseline is None else baseline["job_id"],
        "ratios": ratios,
        "not_distinguishable": noise,
        "quality": dig(row, "details.quality"),
        "tasks": dig(row, "details.tasks"),
        "warnings": list(audit_warnings(row)),
        "why": why(row, baseline),
    }


def flat_rows(model: ModelRows, preference: Preference) -> Iterable[Mapping[str, Any]]:
    for group in model.groups:
        ship = recommend(group, preference).ship
        for row in group.rows:
            full = _row_as_mapping(row, group)
            ratios = {f"{key.rpartition('.')[2]}_ratio": full["ratios"].get(key) for key in _ratio_keys()}
            quality = {name: dig(row, f"details.quality.{name}") for name in _FLAT_QUALITY}
            yield {
                "model": model.name,
                "device_name": group.device_name,
                "protocol_hash": row["protocol_hash"],
                "recommended": ship is not None and ship["job_id"] == row["job_id"],
                **{key: value for key, value in full.items() if not isinstance(value, dict)},
                **quality,
                "kl_floor": dig(row, "details.quality.floor.kl_mean"),
                **ratios,
            }


def _ratio_keys() -> list[str]:
    return [key for figure in ALL_FIGURES if figure.ratio is not None for key in figure.keys]
