"""The audit says how much of a model was quantized, and how well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.errors import Unsupported
from qbatch.worker.quantizing import Refused, Target, Written, write_checkpoints
from tests.plain_reference import load_quantized
from tests.schemes import with_options
from tests.shrunk import make, shrunk_config
from tests.tiny import make_causal, make_fused_qkv, make_seq2seq

NF4 = Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16)
NF4_DOUBLE = Scheme.of(Method.NF4, compute_dtype=DType.BFLOAT16, double_quant=True)
INT8 = Scheme(method=Method.INT8, compute_dtype=DType.BFLOAT16)
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def audit_of(source: Path, folder: Path, scheme: Scheme) -> dict[str, Any]:
    folder.mkdir()
    (result,) = write_checkpoints(
        source,
        [Target(scheme=scheme, folder=folder)],
        dtype=DType.BFLOAT16,
        device="cpu",
        on_progress=lambda *_: None,
    )
    assert isinstance(result, Written), result
    assert json.loads(json.dumps(result.audit, allow_nan=False)) == result.audit
    return dict(result.audit)


def edit(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_layers_whose_sizes_are_tensors_are_counted(tmp_path: Path) -> None:
    """Inkling's vision tower computes the sizes of its layers with tensors."""
    config = shrunk_config("inkling_mm_model")
    make(transformers.InklingForConditionalGeneration, config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    audit = audit_of(tmp_path / "source", tmp_path / "out", NF4)
    assert type(audit["quantized_parameters"]) is int


@pytest.mark.parametrize("tied", [False, True])
def test_counts_follow_from_the_shapes(tied: bool, tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", tie_word_embeddings=tied)
    audit = audit_of(source, tmp_path / "out", NF4)
    embedding = 512 * 128
    layer = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256
    total = embedding * (1 if tied else 2) + 2 * layer + 5 * 128
    assert audit["num_parameters"] == total
    assert audit["quantized_parameters"] == 2 * layer
    assert audit["quantized_fraction"] == pytest.approx(2 * layer / total)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert audit["weights_bytes"] == sum(tensor.nbytes for tensor in weights.values())
    assert audit["bits_per_param"] == pytest.approx(audit["weights_bytes"] * 8 / total)
    assert audit["mostly_unquantized"] is False


def test_what_stays_at_16_bits_is_named_with_its_reason(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", intermediate_size=1024)
    scheme = Scheme(method=Method.INT8, compute_dtype=DType.BFLOAT16, skip_modules=("down_proj",))
    kept = {entry["name"]: entry for entry in audit_of(source, tmp_path / "out", scheme)["kept"]}
    assert kept["model.embed_tokens.weight"]["reason"] == "not a linear layer"
    assert kept["lm_head.weight"]["reason"] == "output layer or tied"
    assert kept["model.layers.*.mlp.down_proj.weight"] == {
        "name": "model.layers.*.mlp.down_proj.weight",
        "reason": "skipped on request",
        "parameters": 2 * 128 * 1024,
    }


@pytest.mark.parametrize(
    ("pattern", "has_effect"),
    [("self_attn", False), (".*self_attn", True), ("model.layers.1", True), ("o_proj", True), ("router", False)],
)
def test_a_skip_that_matches_no_layer_is_named(pattern: str, has_effect: bool, tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", hidden_size=512)
    scheme = Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16, skip_modules=(pattern,))
    audit = audit_of(source, tmp_path / "out", scheme)
    assert audit["idle_skip_modules"] == ([] if has_effect else [pattern])
    assert any(entry["reason"] == "skipped on request" for entry in audit["kept"]) is has_effect


def test_fused_experts_are_flagged(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", "mixtral", dtype="bfloat16")
    audit = audit_of(source, tmp_path / "out", NF4)
    assert audit["mostly_unquantized"] is True
    assert any(entry["reason"] == "fused experts" for entry in audit["kept"])


def test_what_a_model_keeps_in_a_higher_precision_says_so(tmp_path: Path) -> None:
    source = make_seq2seq(tmp_path / "source", "t5", dtype="bfloat16", d_ff=1024)
    kept = {entry["name"]: entry["reason"] for entry in audit_of(source, tmp_path / "out", NF4)["kept"]}
    assert kept == {
        "shared.weight": "not a linear layer",
        "encoder.block.*.layer.*.DenseReluDense.wo.weight": "kept in a higher precision by the model",
        "decoder.block.*.layer.*.DenseReluDense.wo.weight": "kept in a higher precision by the model",
    }


@pytest.mark.parametrize("make", [make_causal, make_fused_qkv])
def test_dropped_tensors_are_named(make: Callable[..., Path], tmp_path: Path) -> None:
    source = make(tmp_path / "source", dtype="bfloat16")
    # Of the second, transformers says nothing: such names are ignored by pattern.
    dropped = {"model.mtp.0.weight": torch.zeros(8, 8), "rotary_emb.inv_freq": torch.zeros(8)}
    edit(source, lambda tensors: tensors.update(dropped))
    assert audit_of(source, tmp_path / "out", INT8)["dropped_tensors"] == list(dropped)


@pytest.mark.parametrize("scheme", [NF4, NF4_DOUBLE, INT8], ids=["nf4", "nf4-double", "int8"])
def test_the_error_is_that_of_the_loaded_checkpoint(scheme: Scheme, tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    edit(source, lambda tensors: tensors[UP_PROJ][0, :8].mul_(40))
    audit = audit_of(source, tmp_path / "out", scheme)
    exact = load_file(source / "model.safetensors")
    expected = {}
    for name, module in load_quantized(source, scheme, DType.BFLOAT16).named_modules():
        if hasattr(module, "source_cls"):
            before = exact[f"{name}.weight"].double()
            error = (_restored(module) - before).norm() / before.norm()
            expected[f"{name}.weight"] = error.item()
    worst = audit["relative_error_worst"]
    assert {entry["name"]: entry["error"] for entry in worst} == pytest.approx(expected, rel=1e-4)
    assert worst[0]["name"] == UP_PROJ
    assert [entry["error"] for entry in worst] == sorted(expected.values(), reverse=True) or len(worst) == len(expected)
    assert audit["relative_error_mean"] == pytest.approx(sum(expected.values()) / len(expected), rel=1e-4)


@pytest.mark.parametrize("scheme", [NF4, NF4_DOUBLE, INT8], ids=["nf4", "nf4-double", "int8"])
def test_the_error_of_a_whole_model_is_that_of_its_own_weights(scheme: Scheme, tmp_path: Path) -> None:
    source = make_fused_qkv(tmp_path / "source", dtype="bfloat16")
    audit = audit_of(source, tmp_path / "out", scheme)
    assert audit["whole_model_because"]
    exact = transformers.NomicBertModel.from_pretrained(source, dtype=torch.float32).state_dict()
    expected = {}
    for name, module in load_quantized(source, scheme, DType.BFLOAT16).named_modules():
        if hasattr(module, "source_cls"):
            before = exact[f"{name}.weight"].double()
            expected[f"{name}.weight"] = ((_restored(module) - before).norm() / before.norm()).item()
    assert {entry["name"]: entry["error"] for entry in audit["relative_error_worst"]} == pytest.approx(
        expected, rel=1e-4
    )
    assert audit["relative_error_mean"] == pytest.approx(sum(expected.values()) / len(expected), rel=1e-4)
    assert (audit["not_finite"], audit["int8_zero_scales"], audit["int8_infinite_scales"]) == ([], 0, 0)


def _restored(module: Any) -> torch.Tensor:
    if isinstance(module, bnb.nn.Linear8bitLt):
        return module.weight.data.double() * module.weight.SCB.double()[:, None] / 127
    state = module.weight.quant_state
    state.dtype = torch.float32
    restored: torch.Tensor = bnb.functional.dequantize_4bit(module.weight.data, state)
    return restored.double()


@pytest.mark.parametrize("scheme", [NF4, NF4_DOUBLE, INT8], ids=["nf4", "nf4-double", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_named(value: float, scheme: Scheme, tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    edit(source, lambda tensors: tensors[UP_PROJ][3].fill_(value))
    assert audit_of(source, tmp_path / "out", scheme)["not_finite"] == [UP_PROJ]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_in_unquantized_tensors_is_named(value: float, tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    edit(source, lambda tensors: [tensors[name].view(-1)[-1].fill_(value) for name in names])
    storage = with_options(NF4, quant_storage="bfloat16")
    for number, scheme in enumerate([NF4, storage, INT8]):
        assert audit_of(source, tmp_path / str(number), scheme)["not_finite"] == names


def test_nan_in_a_model_built_whole_is_named(tmp_path: Path) -> None:
    source = make_fused_qkv(tmp_path / "source", dtype="bfloat16")
    edit(source, lambda tensors: tensors["embeddings.word_embeddings.weight"][3].fill_(float("nan")))
    (name,) = audit_of(source, tmp_path / "out", INT8)["not_finite"]
    assert name.endswith("word_embeddings.weight")


def test_a_convolution_is_no_stack_of_experts(tmp_path: Path) -> None:
    config = transformers.WhisperConfig(
        d_model=128, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=1000,
        num_mel_bins=200, encoder_attention_heads=2, decoder_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    kept = {entry["name"]: entry["reason"] for entry in audit_of(tmp_path / "source", tmp_path / "out", NF4)["kept"]}
    assert kept["model.encoder.conv1.weight"] == "not a linear layer"


def test_a_stacked_weight_without_experts_is_not_called_experts(tmp_path: Path) -> None:
    config = transformers.RecurrentGemmaConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=1000, lru_width=512, block_types=["recurrent"],
    )  # fmt: skip
    transformers.RecurrentGemmaForCausalLM(config).save_pretrained(tmp_path / "source")
    kept = {entry["name"]: entry["reason"] for entry in audit_of(tmp_path / "source", tmp_path / "out", NF4)["kept"]}
    assert kept["model.layers.*.temporal_block.rg_lru.input_gate_weight"] == "not a linear layer"


def test_a_storage_that_weights_do_not_fill_is_refused_by_name(tmp_path: Path) -> None:
    source = make_causal(
        tmp_path / "source", dtype="bfloat16", hidden_size=132, num_attention_heads=2, intermediate_size=205
    )
    (tmp_path / "out").mkdir()
    target = Target(scheme=with_options(NF4, quant_storage="float32"), folder=tmp_path / "out")
    (result,) = write_checkpoints(source, [target], dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None)
    assert isinstance(result, Refused)
    assert isinstance(result.error, Unsupported)
    assert "proj.weight does not fill a whole number of torch.float32 elements: choose another" in str(result.error)


def test_useless_int8_scales_are_counted(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP_PROJ][3:5].zero_()
        tensors[UP_PROJ][7, 0] = 70_000.0

    edit(source, spoil)
    audit = audit_of(source, tmp_path / "out", INT8)
    assert (audit["int8_zero_scales"], audit["int8_infinite_scales"]) == (2, 1)
