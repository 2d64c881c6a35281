"""The streamed files are, byte for byte, what from_pretrained + save_pretrained write on the same device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import KyutaiSpeechToTextForConditionalGeneration

from qbatch.core.domain import DType, Method, Scheme
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from qbatch.worker.quantizing.planning.skeleton import skip_list_of_source
from tests.plain_reference import contents, save_reference
from tests.schemes import with_options
from tests.shrunk import make, shrunk_config
from tests.tiny import (
    CAUSAL_ARCHS,
    OVERWRITTEN_ARCHS,
    PAD,
    SEQ2SEQ_ARCHS,
    make_causal,
    make_encoder,
    make_overwritten,
    make_seq2seq,
    make_speech,
)

NF4 = Scheme(method=Method.NF4)
NF4_DOUBLE = Scheme.of(Method.NF4, double_quant=True)
FP4 = Scheme(method=Method.FP4)
FP4_DOUBLE = Scheme.of(Method.FP4, double_quant=True)
INT8 = Scheme(method=Method.INT8)
ALL = (NF4, NF4_DOUBLE, FP4, FP4_DOUBLE, INT8)
SHARD_BYTES = 100_000

Make = Callable[..., Path]
MAKERS: dict[str, Callable[[Path, str], Path]] = {
    **{arch: lambda folder, dtype, arch=arch: make_causal(folder, arch, dtype=dtype) for arch in CAUSAL_ARCHS},
    **{arch: lambda folder, dtype, arch=arch: make_seq2seq(folder, arch, dtype=dtype) for arch in SEQ2SEQ_ARCHS},
    "bert": lambda folder, dtype: make_encoder(folder, dtype=dtype),
    "bert-masked-lm": lambda folder, dtype: make_encoder(folder, "masked-lm", dtype=dtype),
    "bert-classification": lambda folder, dtype: make_encoder(folder, "classification", dtype=dtype),
    "speecht5": lambda folder, dtype: make_speech(folder, dtype=dtype),
}


def assert_identical(
    source: Path,
    folder: Path,
    dtype: DType,
    schemes: Sequence[Scheme] = ALL,
    skips: list[str] | None = None,
    writer: str = "stream",
) -> None:
    """Write all ``schemes``, streamed in one pass unless another ``writer`` is expected, and compare each with its
    reference."""
    targets = []
    for number, scheme in enumerate(schemes):
        (folder / f"streamed-{number}").mkdir(parents=True)
        targets.append(Target(scheme=scheme.resolved(dtype), folder=folder / f"streamed-{number}"))
    results = list(write_checkpoints(source, targets, dtype=dtype, device="cpu", on_progress=lambda *_: None))
    assert [result.target for result in results] == targets
    for number, result in enumerate(results):
        assert isinstance(result, Written), result
        assert result.writer == writer
        scheme = result.target.scheme
        reference = save_reference(source, folder / f"reference-{number}", scheme, dtype, skips=skips)
        assert contents(result.target.folder) == contents(reference), scheme


def test_a_class_that_saves_in_a_way_of_its_own(tmp_path: Path) -> None:
    """It writes its codec's fields into its generation config."""
    model = make(KyutaiSpeechToTextForConditionalGeneration, shrunk_config("kyutai_speech_to_text"))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    assert_identical(tmp_path / "source", tmp_path, DType.BFLOAT16, [NF4], writer="whole")


@pytest.mark.parametrize("arch", MAKERS)
def test_every_architecture_and_scheme(arch: str, tmp_path: Path) -> None:
    source = MAKERS[arch](tmp_path / "source", "bfloat16")
    assert_identical(source, tmp_path, DType.BFLOAT16)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "t5", "bert-masked-lm"])
def test_many_shards_and_their_index(arch: str, tmp_path: Path) -> None:
    source = MAKERS[arch](tmp_path / "source", "float16")
    schemes = [replace(scheme, max_shard_bytes=SHARD_BYTES) for scheme in (NF4, NF4_DOUBLE, INT8)]
    assert_identical(source, tmp_path, DType.FLOAT16, schemes)
    assert len(list((tmp_path / "streamed-0").glob("*.safetensors"))) > 2


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("float32", DType.BFLOAT16),
        ("float32", DType.FLOAT16),
        ("float32", DType.FLOAT32),
        ("float16", DType.BFLOAT16),
        ("bfloat16", DType.FLOAT32),
        ("bfloat16", DType.FLOAT16),
    ],
)
@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_every_dtype(arch: str, stored: str, asked: DType, tmp_path: Path) -> None:
    source = MAKERS[arch](tmp_path / "source", stored)
    assert_identical(source, tmp_path, asked, (NF4, INT8))


