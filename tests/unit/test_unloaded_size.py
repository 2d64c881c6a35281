"""What is counted without loading a model is what the loaded one has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.errors import SourceCorrupt
from qbatch.worker.measuring.speed.size import measure_size
from qbatch.worker.measuring.unloaded_size import count_unloaded
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from tests import tiny
from tests.unit.benchmark_models import loaded_on_cpu

BF16 = DType.BFLOAT16
STREAMED = [
    Scheme(method=Method.NF4, compute_dtype=BF16),
    Scheme.of(Method.NF4, compute_dtype=BF16, double_quant=True),
    Scheme(method=Method.INT8, compute_dtype=BF16),
]
SCHEMES = [
    *STREAMED,
    Scheme(method=Method.TORCHAO_INT8, compute_dtype=BF16),
    Scheme(method=Method.TORCHAO_INT8_DYNAMIC, compute_dtype=BF16),
]
MAKERS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny.make_causal,
    "llama with a tied head": lambda folder: tiny.make_causal(folder, tie_word_embeddings=True),
    "shards": lambda folder: tiny.make_causal(folder, "mistral", max_shard_size="300KB"),
    "experts": lambda folder: tiny.make_causal(folder, "mixtral"),
    "gpt2": lambda folder: tiny.make_causal(folder, "gpt2"),
    "bloom": lambda folder: tiny.make_causal(folder, "bloom"),
    "t5": tiny.make_seq2seq,
    "bert": lambda folder: tiny.make_encoder(folder, "classification"),
    "fused weights": tiny.make_fused_qkv,
    "speech": tiny.make_speech,
}


def written(source: Path, folder: Path, scheme: Scheme) -> Path:
    folder.mkdir()
    (outcome,) = write_checkpoints(
        source, [Target(scheme=scheme, folder=folder)], dtype=BF16, device="cpu", on_progress=lambda *_: None
    )
    assert isinstance(outcome, Written), outcome
    return folder


@pytest.mark.parametrize("name", MAKERS)
def test_counts_are_those_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    source = MAKERS[name](tmp_path / "source")
    for number, scheme in enumerate([None, *(SCHEMES if name in ("llama", "experts") else STREAMED)]):
        folder = source if scheme is None else written(source, tmp_path / str(number), scheme)
        loaded, counted = loaded_on_cpu(folder), count_unloaded(folder, BF16)
        assert counted.size == measure_size(loaded.model), scheme
        assert counted.kind == loaded.kind


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_stored_head_counts_once_if_it_is_tied(is_equal: bool, tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path / "source", tie_word_embeddings=True, dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head if is_equal else torch.neg(head)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for folder in (source, written(source, tmp_path / "nf4", SCHEMES[0])):
        assert count_unloaded(folder, BF16).size == measure_size(loaded_on_cpu(folder).model)


def test_a_source_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceCorrupt, match=r"the source lacks model\.norm\.weight"):
        count_unloaded(source, BF16)
