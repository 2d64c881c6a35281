"""A batch through Redis, pinned workers and a database, on as many GPUs as there are."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qbatch.worker.checkpoints.published import problems
from qbatch.worker.machine.gpu import installed_gpus
from tests.acceptance.conftest import Qbatch
from tests.waiting import until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]

_SHAPES: dict[str, Any] = {
    "llama": transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
        architectures=["LlamaForCausalLM"],
    ),
    "bloom": transformers.BloomConfig(
        hidden_size=1024, n_layer=12, n_head=16, vocab_size=50000, architectures=["BloomForCausalLM"]
    ),
    "bert": transformers.BertConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=16,
        vocab_size=30000,
        architectures=["BertForMaskedLM"],
    ),
}


def make(name: str, folder: Path, seed: int = 0) -> Path:
    """Random weights of a real architecture, made on the GPU in a second or two."""
    config = _SHAPES[name]
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = getattr(transformers, config.architectures[0])(config)
    model.to(torch.float32 if name == "bloom" else torch.bfloat16).save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return folder


def logits(folder: Path, dtype: str, quantization: transformers.BitsAndBytesConfig | None = None) -> torch.Tensor:
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model = cls.from_pretrained(
        folder, dtype=getattr(torch, dtype), device_map={"": 0}, quantization_config=quantization
    ).eval()
    torch.manual_seed(7)
    ids = torch.randint(5, config.vocab_size, (2, 128)).cuda()
    with torch.inference_mode():
        return model(input_ids=ids).logits.float().cpu()


def on_load(row: dict[str, Any]) -> transformers.BitsAndBytesConfig:
    """What a user would have transformers do while loading, without qbatch."""
    if row["bits"] == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, row["compute_dtype"]),
    )


def test_three_models_at_two_widths(qbatch: Qbatch, tmp_path: Path) -> None:
    models = [make(name, tmp_path / name) for name in _SHAPES]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(map(str, models)) + "\n")
    done = qbatch(
        "run", "--models", str(listed), "--bits", "4,8", "--device", "cuda", "--format", "json", timeout_s=400
    )
    for log in sorted((qbatch.home / "storage" / "logs").glob("*/*")):
        lines = log.read_text().splitlines()
        print("\n".join(line for line in lines if "perplexity" not in line and "qbatch.runner" in line))  # noqa: T201
    rows = json.loads(done.stdout)
    assert [row["state"] for row in rows] == ["succeeded"] * 9, [row["error_message"] for row in rows]
    uuids = {gpu.uuid for gpu in installed_gpus()}
    for row in rows:
        assert row["details"]["device_uuid"] in uuids
        assert row["max_allocated_bytes"] >= row["weights_bytes"] > 0
    for model, first in zip(models, range(0, 9, 3), strict=True):
        base, int8, nf4 = rows[first : first + 3]
        assert base["weights_bytes"] > int8["weights_bytes"] > nf4["weights_bytes"]
        expected = logits(model, base["dtype"])
        errors = []
        for row in (int8, nf4):
            folder = qbatch.home / "storage" / row["checkpoint_path"]
            assert problems(folder) == []
            got = logits(folder, row["dtype"])
            assert torch.equal(got, logits(model, row["dtype"], on_load(row))), f"{model.name} {row['scheme']}"
            errors.append(float((got - expected).norm() / expected.norm()))
        print(f"{model.name}: relative logit error int8 {errors[0]:.4f} nf4 {errors[1]:.4f}")  # noqa: T201
        assert 0 < errors[0] < errors[1] < 1, "8 bits are nearer to the base than 4"
    print(qbatch("results").stdout)  # noqa: T201


def test_every_gpu_is_used_and_each_worker_sees_one(qbatch: Qbatch, tmp_path: Path) -> None:
    gpus = installed_gpus()
    if len(gpus) < 2:
        pytest.skip("needs two GPUs")
    models = [make("llama", tmp_path / f"llama-{n}", seed=n) for n in range(4)]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(map(str, models)) + "\n")
    up = qbatch.start("up", "--gpus", "all")
    try:
        until(lambda: len(_ready(qbatch)) == len(gpus), f"{len(gpus)} workers")
        rows = qbatch.json("submit", "--models", str(listed), "--bits", "4,8", "--no-why", "--wait")
    finally:
        up.terminate()
        assert up.wait(60) == 0
    assert [row["state"] for row in rows] == ["succeeded"] * 12
    # A worker that saw more than one GPU would have failed its jobs; together they used every one.
    used = {row["details"]["device_uuid"] for row in rows}
    print("used:", used)  # noqa: T201
    assert used == {gpu.uuid for gpu in gpus}


def _ready(qbatch: Qbatch) -> list[Any]:
    if not (qbatch.home / "qbatch.db").exists():
        return []
    return [worker for worker in qbatch.json("workers") if worker["state"] == "ready"]
