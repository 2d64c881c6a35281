"""Sources as people bring them: quantized already, with files left beside them, spelt otherwise, or incomplete."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DebertaForMaskedLM, MambaConfig, MambaForCausalLM, PatchTSTForPrediction, PreTrainedModel

from tests.shrunk import make, shrunk_config
from tests.tiny import PAD, VOCAB_SIZE, make_causal, make_encoder, make_tokenizer

WEIGHTS = "model.safetensors"
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4000000000\n"
# What transformers writes into the config of a model that it has quantized with bitsandbytes.
_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}

Tensors = dict[str, torch.Tensor]


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _to_codes(tensors: Tensors, name: str, parts: Mapping[str, torch.Tensor]) -> None:
    del tensors[f"{name}.weight"]
    tensors.update({f"{name}.{part}": value for part, value in parts.items()})


def _each_linear(tensors: Tensors) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if "_proj" in name]


def _nf4(tensors: Tensors) -> None:
    for name in _each_linear(tensors):
        size = tensors[f"{name}.weight"].numel()
        parts = {
            "weight": torch.zeros(size // 2, 1, dtype=torch.uint8),
            "weight.absmax": torch.ones(size // 64),
            "weight.quant_map": torch.zeros(16),
        }
        _to_codes(tensors, name, parts)


def _int4_groups(tensors: Tensors) -> None:
    for name in _each_linear(tensors):
        rows, columns = tensors[f"{name}.weight"].shape
        parts = {
            "qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
            "qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
            "scales": torch.ones(1, rows, dtype=torch.float16),
        }
        _to_codes(tensors, name, parts)


def _fp8(tensors: Tensors) -> None:
    for name in _each_linear(tensors):
        parts = {
            "weight": tensors[f"{name}.weight"].to(torch.float8_e4m3fn),
            "weight_scale_inv": torch.ones(1, 1),
        }
        _to_codes(tensors, name, parts)


# Kind of quantization → (what the config says, what becomes of the tensors, the words that name it)
QUANTIZED: Mapping[str, tuple[dict[str, Any], Callable[[Tensors], None], str]] = {
    "nf4": (_NF4, _nf4, "bitsandbytes 4 bits (nf4)"),
    "gptq": (_GPTQ, _int4_groups, "gptq 4 bits"),
    "awq": (_AWQ, _int4_groups, "awq 4 bits"),
    "fp8": (_FP8, _fp8, "fp8"),
}


def already_quantized(folder: Path, kind: str) -> Path:
    """A Llama that others have quantized. ``kind`` is one of QUANTIZED."""
    settings, pack, _ = QUANTIZED[kind]
    make_causal(folder, dtype="bfloat16")
    edit_tensors(folder, pack)
    edit_config(folder, quantization_config=settings)
    return folder


def merged_qlora(folder: Path) -> Path:
    """A Llama with 16-bit weights, whose config still speaks of the 4 bits in which it was trained."""
    make_causal(folder, dtype="bfloat16")
    edit_config(folder, quantization_config=_NF4)
    return folder


def adapter_config(folder: Path, base: str) -> None:
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": 8, "lora_alpha": 64}
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"target_modules": ["q_proj"]}))


def adapter_beside_weights(folder: Path) -> Path:
    """A Llama with the adapter that was merged into it."""
    make_causal(folder, dtype="bfloat16")
    adapter_config(folder, str(folder))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(8, 128), f"{name}.lora_B.weight": torch.ones(128, 8)},
        folder / "adapter_model.safetensors",
    )
    return folder


def adapter_alone(folder: Path, *, with_config: bool) -> Path:
    """An adapter, and as some trainers leave it, the config of its base."""
    make_causal(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    adapter_config(folder, "org/base")
    if not with_config:
        (folder / "config.json").unlink()
    return folder


def old_spelling(folder: Path, name: str, module: str) -> Path:
    """A model whose config spells its class as the repository's own code does, which must not run."""
    arch = "llama" if "llama" in name.lower() else "bloom"
    make_causal(folder, arch, dtype="bfloat16")
    auto_map = {"AutoConfig": f"configuration_{module}.Config", "AutoModelForCausalLM": f"modeling_{module}.{name}"}
    edit_config(folder, architectures=[name], auto_map=auto_map)
    for kind in ("configuration", "modeling"):
        (folder / f"{kind}_{module}.py").write_text("raise SystemExit('own code ran')\n")
    return folder


