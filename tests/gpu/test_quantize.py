"""On a GPU too, the streamed files are byte for byte the reference's, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qbatch.core.domain import DType, Method, Scheme
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from tests.plain_reference import contents, save_reference
from tests.tiny import CAUSAL_ARCHS, SEQ2SEQ_ARCHS, make_causal, make_encoder, make_seq2seq

pytestmark = pytest.mark.gpu

SCHEMES = (
    Scheme(method=Method.NF4),
    Scheme.of(Method.NF4, double_quant=True),
    Scheme(method=Method.FP4),
    Scheme.of(Method.FP4, double_quant=True),
    Scheme(method=Method.INT8),
)
WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16}


def assert_identical(source: Path, folder: Path, dtype: DType, schemes: Sequence[Scheme] = SCHEMES) -> None:
    targets = []
    for number, scheme in enumerate(schemes):
        (folder / f"streamed-{number}").mkdir()
        targets.append(Target(scheme=scheme.resolved(dtype), folder=folder / f"streamed-{number}"))
    results = list(write_checkpoints(source, targets, dtype=dtype, device="cuda:0", on_progress=lambda *_: None))
    for number, result in enumerate(results):
        assert isinstance(result, Written), result
        reference = folder / f"reference-{number}"
        save_reference(source, reference, result.target.scheme, dtype, device="cuda:0")
        assert contents(result.target.folder) == contents(reference), result.target.scheme


@pytest.mark.parametrize("arch", CAUSAL_ARCHS)
@pytest.mark.parametrize(("stored", "asked"), [("bfloat16", DType.BFLOAT16), ("float32", DType.FLOAT16)])
def test_every_scheme(arch: str, stored: str, asked: DType, tmp_path: Path) -> None:
    assert_identical(make_causal(tmp_path / "source", arch, dtype=stored), tmp_path, asked)


@pytest.mark.parametrize("arch", SEQ2SEQ_ARCHS)
def test_an_encoder_decoder(arch: str, tmp_path: Path) -> None:
    assert_identical(make_seq2seq(tmp_path / "source", arch, dtype="float32"), tmp_path, DType.FLOAT16)


@pytest.mark.parametrize("head", [None, "masked-lm", "classification"])
def test_an_encoder(head: str | None, tmp_path: Path) -> None:
    assert_identical(make_encoder(tmp_path / "source", head, dtype="bfloat16"), tmp_path, DType.BFLOAT16)


@pytest.mark.parametrize("tied", [True, False])
def test_many_shards_from_many_shards(tied: bool, tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", max_shard_size="100KB", tie_word_embeddings=tied)
    schemes = [replace(scheme, max_shard_bytes=100_000) for scheme in SCHEMES]
    assert_identical(source, tmp_path, DType.BFLOAT16, schemes)
    assert len(list((tmp_path / "streamed-0").glob("*.safetensors"))) > 2


def test_weights_of_several_pieces(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", **(WIDE | {"intermediate_size": 16384}))
    assert_identical(source, tmp_path, DType.BFLOAT16)


def test_device_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 8):
        source = make_causal(tmp_path / f"source-{layers}", dtype="bfloat16", **(WIDE | {"num_hidden_layers": layers}))
        folder = tmp_path / f"out-{layers}"
        folder.mkdir()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        target = Target(scheme=SCHEMES[0].resolved(DType.BFLOAT16), folder=folder)
        (result,) = write_checkpoints(
            source, [target], dtype=DType.BFLOAT16, device="cuda:0", on_progress=lambda *_: None
        )
        assert isinstance(result, Written), result
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0] * 1.1
