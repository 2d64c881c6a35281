"""show, compare and doctor on a batch of tiny models, through the installed program."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance.conftest import Qbatch


@pytest.mark.timeout(900)
def test_what_was_measured_is_shown_compared_and_the_installation_examined(
    qbatch: Qbatch, models: Path, model_list: Callable[..., str]
) -> None:
    assert {check["state"] for check in qbatch.json("doctor")} == {"ok", "note"}
    assert not qbatch.home.exists(), "doctor only looks"
    listed = model_list(models / "llama", models / "bert-mlm")
    qbatch("run", "--models", listed, "--bits", "4,8", "-q", timeout_s=500.0)
    _check_show(qbatch)
    _check_compare(qbatch)
    _check_doctor(qbatch)


def _check_show(qbatch: Qbatch) -> None:
    (row,) = qbatch.json("show", "j3")
    assert (row["scheme"], row["state"], row["attempt"]) == ("bnb-nf4", "succeeded", 1)
    assert [attempt["outcome"] for attempt in row["attempts"]] == ["succeeded"]
    assert Path(row["checkpoint_path"], "qbatch.json").is_file()
    assert row["checkpoint"]["written_by"] == "j3"
    assert row["details"]["audit"]["relative_error_mean"] > 0
    text = qbatch("show", "--all", "j3", "j1").stdout
    assert text.startswith("j3 bnb-nf4 of ")
    assert "\nj1 baseline bfloat16 of " in text
    said = " ".join(text.split())
    for fact in (
        f"checkpoint key {row['checkpoint_key']}",
        f"hash {row['protocol_hash']}",
        f"prompt {row['protocol']['prompt_tokens']}",
        "per_token",
        "% of its parameters",
        "worst layers",
        "(16-bit rounding alone: ",
        "What limits the rate of decoding is measured on GPUs only",
    ):
        assert fact in said
    assert "no such job: j99" in qbatch("show", "j99", code=2).stderr
    assert [row["job_id"] for row in qbatch.json("show", "latest")] == ["j1", "j2", "j3", "j4", "j5", "j6"]


def _check_compare(qbatch: Qbatch) -> None:
    llama, bert = qbatch.json("compare", "--batch", "b1")
    (group,) = llama["groups"]
    schemes = {row["job_id"]: row["scheme"] for row in group["rows"]}
    assert list(schemes.values()) == ["none", "bnb-int8", "bnb-nf4"]
    by_size = {row["weights_bytes"]: row["job_id"] for row in group["rows"]}
    losses = {row["job_id"]: row["kl_mean"] for row in group["rows"]}
    within = [job_id for job_id in losses if (losses[job_id] or 0) <= 0.05]
    assert group["recommendation"]["ship"] == min(within, key={v: k for k, v in by_size.items()}.__getitem__)
    assert len(bert["groups"]) == 1
    strict = ("compare", "--model", "llama", "--max-kl", "0", "--max-weights-bytes", "1KB")
    assert qbatch.json(*strict)[0]["groups"][0]["recommendation"]["ship"] is None
    assert "Nothing qualifies. baseline bfloat16 (j1): its weights, " in " ".join(qbatch(*strict).stdout.split())
    nearest = qbatch.json("compare", "--model", "llama", "--prefer", "quality")[0]["groups"][0]
    assert schemes[nearest["recommendation"]["ship"]] == "bnb-int8", "8 bits are nearer to the baseline than 4"
    table = qbatch("compare", "--model", "llama", "--by", "scheme").stdout
    assert "Ship " in table
    assert "of text " in table
    lines = list(csv.DictReader(io.StringIO(qbatch("compare", "--format", "csv").stdout)))
    assert len(lines) == 6
    assert [line["job_id"] for line in lines if json.loads(line["recommended"])].count("j1") <= 1
    assert "no such batch" in qbatch("compare", "--batch", "b9", code=2).stderr


def _check_doctor(qbatch: Qbatch) -> None:
    """Well after a run; not once jobs wait that nobody runs."""
    assert qbatch("doctor").stdout.splitlines()[0].split() == ["check", "state", "finding"]
    qbatch("submit", "--models", "-", "--bits", "4", "--force", stdin=f"{qbatch.json('show', 'j1')[0]['location']}\n")
    faults = {check["check"] for check in qbatch.json("doctor", code=1) if check["state"] == "wrong"}
    assert faults == {"scheduler", "workers"}
