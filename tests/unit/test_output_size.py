"""The predicted size of a checkpoint is that of the files that are written, for every method that runs on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from qbatch.core.domain import DType, Method, Scheme, stored_dtype
from qbatch.core.known_layers import KNOWN
from qbatch.core.output_size import OutputSize, output_size
from qbatch.core.sources import read_config, read_headers, source_dtype, weight_files
from qbatch.worker.measuring.speed.size import disk_bytes, measure_size
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from tests import tiny
from tests.unit.benchmark_models import loaded_on_cpu, quantized

NF4_DOUBLE = Scheme.of(Method.NF4, double_quant=True)
STREAMED = (
    Scheme(method=Method.NF4),
    Scheme(method=Method.FP4),
    NF4_DOUBLE,
    Scheme.of(Method.NF4, quant_storage="bfloat16"),
    Scheme(method=Method.INT8),
)
TORCHAO = (Scheme(method=Method.TORCHAO_INT8), Scheme(method=Method.TORCHAO_INT8_DYNAMIC))
MORE = {
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}


def compared(source: Path, folder: Path, *schemes: Scheme) -> list[tuple[OutputSize, int]]:
    """Each scheme's prediction, and the bytes that were written."""
    headers, config = read_headers(source), read_config(source)
    dtype = stored_dtype(DType.AUTO, source_dtype(headers))
    targets = [Target(scheme=one.resolved(dtype), folder=folder / str(n)) for n, one in enumerate(schemes)]
    for target in targets:
        target.folder.mkdir(parents=True)
    written = list(write_checkpoints(source, targets, dtype=dtype, device="cpu", on_progress=lambda *_: None))
    assert all(isinstance(one, Written) for one in written), written
    sizes = [sum(path.stat().st_size for path in weight_files(target.folder)) for target in targets]
    predictions = [output_size(headers, config, scheme, DType.AUTO) for scheme in schemes]
    return list(zip(predictions, sizes, strict=True))


def assert_equal(source: Path, folder: Path, *schemes: Scheme) -> None:
    for scheme, (predicted, size) in zip(schemes, compared(source, folder, *schemes), strict=True):
        assert predicted.off_by is not None, scheme
        if scheme == NF4_DOUBLE:
            names = load_file(folder / "2" / "model.safetensors")
            layers = sum(name.endswith(".nested_absmax") for name in names)
            assert predicted.off_by == 4 * layers + 8
        else:
            assert predicted.off_by == 0
        assert abs(predicted.nbytes - size) <= predicted.off_by, scheme


def _more(folder: Path, arch: str, dtype: str) -> Path:
    tiny.make_tokenizer(folder)
    cls = getattr(transformers, MORE[arch])
    config = cls.config_class(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    cls(config).to(getattr(tiny.torch, dtype)).save_pretrained(folder)
    return folder


MAKERS: dict[str, Callable[[Path, str], Path]] = {
    **{arch: lambda folder, dtype, arch=arch: tiny.make_causal(folder, arch, dtype=dtype)
       for arch in tiny.CAUSAL_ARCHS if arch != "mixtral"},
    **{arch: lambda folder, dtype, arch=arch: _more(folder, arch, dtype) for arch in MORE},
    "bert": lambda folder, dtype: tiny.make_encoder(folder, dtype=dtype),
    "bert-classification": lambda folder, dtype: tiny.make_encoder(folder, "classification", dtype=dtype),
}  # fmt: skip


@pytest.mark.parametrize("arch", MAKERS)
def test_the_size_is_exact_for_every_known_architecture(arch: str, tmp_path: Path) -> None:
    source = MAKERS[arch](tmp_path / "source", "bfloat16" if arch != "bloom" else "float32")
    assert read_config(source)["architectures"][0] in KNOWN
    assert_equal(source, tmp_path, *STREAMED)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_the_loaded_weights_take_what_was_predicted(arch: str, tmp_path: Path) -> None:
    """What --max-weights-bytes bounds, which is less than the files."""
    source = MAKERS[arch](tmp_path / "source", "bfloat16")
    headers, config = read_headers(source), read_config(source)
    for scheme in STREAMED:
        predicted = output_size(headers, config, scheme, DType.AUTO)
        folder = quantized(source, tmp_path / scheme.description.title(scheme.options), scheme)
        assert predicted.weights_bytes == measure_size(loaded_on_cpu(folder).model).weights_bytes, scheme
        assert predicted.weights_bytes < disk_bytes(folder)


def test_every_known_architecture_is_tried(tmp_path: Path) -> None:
    made = {read_config(make(tmp_path / arch, "bfloat16"))["architectures"][0] for arch, make in MAKERS.items()}
    assert made == set(KNOWN)


@pytest.mark.parametrize("arch", ["llama", "opt", "bert-classification", "bloom"])
def test_the_size_is_exact_for_methods_that_build_the_whole_model(arch: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    assert_equal(MAKERS[arch](tmp_path / "source", "bfloat16"), tmp_path, *TORCHAO)


def test_the_size_is_exact_with_skipped_layers_and_several_files(tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path / "source", dtype="float16", max_shard_size="100KB")
    schemes = [
        Scheme.of(method, skip_modules=skips, max_shard_bytes=shard)
        for method in (Method.NF4, Method.INT8)
        for skips in ((), ("down_proj", "model.layers.0", ".*q_proj"))
        for shard in (None, 60_000, 10_000)
    ]
    assert_equal(source, tmp_path, *schemes)


def _renamed(source: Path, rename: Callable[[str], str], extra: dict[str, Any] | None = None) -> None:
    path = source / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()} | (extra or {})
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("arch", "prefix"), [("bloom", "transformer."), ("gpt2", "transformer."), ("opt", "model.")])
def test_a_base_models_names_and_buffers_are_known(arch: str, prefix: str, tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path / "source", arch, dtype="float16")
    extra = {"h.0.attn.bias": tiny.torch.ones(1, 1, 8, 8)} if arch == "gpt2" else {}
    _renamed(source, lambda name: name.removeprefix(prefix), extra)
    assert_equal(source, tmp_path, *STREAMED[:1], STREAMED[-1])


def test_what_is_not_certain_is_called_an_estimate(tmp_path: Path) -> None:
    mixture = tiny.make_causal(tmp_path / "mixtral", "mixtral", dtype="bfloat16")
    tied = tiny.make_causal(tmp_path / "tied", dtype="bfloat16", tie_word_embeddings=True)
    head = load_file(tied / "model.safetensors")["model.embed_tokens.weight"].clone()
    _renamed(tied, str, {"lm_head.weight": head})
    unknown = tiny.make_causal(tmp_path / "unknown", dtype="bfloat16")
    _renamed(unknown, str, {"model.layers.0.surprise.weight": head})
    for source in (mixture, tied, unknown):
        ((predicted, size),) = compared(source, tmp_path / f"{source.name}-4", Scheme(method=Method.NF4))
        assert predicted.off_by is None
        assert predicted.nbytes == pytest.approx(size, rel=0.5)


def test_a_hostile_config_is_only_estimated(tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path, dtype="bfloat16")
    for architectures in (None, [], [1], "LlamaForCausalLM", {"a": 1}):
        config = json.loads((source / "config.json").read_text()) | {"architectures": architectures}
        assert output_size(read_headers(source), config, Scheme(method=Method.NF4), DType.AUTO).off_by is None
