"""The published skip list means the same to transformers and to vLLM. Both rules are written here a second time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from transformers.quantizers.quantizers_utils import should_convert_module

from qbatch.core.loaders.engine_names import EngineArchitecture
from qbatch.core.loaders.skip_list import SkippedLayers
from qbatch.core.loaders.skip_rules import transformers_skips, vllm_skips
from qbatch.worker.quantizing.planning.skeleton import is_plain_linear, skip_list

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
QKV = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
USUAL = QKV | {"gate_up_proj": ("gate_proj", "up_proj")}
NESTED = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCase:
    """A class of transformers, and what vLLM 0.33 makes of its names."""

    cls: str
    config: Mapping[str, Any] = field(default_factory=lambda: SHAPE)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: USUAL)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    lists: tuple[str, ...] = ("down_proj", "mlp.down_proj", ".*self_attn", "model.layers.1.mlp", "model.layers.(0|11)")

    def names(self) -> tuple[Any, Any, set[str]]:
        cls = getattr(transformers, self.cls)
        config = cls.config_class(**self.config)
        config.dtype = torch.bfloat16
        with torch.device("meta"):
            model = cls(config)
        return cls, config, {name for name, module in model.named_modules() if is_plain_linear(module)}

    def name_in_vllm(self, name: str) -> str:
        for old, new in self.prefixes.items():
            if f"{name}.".startswith(old):
                name = new + name.removeprefix(old)
                break
        stem, _, leaf = name.rpartition(".")
        return next((f"{stem}.{whole}" for whole, members in self.fused.items() if leaf in members), name)


VISION = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2}
FAMILIES = {
    "llama": EngineCase(cls="LlamaForCausalLM"),
    "qwen2": EngineCase(cls="Qwen2ForCausalLM"),
    "gemma2": EngineCase(cls="Gemma2ForCausalLM", config=SHAPE | {"head_dim": 16}),
    "mixture": EngineCase(
        cls="MixtralForCausalLM",
        config=SHAPE | {"num_local_experts": 2},
        fused=QKV,
        lists=("o_proj", ".*self_attn", "model.layers.1", "model.layers.(0|11)"),
    ),
    "fused qkv": EngineCase(cls="Phi3ForCausalLM", fused={}, lists=("qkv_proj", "gate_up_proj", ".*self_attn")),
    "fused qkv in the file": EngineCase(
        cls="NomicBertModel",
        config=SMALL | {"vocab_size": 128},
        lists=("mlp.down_proj", ".*attn", "layers.1", "layers.0.mlp.(gate|up)_proj"),
    ),
    "opt": EngineCase(
        cls="OPTForCausalLM",
        config={"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
        | {"word_embed_proj_dim": 64, "pad_token_id": 0},
        fused=QKV,
        lists=("fc1", ".*self_attn", "model.decoder.layers.0", "layers.1.fc2"),
    ),
    "vision and language": EngineCase(
        cls="Qwen2VLForConditionalGeneration",
        config={
            "text_config": SMALL
            | {
                "vocab_size": 128,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
            },
            "vision_config": VISION,
        },
        prefixes={"model.visual.": "visual."} | NESTED,
        lists=("down_proj", ".*self_attn", ".*visual", "model.language_model.layers.1.mlp", "merger.mlp.0"),
    ),
    "renamed towers": EngineCase(
        cls="Gemma3ForConditionalGeneration",
        config={"text_config": SMALL | {"vocab_size": 128, "head_dim": 16}, "vision_config": SMALL},
        prefixes={"model.vision_tower.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector."}
        | NESTED,
        lists=("out_proj", ".*self_attn", ".*vision_tower", "model.language_model.layers.1"),
    ),
    "encoder": EngineCase(
        cls="BertModel",
        config=SMALL | {"vocab_size": 128},
        fused={"qkv_proj": ("query", "key", "value")},
        prefixes={"encoder.": "model.encoder."},
        lists=("encoder.layer.1", ".*attention", "intermediate.dense"),
    ),
    "two stacks": EngineCase(
        cls="BartForConditionalGeneration",
        config={"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 128},
        lists=("model.encoder.layers.0", "fc1", ".*encoder_attn", "model.decoder", "layers.1.fc2"),
    ),
}


def by_transformers(entries: Iterable[str], name: str) -> bool:
    return any(name.endswith(one) or re.match(rf"(?:{one})(?:(?<=\.)|(?=\.|$))", name) for one in entries)


def by_vllm(entries: Iterable[str], name: str) -> bool:
    return any(one in name.split(".") or f"{name}.".startswith(f"{one}.") for one in entries)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_loaders_skip_what_was_asked_for(family: str) -> None:
    one = FAMILIES[family]
    cls, config, linears = one.names()
    defaults = {entry for entry in skip_list(cls, config, ("no such layer",)) if entry in linears or "." not in entry}
    for asked in one.lists:
        listed = skip_list(cls, config, (asked,))
        wanted = {name for name in linears if by_transformers([asked, *defaults], name)}
        assert wanted - defaults, asked
        assert {name for name in linears if by_transformers(listed, name)} == wanted, asked
        # vLLM's output layer is none of its linear layers.
        blocks = {name for name in linears if not name.endswith("lm_head")}
        assert {name for name in blocks if by_vllm(listed, one.name_in_vllm(name))} == wanted & blocks, asked


def test_full_names_with_the_fused_one_are_published() -> None:
    cls, config, _ = FAMILIES["llama"].names()
    assert skip_list(cls, config, ("model.layers.3.mlp.(gate|up)_proj",)) == (
        "lm_head",
        "model.layers.3.mlp.gate_proj",
        "model.layers.3.mlp.gate_up_proj",
        "model.layers.3.mlp.up_proj",
    )


def test_the_prefix_that_vllm_gives_a_language_model_is_published() -> None:
    cls, config, _ = FAMILIES["vision and language"].names()
    listed = skip_list(cls, config, (".*language_model.layers.0.self_attn",))
    assert "model.language_model.layers.0.self_attn.o_proj" in listed
    assert "language_model.model.layers.0.self_attn.o_proj" in listed
    assert "language_model.model.layers.0.self_attn.qkv_proj" in listed


def test_a_part_of_a_group_is_listed_without_the_fused_name() -> None:
    cls, config, _ = FAMILIES["llama"].names()
    listed = skip_list(cls, config, ("q_proj",))
    assert len(listed) == 13
    assert not [name for name in listed if "qkv" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_spellings_are_one_list(family: str) -> None:
    one = FAMILIES[family]
    cls, config, _ = one.names()
    for asked in one.lists:
        listed = skip_list(cls, config, (asked,))
        assert skip_list(cls, config, listed) == listed
        assert skip_list(cls, config, (asked, "no such layer", f"(?:{asked})")) == listed


@pytest.mark.parametrize("family", ["llama", "vision and language", "two stacks"])
def test_the_rules_are_those_of_the_installed_transformers_and_of_vllm(family: str) -> None:
    one = FAMILIES[family]
    _, _, linears = one.names()
    entries = [
        *one.lists,
        "proj",
        "q_proj",
        "layers.1",
        "model.layers",
        "self_attn",
        ".*mlp.",
        "mo",
        *sorted(linears)[:3],
    ]
    for entry in entries:
        for name in linears:
            assert transformers_skips([entry])(name) is not should_convert_module(name, [entry])
            assert transformers_skips([entry])(name) is by_transformers([entry], name)
            assert vllm_skips([entry])(name) is by_vllm([entry], name)


def layers_of(linears: Iterable[str], kept: Iterable[str]) -> SkippedLayers:
    return SkippedLayers(set(linears), set(kept), EngineArchitecture())


def test_a_name_that_ends_another_is_told_by_its_folder() -> None:
    linears = {"stack.layers.0.fc1", "stack.layers.0.fc2", "side_stack.layers.0.fc1", "side_stack.layers.0.fc2"}
    assert layers_of(linears, {"stack.layers.0.fc1", "stack.layers.0.fc2"}).entries() == {"stack.layers.0"}


def test_a_name_that_ends_another_and_has_neighbours_is_told_exactly() -> None:
    linears = {"stack.fc1", "stack.fc2", "side_stack.fc1"}
    (entry,) = layers_of(linears, {"stack.fc1"}).entries()
    assert {name for name in linears if by_transformers([entry], name)} == {"stack.fc1"}
    assert by_transformers([entry], "stack.fc1.weight"), "torchao's quantizer asks for the parameter"


def test_a_list_too_long_to_stay_compiled_is_folded() -> None:
    linears = {
        f"model.layers.{layer}.{part}" for layer in range(126) for part in ("attn.q", "attn.k", "attn.o", "mlp.up")
    }
    kept = {name for name in linears if ".attn." in name}
    assert len(kept) > 300
    more = linears | {f"model.layers.{layer}.attn.v" for layer in range(126)}
    entries = layers_of(more, kept | {name for name in more if name.endswith("attn.v")}).entries()
    assert entries == {f"model.layers.{layer}.attn" for layer in range(126)}