def test_a_source_of_many_shards(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    assert_identical(source, tmp_path, DType.BFLOAT16, (NF4, INT8))


@pytest.mark.parametrize("shard_bytes", [None, SHARD_BYTES])
@pytest.mark.parametrize("head", ["absent", "equal", "different", "alone"])
def test_a_tied_head(head: str, shard_bytes: int | None, tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    if head != "absent":
        factor = 1 if head == "equal" else 2
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    if head == "alone":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    schemes = [replace(scheme, max_shard_bytes=shard_bytes) for scheme in (NF4_DOUBLE, INT8)]
    assert_identical(source, tmp_path, DType.BFLOAT16, schemes)


@pytest.fixture(params=[1, 2])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.slow
def test_double_quantization_of_a_weight_whose_mean_depends_on_the_threads(torch_threads: int, tmp_path: Path) -> None:
    source = make_causal(
        tmp_path / "source",
        dtype="bfloat16",
        hidden_size=2048,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=16,
    )
    tensors = load_file(source / "model.safetensors")
    large = [name for name, tensor in tensors.items() if "_proj" in name and tensor.shape == (2048, 2048)]
    generator = torch.Generator().manual_seed(0)
    for name in large:
        # Block maxima of very different sizes, so that the order in which they are summed shows in their mean.
        tensors[name] *= torch.randn(2048, 1, generator=generator).mul(3).exp().bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert any(mean_of_maxima(tensors[name], 1) != mean_of_maxima(tensors[name], 2) for name in large)
    torch.set_num_threads(torch_threads)
    assert_identical(source, tmp_path, DType.BFLOAT16, (NF4_DOUBLE, FP4_DOUBLE))
    assert torch.get_num_threads() == torch_threads


def mean_of_maxima(weight: torch.Tensor, threads: int) -> float:
    torch.set_num_threads(threads)
    return float(weight.float().abs().view(-1, 64).amax(1).mean())


def test_weights_that_end_inside_a_block(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", hidden_size=136, intermediate_size=205)
    assert_identical(source, tmp_path, DType.BFLOAT16)


@pytest.mark.parametrize("bits", [0x7FC0, 0x7FFF, -1], ids=["cpu", "gpu", "negative"])
def test_every_kind_of_nan(bits: int, tmp_path: Path) -> None:
    """A GPU's NaN has other bits than a CPU's, and they get into the scales."""
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int16)[3, 5:9] = bits
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_identical(source, tmp_path, DType.BFLOAT16)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32", "int8"])
def test_every_storage_dtype(storage: str, tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    schemes = [with_options(scheme, quant_storage=storage) for scheme in (NF4, FP4_DOUBLE)]
    assert_identical(source, tmp_path, DType.BFLOAT16, schemes)


def test_the_users_skip_list_is_added_to_the_default(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    schemes = [with_options(replace(scheme, skip_modules=("q_proj",)), int8_threshold=0.0) for scheme in (NF4, INT8)]
    skips = ["lm_head", *(f"model.layers.{layer}.self_attn.q_proj" for layer in range(2))]
    assert_identical(source, tmp_path, DType.BFLOAT16, schemes, skips=skips)


@pytest.mark.parametrize(
    ("arch", "pattern"), [("t5", ".*Attention"), ("gpt2", "attn.c_attn"), ("mixtral", ".*self_attn.[qkv]_proj")]
)
def test_a_pattern_is_saved_as_the_names_of_the_layers(arch: str, pattern: str, tmp_path: Path) -> None:
    source = MAKERS[arch](tmp_path / "source", "bfloat16")
    listed = list(skip_list_of_source(source, (pattern,), DType.BFLOAT16))
    assert len(listed) > 2
    assert pattern not in listed
    assert_identical(source, tmp_path, DType.BFLOAT16, [replace(NF4, skip_modules=(pattern,))], skips=listed)


@pytest.mark.slow
@pytest.mark.parametrize("arch", OVERWRITTEN_ARCHS)
def test_values_that_transformers_overwrites_after_loading(arch: str, tmp_path: Path) -> None:
    source = make_overwritten(tmp_path / "source", arch, dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    (embedding,) = (name for name in tensors if name.endswith(("embed_tokens.weight", "word_embeddings.weight")))
    assert tensors[embedding][PAD].any()
    schemes = (NF4_DOUBLE, INT8, replace(NF4, max_shard_bytes=SHARD_BYTES))
    assert_identical(source, tmp_path, DType.BFLOAT16, schemes, writer="whole")
    assert len(list((tmp_path / "streamed-2").glob("*.safetensors"))) > 2
