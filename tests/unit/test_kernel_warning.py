"""Layers that were measured with another CPU kernel than bitsandbytes would choose are named once for each row."""

from __future__ import annotations

from typing import Any

import pytest

from qbatch.core.measured.result_row import ResultRow
from qbatch.models_db.measured_checkpoints import MeasuredCheckpoint
from qbatch.views.audit_text import audit_warnings
from qbatch.views.comparison import Preference
from qbatch.views.model_card import card_text
from tests.unit.measured_rows import result
from tests.unit.printed import comparison, read, results_table, show_jobs
from tests.unit.test_report import text_of
from tests.unit.test_show import RECORD

FAILS = "plain transformers fails at 3 of its 4-bit layers"
DECODER = {"decode_tokens_per_s": 30.0}
ENCODER = {"forward_samples_per_s": 310.0, "forward_s_p50": 0.0032}
TASKS = pytest.mark.parametrize("speed", [DECODER, ENCODER], ids=["decoder", "encoder"])


def rows(speed: dict[str, float], layers: int | None = 3, **fields: Any) -> list[dict[str, Any]]:
    details = {"device_uuid": None, "audits": {"cpu_layers_on_generic_kernel": layers}}
    measured = {"device_name": "AMD EPYC (2 cores)", **speed, **fields}
    base = result(1, weights_bytes=2**30, details={"device_uuid": None}, **measured)
    return [base, result(2, "bnb-nf4", kl_mean=0.2, weights_bytes=2**29, details=details, **measured)]


def count(text: str) -> int:
    return " ".join(text.split()).count(FAILS)


@TASKS
@pytest.mark.parametrize("max_kl", [0.05, 1.0], ids=["rejected", "shipped"])
def test_compare_says_it_once_for_each_row(speed: dict[str, float], max_kl: float) -> None:
    preference = Preference(max_kl=max_kl)
    assert count(comparison(rows(speed), preference, by="scheme", format="table")) == 1


@TASKS
@pytest.mark.parametrize("max_kl", [0.05, 1.0], ids=["rejected", "shipped"])
def test_compare_of_several_models_says_it_of_each(speed: dict[str, float], max_kl: float) -> None:
    """What they share is one footnote, or one line for each row that is not shipped."""
    other = [row | {"job_id": job, "model": "org/b"} for job, row in zip(("j3", "j4"), rows(speed), strict=True)]
    other[1] |= {"baseline_job_id": "j3"}
    shown = comparison([*rows(speed), *other], Preference(max_kl=max_kl), by="scheme", format="table")
    assert count(shown) == (1 if max_kl == 1.0 else 2)


@TASKS
@pytest.mark.parametrize("has_legend", [False, True])
def test_a_table_of_results_has_a_footnote(speed: dict[str, float], has_legend: bool) -> None:
    assert count(results_table(rows(speed), has_legend=has_legend)) == 1


@TASKS
@pytest.mark.parametrize("in_full", [False, True])
def test_show_says_it_once(speed: dict[str, float], in_full: bool) -> None:
    base, row = (RECORD | row for row in rows(speed))
    assert count(show_jobs([(row, base)], in_full=in_full)) == 1


@TASKS
def test_a_report_says_it_where_the_checkpoint_is_audited(speed: dict[str, float]) -> None:
    assert count(text_of(rows(speed), max_kl=0.05)) == 1


@TASKS
def test_the_model_card_says_it_to_whoever_loads_it(speed: dict[str, float]) -> None:
    row = read(rows(speed))[1]
    checkpoint = MeasuredCheckpoint(
        path="checkpoints/m/a", root_sha256="5" * 64, is_folder=False, row=row, baseline=None
    )
    assert count(card_text(checkpoint, licence=None, runs_code=False, has_tokenizer=True)) == 1


@pytest.mark.parametrize("layers", [0, None])
def test_where_every_layer_takes_the_kernel_nothing_fails(layers: int | None) -> None:
    assert not any("fails" in text for row in read(rows(ENCODER, layers)) for text in audit_warnings(row))


def test_a_method_without_such_a_kernel_has_no_warning() -> None:
    row = rows(ENCODER)[1] | {"scheme": "bnb-int8", "bits": 8}
    assert not list(audit_warnings(ResultRow.from_json(row)))
