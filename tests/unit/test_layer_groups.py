"""The groups of layers that are quantized together, of every kind of architecture, against lists written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.header_groups import count_groups
from qbatch.core.sources import read_config, read_headers
from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.measuring.speed.size import measure_size
from qbatch.worker.measuring.unloaded_size import count_unloaded
from qbatch.worker.methods.bnb_weights import WEIGHTS
from qbatch.worker.models.architecture import model_class
from qbatch.worker.quantizing.planning.skeleton import quantized_linears
from qbatch.worker.searching.layer_groups import ModelLayers, model_layers
from tests import tiny
from tests.plain_reference import save_reference
from tests.schemes import with_options
from tests.shrunk import make, shrunk_config

NF4 = Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16)
IDS = tuple(range(10, 40))


def layers_of(
    model: Any, asked: tuple[str, ...] = (), scheme: Scheme = NF4, names: Set[str] | None = None
) -> ModelLayers:
    names = quantized_linears(type(model), model.config, asked) if names is None else names
    probe = Probe(ids=IDS, labels=IDS if model.config.is_encoder_decoder else ())
    return model_layers(model.eval(), names, probe, "cpu", WEIGHTS.packing(scheme))


def small(model_type: str, cls: str, **fields: Any) -> Any:
    return make(getattr(transformers, cls), shrunk_config(model_type, dtype="bfloat16", **fields)).to(torch.bfloat16)


def stored(make_model: Callable[..., Path], folder: Path, *arguments: str) -> Any:
    source = make_model(folder, *arguments)
    config = transformers.AutoConfig.from_pretrained(source)
    return model_class(config).from_pretrained(source, dtype=torch.bfloat16)


LLAMA = {"self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"}
FAMILIES = {
    ("llama", "LlamaForCausalLM"): LLAMA,
    ("phi3", "Phi3ForCausalLM"): {
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    },
    # Attention and MLP read the same input here.
    ("phi", "PhiForCausalLM"): {"self_attn.q_proj+k_proj+v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"},
    ("gpt2", "GPT2LMHeadModel"): {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    ("bloom", "BloomForCausalLM"): {
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    },
    ("opt", "OPTForCausalLM"): {"self_attn.k_proj+v_proj+q_proj", "self_attn.out_proj", "fc1", "fc2"},
    ("bert", "BertForMaskedLM"): {
        "attention.self.query+key+value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    },
    # Its experts are no linear layers.
    ("mixtral", "MixtralForCausalLM"): {"self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj"},
    ("qwen2_moe", "Qwen2MoeForCausalLM"): {
        "self_attn.q_proj+k_proj+v_proj",
        "self_attn.o_proj",
        "mlp.shared_expert.gate_proj+up_proj",
        "mlp.shared_expert.down_proj",
        "mlp.shared_expert_gate",
    },
}


@pytest.mark.parametrize(("family", "expected"), FAMILIES.items(), ids=[name for name, _ in FAMILIES])
def test_each_block_has_the_groups_of_its_family(family: tuple[str, str], expected: set[str]) -> None:
    layers = layers_of(small(*family))
    for block in layers.blocks:
        assert {group.name.removeprefix(f"{block}.") for group in layers.groups if group.layer == block} == expected
    assert len(layers.blocks) == 2


@pytest.mark.parametrize("family", [name for name in FAMILIES if name[0] in ("llama", "phi3", "gpt2", "bloom", "opt")])
def test_the_headers_tell_how_many_groups_there_are(tmp_path: Path, family: tuple[str, str]) -> None:
    model = small(*family)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [family[1]]}))
    assert count_groups(read_headers(tmp_path), read_config(tmp_path)) == len(layers_of(model).groups)


def test_a_block_of_a_decoder_has_two_attentions() -> None:
    layers = layers_of(small("t5", "T5ForConditionalGeneration", is_gated_act=True))
    assert {
        group.name.removeprefix("decoder.block.1.") for group in layers.groups if group.layer == "decoder.block.1"
    } == {
        "layer.0.SelfAttention.q+k+v",
        "layer.0.SelfAttention.o",
        "layer.1.EncDecAttention.q",
        # What they read is the encoder's output.
        "layer.1.EncDecAttention.k+v",
        "layer.1.EncDecAttention.o",
        "layer.2.DenseReluDense.wi_0+wi_1",
    }
    assert layers.blocks == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")


def test_latent_attention_keeps_what_vllm_fuses_together() -> None:
    layers = layers_of(small("deepseek_v3", "DeepseekV3ForCausalLM"))
    names = {group.name for group in layers.groups if group.layer == "model.layers.1"}
    assert "model.layers.1.self_attn.q_a_proj+kv_a_proj_with_mqa" in names
    assert "model.layers.1.mlp.shared_experts.gate_proj+up_proj" in names


def test_a_layer_of_mamba_and_one_outside_of_all_blocks_are_groups_too() -> None:
    mamba = layers_of(small("mamba", "MambaForCausalLM"), asked=("dt_proj",))
    assert {
        group.name.removeprefix("backbone.layers.0.mixer.") for group in mamba.groups if "layers.0" in group.name
    } == {
        "in_proj",
        "x_proj",
        "out_proj",
    }
    bert = layers_of(small("bert", "BertForMaskedLM"))
    outside = [group for group in bert.groups if group.layer is None]
    assert [group.name for group in outside] == ["cls.predictions.transform.dense"]
    assert bert.start["cls.predictions.transform.dense"] == 2


class _Expert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = (torch.nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.w1(x) * self.w3(x))


LINEARS_OF_EXPERTS = ("w1", "w2", "w3")


class _Experts(torch.nn.Module):
    """An expert for each token, as in a model with code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(_Expert() for _ in range(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for place in range(x.shape[1]):
            out[:, place] = self.experts[place % 64](x[:, place])
        return out


def test_experts_are_kept_together_even_those_that_no_token_reaches() -> None:
    model = make(transformers.LlamaForCausalLM, shrunk_config("llama", hidden_size=64))
    for layer in model.model.layers:
        layer.mlp = _Experts()
    layers = layers_of(model, names={name for name, _ in model.named_modules() if name.endswith(LINEARS_OF_EXPERTS)})
    experts = [group for group in layers.groups if "expert" in group.name]
    assert [group.name for group in experts] == [f"model.layers.{layer}.mlp.experts.*.w1+w3+w2" for layer in (0, 1)]
    assert [len(group.modules) for group in experts] == [192, 192]


def test_experts_that_are_numbered_otherwise_are_kept_together_too() -> None:
    layers = layers_of(small("switch_transformers", "SwitchTransformersForConditionalGeneration"))
    sparse = [group for group in layers.groups if "experts" in group.name]
    assert {group.name.partition(".mlp.")[2] for group in sparse} == {"experts.*.wi+wo"}
    assert all(len(group.modules) == 2 * 4 for group in sparse)
    assert not layers.unreached


def test_layers_that_no_text_reaches_are_no_groups_to_choose_from() -> None:
    layers = layers_of(small("gemma3", "Gemma3ForConditionalGeneration"))
    assert {group.name.split(".")[1] for group in layers.groups} == {"language_model"}
    assert {group.name.split(".")[1] for group in layers.unreached} == {"vision_tower"}
    assert layers.blocks == ("model.language_model.layers.0", "model.language_model.layers.1")


def test_a_block_that_runs_twice_is_never_skipped() -> None:
    albert = small("albert", "AlbertForMaskedLM")
    assert layers_of(albert).blocks == ()
    assert set(layers_of(albert).start.values()) == {0}


@pytest.mark.parametrize(("family", "expected"), FAMILIES.items(), ids=[name for name, _ in FAMILIES])
def test_every_quantized_layer_is_in_exactly_one_group(family: tuple[str, str], expected: set[str]) -> None:
    model = small(*family)
    layers = layers_of(model)
    members = [name for group in layers.groups for name in group.modules]
    assert layers.unreached == ()
    assert len(members) == len(set(members))
    assert set(members) == quantized_linears(type(model), model.config)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_bytes_of_the_groups_are_those_of_a_published_checkpoint(
    tmp_path: Path, arch: str, double_quant: bool
) -> None:
    scheme = with_options(NF4, double_quant=double_quant)
    model = stored(tiny.make_causal, tmp_path / "source", arch)
    groups = layers_of(model, scheme=scheme).groups
    total = measure_size(model).weights_bytes
    published = save_reference(tmp_path / "source", tmp_path / "published", scheme, DType.BFLOAT16)
    assert (
        total - sum(group.extra_bytes for group in groups)
        == count_unloaded(published, DType.BFLOAT16).size.weights_bytes
    )
