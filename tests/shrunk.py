"""Any architecture of transformers, made tiny: a config of its own class, with few layers of few rows and columns."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from tests.tiny import BOS, EOS, MAX_TOKENS, PAD, VOCAB_SIZE

# Names of fields and their values, the first match counts. Widths are multiples of 64 for bitsandbytes on a CPU.
_FIELDS = (
    (r"vocab_size", VOCAB_SIZE),
    (r"pad_token_id", PAD),
    (r"bos_token_id", BOS),
    (r"eos_token_id", EOS),
    (r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|depth", 2),
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
    return {name: _small_value(name, value) for name, value in values.items()}


def _small_value(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return _small(value)
    if isinstance(value, list) and re.fullmatch(r"\w*(layers?|blocks?)_types?", name):
        return value[:2]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return next((small for pattern, small in _FIELDS if re.fullmatch(pattern, name)), value)


def make(cls: type[PreTrainedModel], config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model
