"""A batch with an adapter through the installed program: a worker that loads PEFT, a second batch that is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from qbatch.core.recovery import Recovery, RecoveryKind
from tests.acceptance.conftest import Qbatch


@pytest.mark.timeout(900)
def test_an_adapter_is_measured_answered_verified_and_removed(qbatch: Qbatch, models: Path) -> None:
    asked = ("--bits", "4", "--recover", "svd", "--recover-rank", "2", "--measure", "size,quality")
    for _ in range(2):
        qbatch("run", str(models / "llama"), *asked, "-q", timeout_s=400.0)
    first, second = qbatch.json("results", "b1"), qbatch.json("results", "b2")
    assert [row["state"] for row in (*first, *second)] == ["succeeded"] * 6
    assert [row["reused_from"] for row in second] == ["j1", "j2", "j3"]
    plain, adapted = first[1:]
    assert adapted["options"]["recovery"] == Recovery(kind=RecoveryKind.SVD, rank=2).to_json()
    assert adapted["weights_bytes"] > plain["weights_bytes"]
    assert adapted["checkpoint_path"].startswith(f"{plain['checkpoint_path']}+svd-r2-")
    assert "bnb-nf4+svd-r2" in qbatch("jobs", "b1").stdout
    assert [row["state"] for row in qbatch.json("verify", "b2")] == ["sound", "sound"]
    assert "PeftModel.from_pretrained(model" in (Path(adapted["checkpoint_path"]) / "README.md").read_text()
    qbatch("rm", "b2", "b1", "--yes")
    assert not any(Path(row["checkpoint_path"]).exists() for row in (plain, adapted))
