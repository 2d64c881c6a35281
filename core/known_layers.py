"""Which tensors of common architectures belong to linear layers, by their names: transformers' classes would tell, and
take seconds to import. ``tests/unit/test_output_size.py`` compares each entry with what is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownLayers:
    """The tensors of one architecture. ``linear``, ``others`` and ``dropped`` match whole names: weights that methods
    quantize, tensors that stay as they are, and those that transformers does not load. ``prefix`` begins the names of
    all but the ``head``; a base model's checkpoint leaves it out. ``ties`` says whether the head is tied to the
    embeddings where the config does not. ``is_transposed``: linear weights are [in, out] in the source, and not of
    ``nn.Linear``."""

    linear: re.Pattern[str]
    others: re.Pattern[str]
    dropped: re.Pattern[str] = re.compile(r"(?!)")
    prefix: str = ""
    head: str | None = "lm_head.weight"
    ties: bool = False
    is_transposed: bool = False


_ROTARY = re.compile(r".*\.rotary_emb\.inv_freq")
_MASKS = re.compile(r".*\.(attn|attention)\.(bias|masked_bias)|.*\.rotary_emb\.inv_freq")

_LLAMA_LINEAR = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q|k|v|o|qkv)_proj|mlp\.(gate|up|down|gate_up)_proj)\.weight"
)
_LLAMA_OTHERS = re.compile(
    r"model\.(embed_tokens|norm)\.weight|lm_head\.weight"
    r"|model\.layers\.\d+\.(\w+_layernorm|self_attn\.[qk]_norm)\.weight"
    r"|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.bias"
)
_LLAMA = KnownLayers(linear=_LLAMA_LINEAR, others=_LLAMA_OTHERS, dropped=_ROTARY, prefix="model.")
_GEMMA = KnownLayers(linear=_LLAMA_LINEAR, others=_LLAMA_OTHERS, dropped=_ROTARY, prefix="model.", ties=True)

_BERT_LINEAR = (
    r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.)?output\.dense|intermediate\.dense)\.weight"
    r"|pooler\.dense\.weight"
)
_BERT_OTHERS = (
    r"embeddings\.(word|position|token_type)_embeddings\.weight|(embeddings|encoder\.layer\.\d+\.(attention\.)?output)"
    r"\.LayerNorm\.(weight|bias)|encoder\.layer\.\d+\.([\w.]*)\.bias|pooler\.dense\.bias"
)

KNOWN: Mapping[str, KnownLayers] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Phi3ForCausalLM": _LLAMA,
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA,
    "PhiForCausalLM": KnownLayers(
        linear=re.compile(r"model\.layers\.\d+\.(self_attn\.((q|k|v)_proj|dense)|mlp\.fc[12])\.weight"),
        others=re.compile(
            r"model\.embed_tokens\.weight|model\.final_layernorm\.(weight|bias)|lm_head\.(weight|bias)"
            r"|model\.layers\.\d+\.(input_layernorm\.(weight|bias)|(self_attn|mlp)\.\w+\.bias)"
        ),
        dropped=_ROTARY,
        prefix="model.",
    ),
    "GPTNeoXForCausalLM": KnownLayers(
        linear=re.compile(
            r"gpt_neox\.layers\.\d+\.(attention\.(query_key_value|dense)|mlp\.dense_(h_to_4h|4h_to_h))\.weight"
        ),
        others=re.compile(
            r"gpt_neox\.embed_in\.weight|gpt_neox\.final_layer_norm\.(weight|bias)|embed_out\.weight"
            r"|gpt_neox\.layers\.\d+\.(\w+_layernorm\.(weight|bias)|(attention|mlp)\.\w+\.bias)"
        ),
        dropped=_MASKS,
        prefix="gpt_neox.",
        head="embed_out.weight",
    ),
    "BloomForCausalLM": KnownLayers(
        linear=re.compile(
            r"transformer\.h\.\d+\.(self_attention\.(query_key_value|dense)|mlp\.dense_(h_to_4h|4h_to_h))\.weight"
        ),
        others=re.compile(
            r"transformer\.word_embeddings\.weight|transformer\.(word_embeddings_layernorm|ln_f)\.(weight|bias)"
            r"|transformer\.h\.\d+\.(\w+_layernorm\.(weight|bias)|(self_attention|mlp)\.\w+\.bias)|lm_head\.weight"
        ),
        prefix="transformer.",
        ties=True,
    ),
    "GPT2LMHeadModel": KnownLayers(
        linear=re.compile(r"transformer\.h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight"),
        others=re.compile(
            r"transformer\.w[tp]e\.weight|transformer\.(ln_f|h\.\d+\.ln_[12])\.(weight|bias)|lm_head\.weight"
            r"|transformer\.h\.\d+\.(attn|mlp)\.c_\w+\.bias"
        ),
        dropped=_MASKS,
        prefix="transformer.",
        ties=True,
        is_transposed=True,
    ),
    "OPTForCausalLM": KnownLayers(
        linear=re.compile(
            r"model\.decoder\.(layers\.\d+\.(self_attn\.(q|k|v|out)_proj|fc[12])|project_(in|out))\.weight"
        ),
        others=re.compile(
            r"model\.decoder\.embed_(tokens|positions)\.weight|model\.decoder\.final_layer_norm\.(weight|bias)"
            r"|model\.decoder\.layers\.\d+\.(\w+_layer_norm\.(weight|bias)|(self_attn\.\w+|fc[12])\.bias)|lm_head\.weight"
        ),
        prefix="model.",
        ties=True,
    ),
    "BertModel": KnownLayers(linear=re.compile(_BERT_LINEAR), others=re.compile(_BERT_OTHERS), head=None),
    "BertForSequenceClassification": KnownLayers(
        linear=re.compile(rf"bert\.({_BERT_LINEAR})|classifier\.weight"),
        others=re.compile(rf"bert\.({_BERT_OTHERS})|classifier\.bias"),
        head=None,
    ),
}
