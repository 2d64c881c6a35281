"""What people and programs see of results is, byte for byte, what it was before results had types.

``python -m tests.unit.test_golden_views`` writes the golden files anew: only where a change of what is shown is meant.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qbatch.views.comparison import Preference
from tests.unit import test_compare, test_show, test_speed_explanation, test_views
from tests.unit.measured_rows import PROTOCOL, explained, result, stats
from tests.unit.printed import comparison, rendered, results_table, show_jobs

FOLDER = Path(__file__).parent / "golden"
Row = dict[str, Any]
# One real run on a CPU: a causal and a masked language model, each as it is, at int8 and at NF4.
REAL: list[Row] = json.loads((FOLDER / "rows.json").read_text(encoding="utf-8"))


def without(mapping: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in names}


def as_0_1_0(row: Row) -> Row:
    """What 0.1.0's first workers wrote: a folder's own fingerprint, and no figure that came later."""
    details = row["details"]
    audit = {"audit": without(details["audit"], "idle_skip_modules", "shared_pass")} if "audit" in details else {}
    quality = details["quality"] and without(details["quality"], "base_device_name", "window_nll", "window_tokens")
    older = {
        "fingerprint": "folder:" + "7" * 64,
        "audits": without(details["audits"], "spread_between_rounds"),
        "shapes": without(details["shapes"], "eval_window", "eval_stride", "eval_max_windows"),
        "quality": quality,
    }
    return row | {"details": without(details, "rounds", "tasks_reason", "flags", "device_uuid") | older | audit}


def as_newer(value: Any, depth: int = 0) -> Any:
    """What newer code may write: keys that this one does not know, at every level."""
    if isinstance(value, list):
        return [as_newer(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    return {"a_new_figure": depth} | {name: as_newer(item, depth + 1) for name, item in value.items()}


def newer(row: Row) -> Row:
    known = ("size", "perplexity", "quality", "memory", "why", "audit")
    details = {name: as_newer(item) if name in known else item for name, item in row["details"].items()}
    return row | {"details": {"a_new_part": {"x": [1]}, **details}}


def bare(row: Row) -> Row:
    """What was measured where nothing beside the columns was."""
    return row | {"details": {}}


def tasked(row: Row, accuracy: float) -> Row:
    task = {"acc": accuracy, "acc_stderr": 0.02, "acc_norm": None, "acc_norm_stderr": None, "n_samples": 500}
    tasks = {"arc_easy": task | {"samples_hash": "s", "higher_is_better": {"acc": True}}, "own": {"f1,strict": 0.5}}
    return row | {"details": row["details"] | {"tasks": tasks}}


def a_failed_row() -> Row:
    unmeasured = dict.fromkeys(("disk_bytes", "num_parameters", "device_name", "details", "protocol", "protocol_hash"))
    return result(9, "bnb-fp4", state="failed", error_kind="cuda_oom", error_message="no room", **unmeasured)


def noted() -> list[Row]:
    flags = {"flags": {"throttled": True, "clocks_changed": False, "a_new_flag": True}}
    energy = {"why": {"energy": {"flags": {"foreign_processes": True}}}}
    quality = {"kl_mean_se": 1e-6, "ln_ppl_ratio": 0.008, "ln_ppl_ratio_se": 0.009, "floor": {"kl_mean": 2e-5}}
    audit = {"not_finite": ["a.weight"], "int8_infinite_scales": 2, "dropped_tensors": list("abcde")}
    rounds = {"count": 3, "interleaved_with": ["j7"], "phases": {"decode": {"p50": [1.0, 2.0], "spread": 0.4}}}
    sized = {"weights_bytes": 2**30, "memory_footprint_bytes": 2**30}
    quantized = test_views.QUANTIZED | sized
    return [
        test_views.BASELINE | sized | {"details": {"versions": {"torch": "2.12"}}},
        quantized | {"details": flags | energy | {"versions": {"torch": "2.13"}}, "quantized_fraction": 0.098},
        quantized | {"job_id": "j3", "kl_mean": 3e-5, "details": {"quality": quality, "rounds": rounds}},
        quantized | {"job_id": "j4", "details": {"audit": audit, "audits": {"spread_between_rounds": 0.3, "odd": [1]}}},
        quantized | {"job_id": "j5", "device_name": "NVIDIA A100", "reused_from": "j77"},
        quantized | {"job_id": "j6", "protocol_hash": "q", "details": {"shapes": {"prompt_tokens": 16}}},
        result(
            7,
            "bnb-int8",
            **sized,
            details={"quality": {"rank_correlation": 0.9997, "floor": {"rank_correlation": 0.99}}},
        ),
        result(
            8,
            "bnb-int8",
            **sized,
            forward_s_p50=0.006,
            forward_samples_per_s=160.0,
            model="org/encoder",
            revision="main",
        ),
        a_failed_row(),
    ]


def why_rows() -> list[Row]:
    steps = (("memory-bound", 0.7, 0.01), ("compute-bound", 0.1, 0.65), ("kernel-bound", 0.19, 0.012))
    made = [test_speed_explanation.with_step(name, copy_share=copy, matmul_share=mm) for name, copy, mm in steps]
    cpu = {"device_uuid": None, "why": None, "audits": {"cpu_layers_on_generic_kernel": 14}}
    unknown = {"verdict": None, "reason": "the weights fit in the GPU's cache", "energy": {"reason": "no counter"}}
    rows = [
        test_speed_explanation.BF16,
        test_speed_explanation.NF4,
        test_speed_explanation.INT8,
        *made,
        explained(5, "bnb-nf4", unknown, decode_tokens_per_s=30.0),
        explained(6, "bnb-nf4", None, decode_tokens_per_s=30.0),
        result(7, "bnb-nf4", decode_tokens_per_s=3.0, details=cpu),
    ]
    return [row | {"job_id": f"j{n}", "weights_bytes": (20 - n) * 2**30} for n, row in enumerate(rows, start=1)]


def compared() -> list[Row]:
    timed = {"stats": {"decode": stats(1.0, 0.05, count=4)}}
    rows = [tasked(row, 0.8 + n / 100) for n, row in enumerate(test_compare.ALL)]
    rows[1] = rows[1] | {"decode_tokens_per_s": 36.0, "details": rows[1]["details"] | timed}
    rows[2] = rows[2] | {"details": rows[2]["details"] | timed}
    other = test_compare.NF4 | {"job_id": "j6", "device_name": "A100"}
    return [*rows, other, test_compare.NF4 | {"job_id": "j8", "kl_mean": 0.02}, a_failed_row()]


def shown() -> list[Row]:
    int8 = test_show.NF4 | {"job_id": "j3", "scheme": "bnb-int8", "bits": 8}
    scales = {"int8_zero_scales": 2, "int8_infinite_scales": 1, "writer": "whole", "whole_model_because": "experts"}
    similar = {"pieces": 40, "cosine_mean": 0.99, "cosine_min": 0.9, "rank_correlation": 0.98, "against": "embedding"}
    quality = similar | {"floor": {"cosine_mean": 0.999, "rank_correlation": 0.9999}}
    running = {"state": "running", "stage": "quantizing", "progress": {"bytes_read": 2**30}, "details": None}
    return [
        test_show.NF4,
        int8 | {"details": test_show.DETAILS | {"audit": test_show.DETAILS["audit"] | scales, "quality": quality}},
        test_show.NF4 | {"job_id": "j4", "details": {}, "reused_from": "j2"},
        test_show.NF4
        | {"job_id": "j6", "model": "org/tune", "details": test_show.NF4["details"] | {"speed_from": "j2"}},
        test_show.NF4 | {"job_id": "j5", "protocol": None, "checkpoint_path": None, "checkpoint": None, **running},
    ]


def parts() -> list[Row]:
    """Models of which ``--measure`` asked for the size alone, for quality, and for speed."""
    size = {"protocol": PROTOCOL | {"quality": False, "speed": False}, "protocol_hash": "size", "load_model_s": None}
    quality = {"protocol": PROTOCOL | {"speed": False}, "protocol_hash": "quality", "perplexity": 9.0}
    speed = {"protocol": PROTOCOL | {"quality": False, "why": True}, "protocol_hash": "speed"}
    blind = {"not_measured": dict.fromkeys(("quality", "speed"), "SpeechT5 takes input_values as input, not text")}
    judged = {"quality": {"kl_mean": 0.01, "kl_mean_se": 0.001, "rows": 2000}}
    rates = ({"decode_tokens_per_s": 50.0}, {"decode_tokens_per_s": 30.0})
    rows = [
        *(result(n, scheme, **size) for n, scheme in ((1, "none"), (2, "bnb-nf4"))),
        *(result(n, scheme, **quality, model="org/b") for n, scheme in ((3, "none"), (4, "bnb-nf4"))),
        *(
            result(n, scheme, **speed, **rate, model="org/c")
            for n, scheme, rate in zip((5, 6), ("none", "bnb-nf4"), rates, strict=True)
        ),
        *(result(n, scheme, details=blind, model="org/d") for n, scheme in ((7, "none"), (8, "bnb-nf4"))),
    ]
    rows[3] |= {"kl_mean": 0.01, "details": judged}
    weights = {True: 16 * 2**30, False: 5 * 2**30}
    return [
        row | {"weights_bytes": weights[row["scheme"] == "none"], "baseline_job_id": _baseline_of(row)} for row in rows
    ]


def _baseline_of(row: Row) -> str | None:
    return None if row["scheme"] == "none" else f"j{int(row['job_id'][1:]) - 1}"


SETS = {
    "real": lambda: REAL,
    "of_0_1_0": lambda: [as_0_1_0(row) for row in REAL],
    "newer": lambda: [newer(row) for row in REAL],
    "bare": lambda: [bare(row) for row in REAL],
    "noted": noted,
    "why": why_rows,
    "compared": compared,
    "parts": parts,
    "shown": shown,
}
VARIANTS = ("of_0_1_0", "newer", "bare")
RECORDED = ("real", "of_0_1_0", "newer", "bare", "shown")
PREFERENCES = {
    "size": Preference(),
    "speed": Preference(prefer="speed"),
    "quality": Preference(prefer="quality", max_kl=0.01),
    "bounded": Preference(max_ppl_ratio=1.0001, max_weights_bytes=2**30),
}


def printed(name: str) -> dict[str, str]:
    """Title → what is printed of the rows of a set."""
    rows = SETS[name]()
    texts = {"results": results_table(rows)}
    texts |= {f"results {form}": rendered(rows, form) for form in ("json", "csv")}
    for title, preference in PREFERENCES.items():
        for form in ("table", "json", "csv"):
            texts[f"compare {title} {form}"] = comparison(rows, preference, by="figure", format=form)
    texts["compare by scheme"] = comparison(rows, Preference(), by="scheme", format="table")
    if name in RECORDED:
        by_id = {row["job_id"]: row for row in rows}
        baselines = [by_id.get(row["baseline_job_id"] or "") for row in rows]
        pairs = list(zip(rows, baselines, strict=True))
        texts["show"] = show_jobs(pairs)
        texts["show, the answer"] = show_jobs(pairs, in_full=False)
    return texts


def golden(name: str) -> str:
    """The first tables of a set as they are; what is long or much like them by its sha256."""
    parts = []
    for title, text in printed(name).items():
        is_legible = name not in VARIANTS and title in ("results", "compare size table", "show", "show, the answer")
        content = text if is_legible else hashlib.sha256(text.encode()).hexdigest()
        parts.append(f"=== {title}\n{content}\n")
    return "".join(parts)


@pytest.fixture
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_utc")
@pytest.mark.parametrize("name", SETS)
def test_what_is_printed_is_what_it_was(name: str) -> None:
    assert golden(name) == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    for each in SETS:
        (FOLDER / f"{each}.txt").write_text(golden(each), encoding="utf-8")