def old_sentence_transformer(folder: Path) -> Path:
    """A folder whose model lies in another one inside of it."""
    make_encoder(folder / "0_Transformer", dtype="bfloat16")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{path[2:]}"}
        for number, path in enumerate(("1_Pooling", "0_Transformer"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules[::-1]))
    return folder


def clone_without_lfs(folder: Path, name: str) -> Path:
    """A Llama of which one file is only a pointer."""
    make_causal(folder, dtype="bfloat16")
    (folder / name).write_text(LFS_POINTER)
    return folder


def partitioned(folder: Path, name: str) -> Path:
    """A Llama with a weight that a trainer kept elsewhere while it saved the others."""
    make_causal(folder, dtype="bfloat16")
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.empty(0, dtype=torch.bfloat16)}))
    return folder


_TEKKEN = json.dumps({"config": {}, "vocab": [], "special_tokens": []})
_TIKTOKEN = "".join(f"{base64.b64encode(bytes([rank])).decode()} {rank}\n" for rank in range(256))
_TOKENIZER_CONFIG = {"tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})}
_SEEN_ONLY = "its only tokenizer is {}, which qbatch cannot read"
_EMPTY = "its tokenizer_config.json comes without a vocabulary"
# What there is of a tokenizer that transformers reads only with another library, or not at all → why it is not read.
UNREADABLE_TOKENIZERS: Mapping[str, tuple[Mapping[str, str], str]] = {
    "tekken": ({"tekken.json": _TEKKEN}, _SEEN_ONLY.format("tekken.json")),
    "tiktoken": ({"tiktoken.model": _TIKTOKEN}, _SEEN_ONLY.format("tiktoken.model")),
    "qwen": ({"qwen.tiktoken": _TIKTOKEN}, _SEEN_ONLY.format("qwen.tiktoken")),
    "tiktoken, configured": (
        {"tiktoken.model": _TIKTOKEN, **_TOKENIZER_CONFIG},
        _SEEN_ONLY.format("tiktoken.model"),
    ),
    "tiktoken, named as SentencePiece": ({"tokenizer.model": _TIKTOKEN}, _SEEN_ONLY.format("tokenizer.model")),
    "no vocabulary": (_TOKENIZER_CONFIG, _EMPTY),
    "no vocabulary, empty": ({"tokenizer_config.json": json.dumps({"tokenizer_class": "LlamaTokenizer"})}, _EMPTY),
    "nothing": ({}, "it has no tokenizer"),
}


def unreadable_tokenizer(folder: Path, kind: str) -> Path:
    """A Llama with one of UNREADABLE_TOKENIZERS."""
    make_causal(folder, dtype="bfloat16")
    for path in folder.glob("*token*"):
        path.unlink()
    for name, content in UNREADABLE_TOKENIZERS[kind][0].items():
        (folder / name).write_text(content)
    return folder


def reads_its_weights_itself(folder: Path) -> Path:
    """A Mamba, whose forward pass multiplies with the weight of ``dt_proj`` and does not call that layer."""
    config = MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=128, num_hidden_layers=2, state_size=16, time_step_rank=64, pad_token_id=PAD
    )
    return save(folder, make(MambaForCausalLM, config))


def cannot_run_in_bfloat16(folder: Path) -> Path:
    """A DeBERTa, whose forward pass mixes float32 with the dtype of its weights."""
    return save(folder, make(DebertaForMaskedLM, shrunk_config("deberta")))


# Models that read no text, or not text alone → their class.
SEES_OR_HEARS = {
    "whisper": "WhisperForConditionalGeneration",
    "wav2vec2": "Wav2Vec2ForCTC",
    "audio-spectrogram-transformer": "ASTForAudioClassification",
    "vit": "ViTForImageClassification",
    "pixtral": "PixtralVisionModel",
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
}


def reads_time_series(folder: Path) -> Path:
    make(PatchTSTForPrediction, shrunk_config("patchtst")).to(torch.bfloat16).save_pretrained(folder)
    return folder


def sees_or_hears(folder: Path, model_type: str) -> Path:
    cls: type[PreTrainedModel] = getattr(transformers, SEES_OR_HEARS[model_type])
    make(cls, shrunk_config(model_type)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def save(folder: Path, model: PreTrainedModel) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    return folder
