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
    (r"head_dim|qk_rope_head_dim|qk_nope_head_dim|v_head_dim", 32),
    (r"(q|kv|o)_lora_rank|qk_head_dim", 64),
    (r"n_routed_experts|num_(local_)?experts", 4),
    (r"num_experts_per_tok|moe_topk|top_k_experts", 2),
    (r"n_group|topk_group|first_k_dense_replace|n_shared_experts", 1),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|projection_dim|projection_size|output_dim", 128),
    (r"(\w+_)?(intermediate_size|ffn_dim|inner_dim|d_ff)", 256),
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
    if depths and "out_features" in values:  # a backbone, which gives the outputs of layers that are gone
        small |= {"out_features": None, "out_indices": None}
    return _with_fitting_rotation(small)


def _small_value(name: str, value: Any, depths: set[Any]) -> Any:
    if name == "image_token_index" and value is None:
        return EOS
    if name == "per_layer_config" and value:
        return {layer: _small(fields) for layer, fields in value.items() if int(layer) < _DEPTH}
    if isinstance(value, dict):
        return _small(value)
    if name == "layers_block_type" and value:  # Zamba ties the second layer of the other kind to the first one
        return value[:_DEPTH]
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
