"""A search and adapters through the queue on a GPU: the bound is kept, the model is nearer, plain PEFT loads them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.acceptance.conftest import Qbatch
from tests.trained import make_trained

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]

_DEVICE = "cuda"
_TEXT = "The interpreter calls the method of the class, and returns what the generator yields next."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained(tmp_path_factory.mktemp("models"))


def _rows(qbatch: Qbatch, *asked: str) -> list[dict[str, Any]]:
    done = qbatch("run", *asked, "--bits", "4", "--device", _DEVICE, "--format", "json", timeout_s=400)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert [row["state"] for row in rows] == ["succeeded"] * len(rows), [row["error_message"] for row in rows]
    return rows


def test_a_search_on_a_gpu_publishes_what_keeps_to_its_bound(qbatch: Qbatch, model: Path) -> None:
    rows = _rows(qbatch, str(model), "--scheme", "auto", "--max-weights-bytes", "2MB", "--measure", "quality")
    baseline, quantized, search, mixture = rows
    assert search["reused_from"] == mixture["job_id"]
    assert quantized["weights_bytes"] < mixture["weights_bytes"] <= 2_000_000 < baseline["weights_bytes"]
    assert mixture["kl_mean"] < quantized["kl_mean"]
    (shown,) = qbatch.json("show", search["job_id"])
    found = shown["search"]
    assert all(group["derivative"]["mean"] for group in found["sensitivity"]["groups"])
    chosen = found["frontier"]["points"][mixture["mixture"]["point"]]
    assert chosen["weights_bytes"] == mixture["weights_bytes"]


# PEFT asks transformers by the older of two names.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_made_on_a_gpu_bring_the_model_nearer_to_its_base(qbatch: Qbatch, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text(inspect.getsource(inspect))
    asked = ("--recover", "svd,svd-act,qlora", "--recover-text", str(text), "--recover-steps", "20")
    _, plain, *adapted = _rows(qbatch, str(model), *asked, "--measure", "size,quality")
    by_kind = {row["options"]["recovery"]["kind"]: row for row in adapted}
    assert set(by_kind) == {"svd", "svd-act", "qlora"}
    exact = _logits(_loaded(str(model)), model)
    coarse = _loaded(plain["checkpoint_path"])
    before = _distance(exact, _logits(coarse, model))
    for kind in ("svd-act", "qlora"):
        row = by_kind[kind]
        assert row["kl_mean"] < plain["kl_mean"], kind
        nearer = peft.PeftModel.from_pretrained(_loaded(plain["checkpoint_path"]), row["checkpoint_path"])
        assert _distance(exact, _logits(nearer, model)) < before, kind


def _loaded(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": _DEVICE}).eval()


def _logits(model: Any, tokenizer_of: Path) -> torch.Tensor:
    ids = transformers.AutoTokenizer.from_pretrained(tokenizer_of)(_TEXT, return_tensors="pt").input_ids
    with torch.inference_mode():
        return model(input_ids=ids.to(_DEVICE)).logits.float().cpu()


def _distance(exact: torch.Tensor, other: torch.Tensor) -> float:
    ours, theirs = other.log_softmax(-1), exact.log_softmax(-1)
    return float(torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))
