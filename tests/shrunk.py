"""Any architecture of transformers, made tiny: a config of its own class, with few layers of few rows and columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from tests.tiny import BOS, EOS, MASK, MAX_TOKENS, PAD, VOCAB_SIZE

_DEPTH = 2
_LAYERS = r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|depth"
# Types of language models whose rotary embedding has parts for time, height and width.
_IN_PARTS = r"qwen2(_5)?_vl|qwen2_5_omni|cosmos3_edge|glm4v|glm46v|glmga|glm_ocr|paddleocr_vl"
_WINDOWS_IN_ROW = 10
# What a default config lacks, without which its model does not run.
_MISSING = {
    "class_thresholds": [0.5, 0.5],
    "class_order": [0, 1],
    "projector_scale_factors": [1.0],
    "num_feature_levels": 1,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
}
_HEADS = {"head_dim": 32}
_HYBRIDS = {
    "num_hidden_layers": 3,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    "attention_hidden_size": 256,
    "attention_head_dim": 64,
}
_SEES = {"vision_start_token_id": EOS}
_EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320}
_IMAGE_IN_TEXT = {"vocabulary_map": {"<image>": EOS}}
# Fields that the types of these models and of their parts need otherwise, by ``model_type``.
_OF_TYPE: Mapping[str, Mapping[str, Any]] = {
    "align": {"projection_dim": 80},
    "align_vision_model": _EFFICIENT,
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": _IMAGE_IN_TEXT,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 128},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {"head_dim": 64},
    "efficientnet": _EFFICIENT,
    "emu3": _IMAGE_IN_TEXT,
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [128, 128],
        "moe_num_experts": 4,
        "moe_k": 2,
        "rope_parameters": {"mrope_section": [4, 4, 8]},
    },
    "esm": {"vocab_size": VOCAB_SIZE, "mask_token_id": MASK, "pad_token_id": PAD},
    "falcon_h1": {"mamba_d_ssm": 256},
    "florence_vision": {
        "depths": [1, 1, 1, 1],
        "embed_dim": [32, 64, 64, 128],
        "num_heads": [2, 2, 2, 4],
        "num_groups": [2, 2, 2, 4],
    },
    "focalnet": {"depths": [1, 1, 1, 1], "embed_dim": 32, "hidden_sizes": [32, 64, 128, 256]},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 32}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "granite_docling_vision": {"deepstack_visual_indexes": [0, 1]},
    "granite_speech_encoder": {"hidden_dim": 128},
    "granite_speech_plus_encoder": {"hidden_dim": 128},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hiera": {"depths": [1, 1, 1, 1], "embed_dim": 32},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "hunyuan_vl_text": _HEADS,
    "kyutai_speech_to_text": {"audio_pad_token_id": PAD, "codebook_vocab_size": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 32},
    "mimi": {"upsample_groups": 128},
    "ministral": _HEADS,
    "mistral4": {"head_dim": 64},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moonshine_streaming_encoder": {"sliding_windows": [[16, 4], [16, 0]]},
    "perceiver": {"num_latents": 32, "d_latents": 128, "num_self_attends_per_block": 2},
    "qwen2_5_omni_bigvgan": {"upsample_initial_channel": 64},
    "qwen2_5_omni_thinker": _SEES,
    "qwen3_omni_moe_thinker": _SEES,
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2}},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 256},
    "qwen4_exp_text": {
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
    },
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds_dim": [64, 64], "axial_pos_shape": [16, 32]},
    "sapiens2": {"head_config": {"upsample_out_channels": [32], "conv_out_channels": [32]}},
    "step3p5": {"sliding_window": 64},
    "wav2vec2-bert": {"vocab_size": VOCAB_SIZE},
    "wav2vec2-conformer": {"vocab_size": VOCAB_SIZE},
    "xlstm": {"num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRIDS,
    "zamba2": _HYBRIDS | {"mamba_headdim": 64},
    "zaya": {"num_experts_per_tok": 1},
}
# Names of fields and their values, the first match counts. Widths are multiples of 64 for bitsandbytes on a CPU.
_FIELDS = (
    (r"vocab_size(_per_layer_input)?|entity_vocab_size|encoder_hash_byte_group_vocab|n_words", VOCAB_SIZE),
    (r"pad_token_id", PAD),
    (r"bos_token_id", BOS),
    (r"eos_token_id", EOS),
    (_LAYERS, _DEPTH),
    (r"attn_layer_period", _DEPTH),
    (r"attn_layer_offset", 1),
    (r"num_key_value_heads", 4),
    (r"(mamba_)?d_head", 32),
    (r"mamba_n_heads", 8),
    (r"(\w+_)?(attention_)?heads?|n_head|num_attention_heads", 4),
    (r"d_kv|head_dim|qk_rope_head_dim|qk_nope_head_dim|v_head_dim", 32),
    (r"(q|kv|o)_lora_rank|qk_head_dim", 64),
    (r"rotary_dim|qk_rope_head_dim", 32),
    (r"n_routed_experts|num_(local_)?experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|top_k_experts", 2),
    (r"n_groups?|num_expert_group|topk_group|first_k_dense_replace|n_shared_experts", 1),
    (r"num_kv_shared_layers", 0),
    (r"hidden_size_per_layer_input", 64),
    (r"reassemble_hidden_size|word_embed_proj_dim", 128),
    (r"hidden_size(_global)?|d_model|n_embd|dim|emb(ed)?_dim|projection_dim|projection_size|output_dim|lru_width", 128),
    (r"(attention|out|text|moe|projector)_hidden_size|embedding_(dim|size)|adapter_(in_dim|out_dim|input_size)", 128),
    (r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|inner_dim|d_ff)", 256),
    (r"base_channels", 32),
    (r"audio_hidden_size", 128),
    (r"blank_token_id", PAD),
    (r"num_filters", 4),
    (r"max_position_embeddings|n_positions", MAX_TOKENS),
)


def shrunk_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """The default config of ``model_type`` with small sizes, in its parts too; ``fields`` override those of the top."""
    config: PreTrainedConfig = transformers.AutoConfig.for_model(model_type)
    start = {"decoder_start_token_id": PAD} if config.is_encoder_decoder else {}
    return type(config).from_dict(_small(config.to_dict()) | start | fields)


def _small(values: dict[str, Any]) -> dict[str, Any]:
    depths = {value for name, value in values.items() if re.fullmatch(_LAYERS, str(name)) and isinstance(value, int)}
    small = {name: _small_value(name, value, depths) for name, value in values.items()}
    if isinstance(values.get("num_heads"), list) and "embed_dim" in values:  # it grows from stage to stage, as they do
        small["embed_dim"] = values["embed_dim"]
    small = _merged(small, _OF_TYPE.get(str(values.get("model_type")), {}))
    if "num_windows" in values and values["image_size"] % (values["patch_size"] * values["num_windows"]):
        small["image_size"] = _WINDOWS_IN_ROW * values["patch_size"] * values["num_windows"]
    return _with_fitting_rotation(small | _outputs_of_layers(values, depths))


def _merged(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``others`` in place, those of parts in the parts."""
    parts = {name: _merged(values[name], one) for name, one in others.items() if isinstance(values.get(name), dict)}
    return {**values, **others, **parts}


