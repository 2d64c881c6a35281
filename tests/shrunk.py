"""Any architecture of transformers, made tiny: a config of its own class, with few layers of few rows and columns."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from tests.tiny import BOS, EOS, MAX_TOKENS, PAD, VOCAB_SIZE

_DEPTH = 2
_LAYERS = r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|depth"
# Types of language models whose rotary embedding has parts for time, height and width.
_IN_PARTS = r"qwen2(_5)?_vl|glm4v|glm46v|glmga|glm_ocr|paddleocr_vl"
_WINDOWS_IN_ROW = 10
# What a default config lacks, without which its model does not run.
_MISSING = {
    "class_thresholds": [0.5, 0.5],
    "class_order": [0, 1],
    "projector_scale_factors": [1.0],
    "num_feature_levels": 1,
}
# Names of fields and their values, the first match counts. Widths are multiples of 64 for bitsandbytes on a CPU.
_FIELDS = (
    (r"vocab_size", VOCAB_SIZE),
    (r"pad_token_id", PAD),
    (r"bos_token_id", BOS),
    (r"eos_token_id", EOS),
    (_LAYERS, _DEPTH),
    (r"attn_layer_period", _DEPTH),
    (r"attn_layer_offset", 1),
    (r"num_key_value_heads", 4),
    (r"(\w+_)?(attention_)?heads?|n_head|num_attention_heads", 4),
    (r"d_kv|head_dim|qk_rope_head_dim|qk_nope_head_dim|v_head_dim", 32),
    (r"(q|kv|o)_lora_rank|qk_head_dim", 64),
    (r"n_routed_experts|num_(local_)?experts", 4),
    (r"num_experts_per_tok|moe_topk|top_k_experts", 2),
    (r"n_groups?|topk_group|first_k_dense_replace|n_shared_experts", 1),
    (r"reassemble_hidden_size|word_embed_proj_dim", 128),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|projection_dim|projection_size|output_dim", 128),
    (r"(\w+_)?(intermediate_size|ffn_dim|inner_dim|d_ff)", 256),
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
    if "num_windows" in values and values["image_size"] % (values["patch_size"] * values["num_windows"]):
        small["image_size"] = _WINDOWS_IN_ROW * values["patch_size"] * values["num_windows"]
    return _with_fitting_rotation(small | _outputs_of_layers(values, depths))


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
    return next((small for pattern, small in _FIELDS if re.fullmatch(pattern, name)), value)


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
