"""Tiny real models on disk: every architecture that a test may ask for, with a tokenizer that fits it.

Each call takes well under a second. All widths are multiples of 64, since bitsandbytes' CPU forward needs that of
in_features. The same arguments give the same bytes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 512
MAX_TOKENS = 512
PAD, BOS, EOS, MASK = 0, 1, 2, 3
_SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<mask>"]
# No byte is unknown; naming an unk keeps Qwen2's tokenizer from adding a token that the model has no row for.
_ROLES = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
    "unk_token": "</s>",
}
_CHAT_TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"

_IDS = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_TOKENS,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}

# arch → (name of the class that loads it, its config's own arguments)
_CAUSAL: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "mistral": ("MistralForCausalLM", _GROUPED),
    "mixtral": ("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("GemmaForCausalLM", _GROUPED | {"head_dim": 32}),
    "phi": ("PhiForCausalLM", _SHAPE),
    "gpt_neox": ("GPTNeoXForCausalLM", _SHAPE),
    "bloom": ("BloomForCausalLM", {"hidden_size": 128, "n_layer": 2, "n_head": 4}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": MAX_TOKENS}),
    "opt": (
        "OPTForCausalLM",
        {key: value for key, value in _SHAPE.items() if key != "intermediate_size"}
        | {"ffn_dim": 256, "word_embed_proj_dim": 128},
    ),
}
_SEQ2SEQ: Mapping[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD},
    ),
    "bart": (
        "BartForConditionalGeneration",
        {
            "d_model": 128,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 256,
            "decoder_ffn_dim": 256,
            "max_position_embeddings": MAX_TOKENS,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": EOS,
        },
    ),
}
_BERT_HEADS: Mapping[str | None, str] = {
    None: "BertModel",
    "masked-lm": "BertForMaskedLM",
    "classification": "BertForSequenceClassification",
}

# Of these, transformers sets the padding row of the loaded embedding to zero.
_OVERWRITTEN: Mapping[str, tuple[str, dict[str, Any]]] = {
    "youtu": (
        "YoutuForCausalLM",
        _SHAPE
        | {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32},
    ),
    "funnel": ("FunnelForMaskedLM", {"d_model": 128, "n_head": 4, "d_head": 32, "d_inner": 256, "block_sizes": [1, 1]}),
}

CAUSAL_ARCHS = tuple(_CAUSAL)
SEQ2SEQ_ARCHS = tuple(_SEQ2SEQ)
OVERWRITTEN_ARCHS = tuple(_OVERWRITTEN)


def make_causal(
    folder: Path,
    arch: str = "llama",
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "50GB",
    **config: Any,
) -> Path:
    """A causal LM of ``arch`` (one of CAUSAL_ARCHS) in ``folder``; ``config`` overrides the config's fields.

    Llama's tokenizer prepends BOS and has a chat template; the others' do neither.
    """
    is_llama = arch == "llama"
    make_tokenizer(folder, prefix_bos=is_llama, chat_template=_CHAT_TEMPLATE if is_llama else None)
    return _make_model(folder, *_CAUSAL[arch], dtype=dtype, seed=seed, max_shard_size=max_shard_size, overrides=config)


def make_seq2seq(
    folder: Path,
    arch: str = "t5",
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "50GB",
    **config: Any,
) -> Path:
    """An encoder-decoder of ``arch`` (one of SEQ2SEQ_ARCHS) in ``folder``; its tokenizer appends EOS."""
    make_tokenizer(folder, suffix_eos=True)
    return _make_model(folder, *_SEQ2SEQ[arch], dtype=dtype, seed=seed, max_shard_size=max_shard_size, overrides=config)


def make_encoder(
    folder: Path, head: str | None = None, *, dtype: str = "float32", seed: int = 0, **config: Any
) -> Path:
    """A BERT in ``folder``: its body alone, or with a "masked-lm" or "classification" head (3 labels)."""
    make_tokenizer(folder, prefix_bos=True, suffix_eos=True)
    fields = _SHAPE | ({"num_labels": 3} if head == "classification" else {})
    return _make_model(
        folder, _BERT_HEADS[head], fields, dtype=dtype, seed=seed, max_shard_size="50GB", overrides=config
    )


def make_fused_qkv(folder: Path, *, dtype: str = "float32", seed: int = 0) -> Path:
    """A Nomic-BERT in ``folder``, without a tokenizer: its weights for query, key and value, each quantized on its own,
    are one tensor in the file."""
    return _make_model(
        folder,
        "NomicBertModel",
        _SHAPE,
        dtype=dtype,
        seed=seed,
        max_shard_size="50GB",
        overrides={},
    )


def make_speech(folder: Path, *, dtype: str = "float32", seed: int = 0) -> Path:
    """A SpeechT5 in ``folder``, without a tokenizer: its ``generate`` is its own, not transformers' for all."""
    fields = {
        "hidden_size": 128,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256,
        "speech_decoder_prenet_units": 64,
        "speech_decoder_postnet_units": 64,
    }
    return _make_model(
        folder,
        "SpeechT5ForTextToSpeech",
        fields,
        dtype=dtype,
        seed=seed,
        max_shard_size="50GB",
        overrides={},
    )


def make_llama4(folder: Path, *, experts: bool = True, dtype: str = "float32", seed: int = 0) -> Path:
    """A Llama 4 for text in ``folder``, without a tokenizer; of its two layers the second has ``experts``."""
    fields = _GROUPED | {"head_dim": 32, "intermediate_size_mlp": 256, "num_local_experts": 2}
    return _make_model(
        folder,
        "Llama4ForCausalLM",
        fields,
        dtype=dtype,
        seed=seed,
        max_shard_size="50GB",
        overrides={"moe_layers": [1] if experts else []},
    )


def make_overwritten(folder: Path, arch: str, *, dtype: str = "float32", seed: int = 0) -> Path:
    """A model of ``arch`` (one of OVERWRITTEN_ARCHS) in ``folder``, without a tokenizer. The padding row of its
    embedding is not zero."""
    return _make_model(folder, *_OVERWRITTEN[arch], dtype=dtype, seed=seed, max_shard_size="50GB", overrides={})


def make_tokenizer(
    folder: Path, *, prefix_bos: bool = False, suffix_eos: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE tokens, trained on a module's source and saved in ``folder``."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train_tokenizer(prefix_bos=prefix_bos, suffix_eos=suffix_eos),
        **_ROLES,
        model_max_length=MAX_TOKENS,
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def _train_tokenizer(*, prefix_bos: bool, suffix_eos: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(textwrap.__file__).read_text(encoding="utf-8")], trainer)
    before, after = "<s> " if prefix_bos else "", " </s>" if suffix_eos else ""
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{after}",
            pair=f"{before}$A{after} $B:1{after and ' </s>:1'}",
            special_tokens=[("<s>", BOS), ("</s>", EOS)],
        )
    return tokenizer


def _make_model(
    folder: Path,
    class_name: str,
    fields: Mapping[str, Any],
    *,
    dtype: str,
    seed: int,
    max_shard_size: str,
    overrides: Mapping[str, Any],
) -> Path:
    cls: type[PreTrainedModel] = getattr(transformers, class_name)
    config: PretrainedConfig = cls.config_class(**{**_IDS, **fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
        _disturb(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@torch.no_grad()
def _disturb(model: PreTrainedModel) -> None:
    """Move every parameter off its initial value: a mixed-up bias or norm would not show while all are 0 or 1."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