def _outputs_of_layers(values: dict[str, Any], depths: set[Any]) -> dict[str, Any]:
    """A backbone gives the outputs of some layers: then it has as many, and gives that of each."""
    indices = values.get("out_indices") or values.get("backbone_out_indices")
    if not isinstance(indices, list) or not isinstance(values.get("num_hidden_layers"), int):
        return {"out_features": None, "out_indices": None} if depths and "out_features" in values else {}
    count = len(indices)
    if "backbone_out_indices" in values:
        return {"num_hidden_layers": count, "backbone_out_indices": list(range(count))}
    return {"num_hidden_layers": count, "out_features": None, "out_indices": list(range(1, count + 1))}


def _small_value(name: str, value: Any, depths: set[Any]) -> Any:
    if name in ("image_token_index", "video_token_index") and value is None:
        return EOS
    if name in _MISSING and not value:
        return _MISSING[name]
    if name == "per_layer_config" and value:
        return {layer: _small(fields) for layer, fields in value.items() if int(layer) < _DEPTH}
    if isinstance(value, dict):
        return _small(value)
    if name == "layers_block_type" and value:  # one of each, but Zamba ties its hybrid layers to the first of them
        return value[:_DEPTH] if "hybrid" in value else list(dict.fromkeys(value))
    if isinstance(value, list) and (len(value) in depths or re.fullmatch(r"\w*(layers?|blocks?)_types?", name)):
        return _two_kinds(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return next((small for pattern, small in _FIELDS if re.fullmatch(pattern, str(name))), value)


def _two_kinds(of_layers: list[Any]) -> list[Any]:
    """What is said of the first layer, and of the first one that is different."""
    other = next((one for one in of_layers if one != of_layers[0]), of_layers[0]) if of_layers else None
    return [of_layers[0], other][: len(of_layers)] if of_layers else []


def _with_fitting_rotation(values: dict[str, Any]) -> dict[str, Any]:
    """With the parts of a rotary embedding as large as the heads that they rotate, for models that have parts."""
    rotation, heads = values.get("rope_parameters"), values.get("num_attention_heads")
    if not isinstance(rotation, dict) or not heads or not re.match(_IN_PARTS, str(values.get("model_type"))):
        return values
    columns = values.get("head_dim") or values["hidden_size"] // heads
    half = int(columns * rotation.get("partial_rotary_factor", 1)) // 2
    return values | {"rope_parameters": rotation | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}}


def make(cls: type[PreTrainedModel], config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model
