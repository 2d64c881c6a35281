"""An adapter's files, as PEFT's ``save_pretrained`` lays them out: a config and one file of factors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qbatch.core.adapter_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.recovering.low_rank_factors import LowRankFactors

# PEFT wraps a model for its task. For others than this one it would also train a head, which stays as it is, or rely on
# functions of transformers that some versions lack; without a task it wraps any model.
_TASK_TYPES = {ModelKind.CAUSAL_LM: "CAUSAL_LM"}


def write_adapter(
    folder: Path, factors: Mapping[str, LowRankFactors], *, model: Any, kind: ModelKind, base: str, rank: int
) -> None:
    """Write the adapter of ``model`` with ``factors`` by layer, in the dtype that they have, to the existing
    ``folder``. ``base`` is the name of the checkpoint that it belongs to. Raises OSError."""
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": value.cpu().contiguous()
        for name, pair in factors.items()
        for letter, value in (("A", pair.down), ("B", pair.up))
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": target_modules(model, factors.keys()),
        "task_type": _TASK_TYPES.get(kind),
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def target_modules(model: Any, layers: Set[str]) -> list[str] | str:
    """How PEFT finds exactly these ``layers``: by the last parts of their names if no other module has such a name,
    else by an expression that lists them."""
    last = {name.rpartition(".")[2] for name in layers}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    if named == set(layers):
        return sorted(last)
    return "|".join(re.escape(name) for name in sorted(layers))


def as_stored(factors: LowRankFactors, dtype: torch.dtype) -> LowRankFactors:
    """The factors on the CPU in the dtype of the file."""
    return LowRankFactors(up=factors.up.to("cpu", dtype), down=factors.down.to("cpu", dtype))
