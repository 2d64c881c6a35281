"""Loading sources and checkpoints, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qbatch.core.domain import DType
from qbatch.core.errors import (
    BenchmarkError,
    CudaOom,
    DeviceError,
    HostOom,
    SourceCorrupt,
    SourceNotFound,
    UnsafeSource,
    Unsupported,
)
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import translated
from tests import tiny
from tests.unit.benchmark_models import INT8, NF4, loaded_on_cpu, quantized

WEIGHTS = "model.safetensors"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.make_causal(tmp_path / "llama")


@pytest.mark.parametrize(
    ("arch", "kind"), [("llama", ModelKind.CAUSAL_LM), ("bloom", ModelKind.CAUSAL_LM), ("gpt2", ModelKind.CAUSAL_LM)]
)
def test_a_source_loads_in_the_dtype_asked_for(tmp_path: Path, arch: str, kind: ModelKind) -> None:
    loaded = loaded_on_cpu(tiny.make_causal(tmp_path, arch), DType.BFLOAT16)
    assert loaded.kind is kind
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert not loaded.model.training
    assert loaded.load_model_s > 0


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (None, ModelKind.ENCODER),
        ("masked-lm", ModelKind.MASKED_LM),
        ("classification", ModelKind.SEQUENCE_CLASSIFICATION),
    ],
)
def test_an_encoder_loads_by_its_architecture(tmp_path: Path, head: str | None, kind: ModelKind) -> None:
    assert loaded_on_cpu(tiny.make_encoder(tmp_path, head)).kind is kind


def test_a_sequence_to_sequence_model_is_one(tmp_path: Path) -> None:
    assert loaded_on_cpu(tiny.make_seq2seq(tmp_path, "bart")).kind is ModelKind.SEQ2SEQ


def test_a_published_checkpoint_loads_with_its_quantized_layers(llama: Path, tmp_path: Path) -> None:
    loaded = loaded_on_cpu(quantized(llama, tmp_path / "nf4", NF4))
    kinds = {type(module).__name__ for module in loaded.model.modules()}
    assert "Linear4bit" in kinds


def test_a_folder_without_tokenizer_files_has_no_tokenizer(llama: Path) -> None:
    for path in llama.glob("tokenizer*"):
        path.unlink()
    assert loaded_on_cpu(llama).tokenizer is None


def test_a_missing_tensor_is_refused_not_filled_with_random_numbers(llama: Path) -> None:
    tensors = load_file(llama / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llama / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(SourceCorrupt, match=r"lacks 1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        loaded_on_cpu(llama)


def test_a_missing_tensor_of_a_published_checkpoint_is_a_benchmark_error(llama: Path, tmp_path: Path) -> None:
    folder = quantized(llama, tmp_path / "nf4", NF4)
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BenchmarkError, match=r"model\.norm\.weight"):
        loaded_on_cpu(folder)


def test_a_tensor_of_the_wrong_shape_is_refused(llama: Path) -> None:
    tensors = load_file(llama / WEIGHTS)
    tensors["model.norm.weight"] = torch.ones(64)
    save_file(tensors, llama / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(SourceCorrupt):
        loaded_on_cpu(llama)


def test_a_truncated_file_is_one_clear_line(llama: Path) -> None:
    whole = (llama / WEIGHTS).read_bytes()
    (llama / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceCorrupt, match=r"model\.safetensors: .* truncated") as caught:
        loaded_on_cpu(llama)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(llama: Path) -> None:
    torch.save(load_file(llama / WEIGHTS), llama / "pytorch_model.bin")
    (llama / WEIGHTS).unlink()
    with pytest.raises(UnsafeSource, match="pickles"):
        loaded_on_cpu(llama)


def test_a_folder_without_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=r"config\.json"):
        loaded_on_cpu(tmp_path)


def test_a_config_that_is_not_json_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceCorrupt, match="JSON"):
        loaded_on_cpu(tmp_path)


@pytest.mark.parametrize("name", ["NoSuchModel", "pipeline", "AutoTokenizer"])
def test_an_architecture_that_is_no_model_class_is_unsupported(llama: Path, name: str) -> None:
    path = llama / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [name]}))
    with pytest.raises(Unsupported, match=name):
        loaded_on_cpu(llama)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), CudaOom),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), CudaOom),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), HostOom),
        (MemoryError(), HostOom),
        (ValueError("anything\nelse"), BenchmarkError),
    ],
)
def test_a_librarys_error_becomes_the_job_error_that_decides_a_retry(error: Exception, kind: type) -> None:
    with pytest.raises(kind, match="measuring: ") as caught, translated(BenchmarkError, "measuring"):
        raise error
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_nothing_is_printed_or_logged(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = quantized(llama, tmp_path / "int8", INT8)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        loaded = loaded_on_cpu(folder)
        loaded.model(torch.zeros(1, 8, dtype=torch.long))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_weights_that_a_class_reads_beside_the_others_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaConfig, "extra_files", ("head.safetensors",))
    assert loaded_on_cpu(llama).kind is ModelKind.CAUSAL_LM
    (llama / "head.safetensors").write_bytes(b"")
    with pytest.raises(Unsupported, match=r"head\.safetensors holds weights beside those of the model"):
        loaded_on_cpu(llama)


def test_an_adapter_that_was_applied_all_the_same_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_hf_peft_config_loaded", True)
    with pytest.raises(Unsupported, match="applied the adapter"):
        loaded_on_cpu(llama)
