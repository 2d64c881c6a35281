"""``--scheme auto`` through the installed program: searched once, published within the bound, and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from tests.acceptance.conftest import Qbatch


def test_what_a_search_found_is_published_within_each_bound(stack: Qbatch, models: Path) -> None:
    llama = str(models / "llama")
    plain = ("--measure", "quality", "--json")
    auto = ("submit", llama, "--scheme", "auto", "--wait", *plain)
    baseline, search, mixture = json.loads(stack(*auto, "--max-weights-bytes", "600KB").stdout)
    assert [row["state"] for row in (baseline, search, mixture)] == ["succeeded"] * 3, search["error_message"]
    assert search["mixture"] == {"bound": {"max_weights_bytes": 600_000}}
    assert mixture["mixture"]["job_id"] == search["job_id"]
    assert search["reused_from"] == mixture["job_id"]
    assert search["checkpoint_path"] == mixture["checkpoint_path"]
    assert (search["bits"], search["scheme"], search["options"]) == (4, "bnb-nf4", mixture["options"])
    assert search["weights_bytes"] <= 600_000 < baseline["weights_bytes"]
    (whole,) = json.loads(stack("show", search["job_id"], "--json").stdout)
    points = whole["search"]["frontier"]["points"]
    chosen = points[mixture["mixture"]["point"]]
    assert chosen["weights_bytes"] == mixture["weights_bytes"], "a point's bytes are those of its checkpoint"
    fitting = [number for number, point in enumerate(points) if point["weights_bytes"] <= 600_000]
    best = min(fitting, key=lambda number: points[number]["kl"]["mean"])
    assert mixture["mixture"]["point"] == points[best].get("same_as", best), "the smallest that cannot be told from it"
    assert points[-1]["weights_bytes"] < baseline["weights_bytes"], "of a mixture something is quantized"
    assert _unquantized(mixture["checkpoint_path"]) == set(chosen["modules"])
    # Another bound is answered by what is stored: nobody searches again.
    bound = 1.3 * (points[2]["kl"]["mean"] + 2 * points[2]["kl"]["standard_error"])
    _, again, *published = json.loads(stack(*auto, "--max-kl", f"{bound:.4g}").stdout)
    assert again["state"] == "succeeded", again["error_message"]
    (answer,) = [row for row in published if row["job_id"] == again["reused_from"]]
    quality = answer["details"]["quality"]
    assert quality["kl_mean"] + 2 * quality["kl_mean_se"] <= bound
    (other,) = json.loads(stack("show", again["job_id"], "--json").stdout)
    assert other["search"] == whole["search"]
    _check_words(stack, again, answer)


def _unquantized(folder: str) -> set[str]:
    """The linear layers of a checkpoint at 16 bits, without the head, which is never quantized."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    names = {name for name, module in model.named_modules() if type(module).__name__ == "Linear"}
    return names - {"lm_head"}


def _check_words(stack: Qbatch, search: dict[str, Any], answer: dict[str, Any]) -> None:
    batch = search["batch_id"]
    shown = stack("show", search["job_id"]).stdout
    assert "mixtures, as measured on the search's own text" in shown
    assert answer["job_id"] in shown
    assert "model.layers.1 " in shown
    listed = stack("jobs", batch).stdout
    assert "bnb-nf4 auto" in listed
    assert f"bnb-nf4 mixture {answer['mixture']['point']} of {search['job_id']}" in listed
    (row,) = json.loads(stack("results", batch, "--scheme", "auto", "--json").stdout)
    assert row["job_id"] == search["job_id"]
    stack("verify", batch)
