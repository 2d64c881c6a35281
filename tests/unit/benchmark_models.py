"""What the benchmark's tests measure: tiny models quantized the plain way, and the protocol that measures them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, Gemma2Config, Gemma2ForCausalLM

from qbatch.core.domain import BASELINE, DeviceKind, DType, Method, Protocol, ProtocolOptions, Scheme
from qbatch.core.measured.measurement import Measurement
from qbatch.worker.measuring import DEFAULT_EVAL_TEXT
from qbatch.worker.measuring.quality.reference import Reference
from qbatch.worker.methods.implementations import weights_of
from qbatch.worker.models.architecture import model_class
from qbatch.worker.models.load import LoadedModel, load, quiet_libraries
from tests import tiny
from tests.benchmarking import benchmark

TEXT = DEFAULT_EVAL_TEXT.read_text(encoding="utf-8")
NF4 = Scheme(method=Method.NF4)
NF4_DOUBLE = Scheme.of(Method.NF4, double_quant=True)
FP4 = Scheme(method=Method.FP4)
INT8 = Scheme(method=Method.INT8)

# One iteration, no least duration: enough to see that a figure is there and what it counts.
QUICK = replace(
    ProtocolOptions(eval_text_sha256="0" * 64, prompt_tokens=16, new_tokens=4).for_device(DeviceKind.CPU),
    warmup_iterations=0,
    warmup_tokens=None,
    min_iterations=1,
    min_duration_s=0.0,
    eval_window=64,
    eval_stride=64,
    eval_max_windows=3,
    rounds=1,
)


def make_capped(folder: Path) -> Path:
    """A Gemma 2, which caps its logits: its head alone does not give them."""
    tiny.make_tokenizer(folder)
    config = Gemma2Config(
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        final_logit_softcapping=3.0,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def quantized(source: Path, folder: Path, scheme: Scheme) -> Path:
    """The checkpoint of ``source`` that transformers itself writes for ``scheme`` at bfloat16."""
    quiet_libraries(weights_of(NF4.description))
    cls = model_class(AutoConfig.from_pretrained(source))
    model = cls.from_pretrained(source, quantization_config=_config(scheme), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def measured(
    folder: Path,
    scheme: Scheme = BASELINE,
    protocol: Protocol = QUICK,
    text: str = TEXT,
    reference: Reference | None = None,
) -> Measurement:
    """``benchmark`` of ``folder``, freshly loaded on the CPU at bfloat16."""
    return benchmark(
        loaded_on_cpu(folder),
        folder=folder,
        scheme=scheme.resolved(DType.BFLOAT16),
        dtype=DType.BFLOAT16,
        protocol=protocol,
        eval_text=text,
        on_step=lambda _step: None,
        reference=reference,
    )


def loaded_on_cpu(folder: Path, dtype: DType = DType.BFLOAT16) -> LoadedModel:
    return load(folder, dtype=dtype, device="cpu")


def _config(scheme: Scheme) -> BitsAndBytesConfig:
    if scheme.method is Method.INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    four_bit: dict[str, Any] = {
        "bnb_4bit_quant_type": scheme.method.removeprefix("bnb-"),
        "bnb_4bit_use_double_quant": scheme.options["double_quant"],
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    return BitsAndBytesConfig(load_in_4bit=True, **four_bit)
