"""submit → Redis → worker → safetensors → benchmark → database → results, through the installed program."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import re
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

from qbatch.core.digest import digest_file, root_sha256
from qbatch.models_db.listing import list_jobs
from qbatch.worker.checkpoints.published import problems
from tests import tiny
from tests.acceptance.conftest import QBATCH, Qbatch, stop
from tests.tiny import make_causal
from tests.waiting import until

CONTRACT = {
    "batch_id",
    "job_id",
    "model",
    "revision",
    "state",
    "error_kind",
    "error_message",
    "reused_from",
    "scheme",
    "bits",
    "double_quant",
    "compute_dtype",
    "dtype",
    "device_name",
    "checkpoint_path",
    "num_parameters",
    "quantized_fraction",
    "bits_per_param",
    "disk_bytes",
    "memory_footprint_bytes",
    "weights_bytes",
    "max_allocated_bytes",
    "load_model_s",
    "quantize_s",
    "prefill_s_p50",
    "decode_tokens_per_s",
    "graph_decode_tokens_per_s",
    "per_token_s_p50",
    "per_token_s_p99",
    "perplexity",
    "baseline_job_id",
}


def test_run_does_everything_and_leaves_nothing_running(
    qbatch: Qbatch, models: Path, model_list: Callable[..., str]
) -> None:
    listed = model_list(models / "llama", "", "# a comment", models / "bert-mlm")
    rows = json.loads(_run_without_silence(qbatch, "run", "--models", listed, "--bits", "4,8", "--format", "json"))
    assert [(Path(row["model"]).name, row["scheme"], row["bits"]) for row in rows] == [
        ("llama", "none", 16),
        ("llama", "bnb-int8", 8),
        ("llama", "bnb-nf4", 4),
        ("bert-mlm", "none", 16),
        ("bert-mlm", "bnb-int8", 8),
        ("bert-mlm", "bnb-nf4", 4),
    ]
    for row in rows:
        assert row["state"] == "succeeded", row["error_message"]
        assert row.keys() >= CONTRACT
    baseline, int8, nf4 = rows[:3]
    assert baseline["checkpoint_path"] is None
    assert baseline["quantize_s"] is None
    assert baseline["baseline_job_id"] is None
    assert {int8["baseline_job_id"], nf4["baseline_job_id"]} == {baseline["job_id"]}
    assert baseline["num_parameters"] == int8["num_parameters"] == nf4["num_parameters"]
    assert baseline["weights_bytes"] > int8["weights_bytes"] > nf4["weights_bytes"] > 0
    assert baseline["perplexity"] > 1
    assert nf4["decode_tokens_per_s"] > 0
    assert 0 <= int8["kl_mean"] < nf4["kl_mean"], "8 bits are nearer to the baseline than 4"
    assert int8["top1_agreement"] > nf4["top1_agreement"] > 0
    assert baseline["kl_mean"] is None
    assert nf4["max_allocated_bytes"] is None, "there is no device memory on a CPU, and none is not 0"
    assert rows[3]["prefill_s_p50"] is None, "an encoder has no prefill"
    assert rows[3]["forward_s_p50"] > 0
    _check_checkpoint(Path(nf4["checkpoint_path"]), models / "llama")
    _check_card(Path(nf4["checkpoint_path"]), rows)
    _check_verify(qbatch, Path(nf4["checkpoint_path"]))
    # The second time, the database answers; the quantized checkpoints are the same ones.
    again = json.loads(qbatch("run", "--models", listed, "--bits", "4,8", "--format", "json").stdout)
    assert [row["reused_from"] for row in again] == [row["job_id"] for row in rows]
    assert [row["perplexity"] for row in again] == [row["perplexity"] for row in rows]


def _run_without_silence(qbatch: Qbatch, *args: str) -> str:
    """Run a command, of which nobody must hear nothing for ten seconds; its standard output."""
    said_at = [time.monotonic()]
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(
            [*QBATCH, *args], env=qbatch.environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE
        ) as process,
    ):
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line.decode())
            said_at.append(time.monotonic())
        assert process.wait() == 0, "".join(said)
        output.seek(0)
        assert said[0].startswith("starting Redis")
        assert max(after - before for before, after in itertools.pairwise(said_at)) < 10, "".join(said)
        return output.read()


def _check_checkpoint(folder: Path, source: Path) -> None:
    """Whole, described, readable by others, and loadable by plain transformers."""
    assert problems(folder) == []
    manifest = json.loads((folder / "qbatch.json").read_text())
    assert manifest["scheme"]["method"] == "bnb-nf4"
    assert [path.name for path in (folder.parents[2] / "logs").iterdir()] == [manifest["database"]], "its id"
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {
        entry["name"] for entry in manifest["files"]
    }
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in folder.iterdir() if path.is_file())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def main():", return_tensors="pt")
    reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.inference_mode():
        got, expected = model(**inputs).logits.float(), reference(**inputs).logits.float()
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.95
    damaged = folder / "config.json"
    text = damaged.read_text()
    damaged.write_text(text + " ")
    assert problems(folder) == [
        f"config.json has changed since it was published (now {len(text) + 1} bytes, then {len(text)})"
    ]
    damaged.write_text(text)


def _check_card(folder: Path, rows: list[dict[str, Any]]) -> None:
    """It says what was measured, with the baseline beside it, and how to load it, which works as it stands."""
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert {"qbatch", "bnb-nf4", "4-bit", "bitsandbytes"} <= set(card.data.tags)
    assert card.data.base_model is None, "a folder is not a model of the hub"
    sizes = [f"{row['weights_bytes'] / 2**20:.1f} MiB" for row in (rows[2], rows[0])]
    (line,) = (line for line in card.text.splitlines() if line.startswith("| weights |"))
    assert line.startswith(f"| weights | {sizes[0]} | {sizes[1]} | ×0.")
    assert f"{rows[2]['top1_agreement'] * 100:.1f} %" in card.text
    assert stat.S_IMODE((folder / "README.md").stat().st_mode) == 0o644
    load, *_ = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    loaded: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(load, loaded)  # noqa: S102
    assert loaded["model"].config.quantization_config.load_in_4bit
    assert loaded["tokenizer"]("def main():")["input_ids"]


def _check_verify(qbatch: Qbatch, folder: Path) -> None:
    """Four sound checkpoints; then one flipped bit, and a config that knows of one layer less than the files."""
    assert [row["state"] for row in qbatch.json("verify")] == ["sound"] * 4
    assert len(qbatch.json("verify", "b1")) == 4
    judged = json.loads(qbatch("verify", "--for", "vllm,gguf", "b1", "--json", code=1).stdout)
    published = json.loads((folder / "qbatch.json").read_text())["audit"]
    said = {row["loader"]: row["verdict"] for row in judged if row["checkpoint"] == str(folder)}
    assert said == {name: published["loaders"][name]["verdict"] for name in ("vllm", "gguf")}
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "model.safetensors has changed since it was published" in qbatch("verify", str(folder), code=1).stderr
    weights.write_bytes(whole)
    config, manifest = folder / "config.json", folder / "qbatch.json"
    texts = config.read_text(), manifest.read_text()
    config.write_text(json.dumps(json.loads(texts[0]) | {"num_hidden_layers": 1}))
    _sign(folder)
    assert "model.layers.1.mlp.up_proj" in qbatch("verify", str(folder), code=1).stderr
    config.write_text(texts[0])
    manifest.write_text(texts[1])
    assert [row["state"] for row in qbatch.json("verify", str(folder))] == ["sound"]


def _sign(folder: Path) -> None:
    """Write the manifest anew over what is there now."""
    path = folder / "qbatch.json"
    manifest = json.loads(path.read_text())
    digests = [digest_file(folder / entry["name"]) for entry in manifest["files"]]
    manifest["files"] = [dataclasses.asdict(digest) for digest in digests]
    manifest["root_sha256"] = root_sha256(digests)
    path.write_text(json.dumps(manifest))


def test_a_batch_goes_through_a_running_stack(stack: Qbatch, models: Path, model_list: Callable[..., str]) -> None:
    listed = model_list(models / "bloom")
    options = ("--quant-type", "nf4,fp4", "--double-quant", "--name", "all of four bits")
    batch = stack("submit", "--models", listed, "--bits", "4,16", *options, "-q").stdout.strip()
    assert batch.startswith("b")
    watched = stack("watch", batch)
    assert f"{batch}: 3 of 3 jobs succeeded, after " in watched.stdout
    rows = stack.json("results", "--batch", batch)
    assert [row["scheme"] for row in rows] == ["none", "bnb-nf4", "bnb-fp4"]
    assert [row["double_quant"] for row in rows] == [False, True, True]
    assert {row["dtype"] for row in rows} == {"bfloat16"}, "what an fp32 source leaves unquantized is bfloat16"
    log = stack("logs", rows[2]["job_id"]).stdout
    assert "quantizing" in log
    assert "benchmarking" in log
    assert not re.search(rf"INFO ({rows[0]['job_id']}|{rows[1]['job_id']}): ", log), "what is about others alone"
    config = json.loads(Path(rows[1]["checkpoint_path"], "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    by_size = stack.json("results", "--batch", batch, "--sort", "-disk_bytes", "--limit", "1", "--bits", "4,16")
    assert [row["bits"] for row in by_size] == [16]
    table = list(csv.DictReader(io.StringIO(stack("results", "--batch", batch, "--format", "csv").stdout)))
    assert [row["scheme"] for row in table] == ["none", "bnb-nf4", "bnb-fp4"]
    assert table[0]["checkpoint_path"] == ""
    shown = stack("results", "--batch", batch).stdout
    assert "bnb-fp4" in shown
    assert "bloom" in shown
    (status,) = stack.json("status", batch)
    assert (status["name"], status["jobs"], status["succeeded"]) == ("all of four bits", 3, 3)
    assert [job["state"] for job in stack.json("jobs", "--batch", batch, "--state", "succeeded")] == ["succeeded"] * 3
    (worker,) = stack.json("workers")
    assert (worker["device_kind"], worker["state"]) == ("cpu", "ready")


# It is cancelled: on a busy machine a command takes as long to start as a short batch to end.
ENDLESS = ("--new-tokens", "5000")


def test_ctrl_c_of_run_beside_a_running_stack_leaves_the_batch_to_it(
    stack: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path
) -> None:
    log = tmp_path / "run.log"
    process = stack.start("run", "--models", model_list(models / "bloom"), "--bits", "4", "--force", *ENDLESS, log=log)
    until(lambda: " jobs\n" in log.read_text(), "the batch")
    assert stop(process, signal.SIGINT) == 130
    said = log.read_text()
    batch = said.partition(":")[0]
    assert re.search(rf"no longer watching; {batch} goes on \(.*(running|queued)\): `qbatch watch {batch}` shows", said)
    assert "stopped" not in said
    log = tmp_path / "watch.log"
    watch = stack.start("watch", batch, log=log)
    until(lambda: "benchmarking" in log.read_text(), "the running job")
    assert stop(watch, signal.SIGINT) == 130
    assert f"no longer watching; {batch} goes on (" in log.read_text()
    assert {job["state"] for job in stack.json("jobs", "--batch", batch)} <= {"queued", "running", "succeeded"}
    # A row is written about once a second.
    until(lambda: any("step" in (job["progress"] or {}) for job in stack.look(list_jobs)), "what is measured")
    stack("cancel", batch)


def test_a_second_batch_adopts_the_checkpoint_and_force_measures_again(
    stack: Qbatch, model_list: Callable[..., str], tmp_path: Path
) -> None:
    # One that no other test knows, not even by another name.
    listed = model_list(tiny.make_causal(tmp_path / "own", dtype="bfloat16", seed=7))
    first = stack.json("submit", "--models", listed, "--bits", "8", "--wait")
    answered = stack.json("submit", "--models", listed, "--bits", "8", "--wait")
    assert [row["reused_from"] for row in answered] == [row["job_id"] for row in first]
    forced = stack.json("submit", "--models", listed, "--bits", "8", "--no-baseline", "--force", "--wait")
    assert [row["reused_from"] for row in forced] == [None]
    assert forced[0]["checkpoint_path"] == first[1]["checkpoint_path"]
    assert forced[0]["baseline_job_id"] is None
    # A file that is cut short is seen without reading it; a flipped bit is not, and takes `verify` and --force.
    folder = Path(first[1]["checkpoint_path"])
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged, options in ((whole[:-1], ()), (whole[:-1] + bytes([whole[-1] ^ 1]), ("--force",))):
        weights.write_bytes(damaged)
        assert "model.safetensors has changed since it was published" in stack("verify", str(folder), code=1).stderr
        (row,) = stack.json("submit", "--models", listed, "--bits", "8", "--no-baseline", *options, "--wait")
        assert (row["state"], row["reused_from"], row["checkpoint_path"]) == ("succeeded", None, str(folder))
        assert weights.read_bytes() == whole


def test_what_a_scheme_was_asked_for_is_in_the_checkpoint(
    stack: Qbatch, models: Path, model_list: Callable[..., str]
) -> None:
    options = ("--skip-modules", "q_proj", "--int8-threshold", "0", "--quant-storage", "bfloat16")
    rows = stack.json(
        *("submit", "--models", model_list(models / "llama"), "--bits", "4,8", "--no-baseline", "--wait"),
        *(*options, "--max-shard-size", "100KB"),
    )
    assert [row["state"] for row in rows] == ["succeeded"] * 2
    for row in rows:
        folder = Path(row["checkpoint_path"])
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert "model.layers.0.self_attn.q_proj" in config["llm_int8_skip_modules"]
        assert config["bnb_4bit_quant_storage"] == ("bfloat16" if row["bits"] == 4 else "uint8")
        assert config["llm_int8_threshold"] == (6.0 if row["bits"] == 4 else 0.0)
        shards = sorted(folder.glob("model-*.safetensors"))
        assert len(shards) > 2
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {shard.name for shard in shards}
        names = [entry["name"] for entry in row["details"]["audit"]["kept"] if entry["reason"] == "skipped on request"]
        assert names == ["model.layers.*.self_attn.q_proj.weight"]
    for job in stack.json("jobs", "--batch", rows[0]["batch_id"]):
        progress = job["progress"]
        assert progress["bytes_read"] > 0 < progress["bytes_written"]
        assert progress["bytes_read"] + progress["bytes_written"] == progress["bytes_total"]


def test_a_checkpoint_that_could_not_be_measured_succeeds(
    stack: Qbatch, model_list: Callable[..., str], tmp_path: Path
) -> None:
    source = make_causal(tmp_path / "without-words", vocab_size=128)
    listed = model_list(source)
    rows = stack.json("submit", "--models", listed, "--bits", "4,8", "--no-baseline", "--wait")
    assert [row["state"] for row in rows] == ["succeeded"] * 2
    for row in rows:
        assert row["checkpoint_path"] is not None
        assert row["weights_bytes"] > 0
        assert "the model embeds only 128" in row["not_measured"]["speed"]
    batch = rows[0]["batch_id"]
    found = stack.json("verify", batch)
    assert [row["state"] for row in found] == ["sound"] * 2
    weights = next(stack.home.glob("storage/checkpoints/without-words/*nf4*/model.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for target in ([batch], []):
        assert "model.safetensors has changed since it was published" in stack("verify", *target, code=1).stderr


def test_another_evaluation_text_is_another_protocol(
    stack: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("It was a quiet evening, and nobody had come. " * 40)
    listed = model_list(models / "llama")
    options = ("--models", listed, "--bits", "16", "--wait")
    (default,) = stack.json("submit", *options)
    (own,) = stack.json("submit", *options, "--eval-text", str(text))
    assert own["reused_from"] is None
    assert own["protocol_hash"] != default["protocol_hash"]
    assert own["perplexity"] != default["perplexity"]
    text.unlink()
    (again,) = stack.json("submit", *options, "--baseline", "--force", "--eval-text", str(_copy(tmp_path)))
    assert again["perplexity"] == pytest.approx(own["perplexity"], rel=1e-6)


def _copy(folder: Path) -> Path:
    copy = folder / "the same words.txt"
    copy.write_text("It was a quiet evening, and nobody had come. " * 40)
    return copy


def test_the_baseline_may_be_run_at_32_bits(stack: Qbatch, models: Path, model_list: Callable[..., str]) -> None:
    listed = model_list(models / "bloom")
    (row,) = stack.json("submit", "--models", listed, "--bits", "16", "--dtype", "float32", "--wait")
    assert (row["bits"], row["dtype"]) == (32, "float32")
    inspected = stack.json("inspect", str(models / "bloom"))[0]
    assert row["memory_footprint_bytes"] == pytest.approx(inspected["memory_bytes"], rel=0.01)
    assert row["num_parameters"] == inspected["num_parameters"]
