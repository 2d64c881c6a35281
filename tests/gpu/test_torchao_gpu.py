"""torchao's methods on a GPU: their files are torchao's own bit for bit, and they are measured as every other row."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.sources import read_header
from qbatch.worker.checkpoints.published import problems
from qbatch.worker.measuring.speed.size import measure_size
from qbatch.worker.models.load import load
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from tests.acceptance.conftest import Qbatch
from tests.tiny import make_tokenizer
from tests.torchao_reference import contents, reference

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(500)]

DEVICE = "cuda:0"
METHODS = (Method.TORCHAO_INT8_DYNAMIC, Method.TORCHAO_INT8, Method.TORCHAO_INT4)
SCHEMES = [
    *(Scheme(method=method, compute_dtype=DType.BFLOAT16) for method in METHODS),
    Scheme.of(Method.TORCHAO_INT4, compute_dtype=DType.BFLOAT16, group_size=32),
    Scheme.of(Method.TORCHAO_INT4, compute_dtype=DType.BFLOAT16, max_shard_bytes=8_000_000, skip_modules=("v_proj",)),
]
NAMES = [f"{number} {scheme.method}" for number, scheme in enumerate(SCHEMES)]
# Of int4's rows some fill neither 8 nor 1024, and those of down_proj (1056 wide) no groups of 128.
SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 1056,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 5000,
}


def make(folder: Path, **config: Any) -> Path:
    """Random weights, made on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | config))
    model.to(torch.bfloat16).save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source") / "llama", tie_word_embeddings=request.param)


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0}).eval()
    ids = torch.arange(5, 69).view(2, 32).cuda()
    with torch.inference_mode():
        return model(input_ids=ids).logits.float().cpu()


def written(source: Path, folder: Path, scheme: Scheme) -> Written:
    folder.mkdir(parents=True)
    targets = [Target(scheme=scheme, folder=folder)]
    nobody = lambda *_: None  # noqa: E731
    (outcome,) = write_checkpoints(source, targets, dtype=DType.BFLOAT16, device=DEVICE, on_progress=nobody)
    assert isinstance(outcome, Written), outcome
    return outcome


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_files_and_predictions_are_torchaos_own(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    ours = written(source, tmp_path / "ours", scheme)
    skips = None if not scheme.skip_modules else resolved(ours.target.folder)
    theirs = reference(source, tmp_path / "theirs", scheme, DType.BFLOAT16, skips, DEVICE)
    mine, expected = contents(ours.target.folder), contents(theirs)
    assert mine.keys() == expected.keys()
    for name in sorted(mine):
        if skips is not None and name == "config.json":
            for config in (mine[name], expected[name]):
                config["quantization_config"]["modules_to_not_convert"].sort()
        assert mine[name] == expected[name], name
    assert torch.equal(logits(ours.target.folder), logits(theirs))


def resolved(folder: Path) -> list[str]:
    """The skip list that was published."""
    listed: list[str] = json.loads((folder / "config.json").read_text())["quantization_config"][
        "modules_to_not_convert"
    ]
    return listed


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_what_was_loaded_is_counted_by_what_it_holds(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    scheme = replace(scheme, max_shard_bytes=None)
    outcome = written(source, tmp_path / "ours", scheme)
    folder, audit = outcome.target.folder, outcome.audit
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = load(folder, dtype=DType.BFLOAT16, device=DEVICE).model
    size = measure_size(model)
    stored = sum(tensor.nbytes for tensor in read_header(folder / "model.safetensors").tensors)
    assert size.weights_bytes == stored == audit["weights_bytes"]
    assert size.quantized_parameters == audit["quantized_parameters"]
    assert size.num_parameters == audit["num_parameters"]
    taken = torch.cuda.memory_allocated() - before
    assert size.weights_bytes <= taken < size.weights_bytes * 1.2 + 2**26
    least, most = (0.02, 0.15) if scheme.bits(DType.BFLOAT16) == 4 else (0.001, 0.02)
    assert least < audit["relative_error_mean"] < most
    assert audit["not_finite"] == []
    reasons = {entry["reason"] for entry in audit["kept"]}
    is_left = scheme.options.get("group_size") == 128
    assert ("its width is not a multiple of the group size 128" in reasons) == is_left
    print(f"{scheme.method} {dict(scheme.own)}: error {audit['relative_error_mean']:.4f}, {reasons}")  # noqa: T201


def test_the_three_methods_end_to_end(qbatch: Qbatch, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "llama")
    models = [make(tmp_path / "llama", intermediate_size=4096, num_hidden_layers=8, max_position_embeddings=2048)]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(map(str, models)) + "\n")
    names = ",".join(METHODS)
    run = ("run", "--models", str(listed), "--bits", "4,8", "--scheme", names, "--device", "cuda", "--format", "json")
    rows = json.loads(qbatch(*run, timeout_s=400).stdout)
    print(qbatch("results").stdout)  # noqa: T201
    assert [row["state"] for row in rows] == ["succeeded"] * 6, [row["error_message"] for row in rows]
    assert [row["scheme"] for row in rows][:1] == ["none"]
    base, by_name = rows[0], {row["scheme"]: row for row in rows}
    for method in METHODS:
        row = by_name[method]
        folder = qbatch.home / "storage" / row["checkpoint_path"]
        assert problems(folder) == []
        assert row["details"]["versions"]["torchao"] is not None
        assert row["weights_bytes"] < base["weights_bytes"]
        assert row["max_allocated_bytes"] >= row["weights_bytes"]
        assert row["decode_tokens_per_s"] > 0
        assert 0 < row["kl_mean"] < 1
        scheme = Scheme(method=method, compute_dtype=DType.BFLOAT16)
        theirs = reference(models[0], tmp_path / method, scheme, DType.BFLOAT16, None, DEVICE)
        assert torch.equal(logits(folder), logits(theirs)), method
    assert by_name["torchao-int4"]["weights_bytes"] < by_name["torchao-int8"]["weights_bytes"]
