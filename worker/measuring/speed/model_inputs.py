"""Inputs for a forward pass of any model: token ids for one that reads text, noise for one that sees or hears."""

from __future__ import annotations

from typing import Any

import torch

from qbatch.core.errors import Unsupported, one_line
from qbatch.worker.machine.device_faults import find_fault
from qbatch.worker.measuring.speed.noise_forms import Inputs, hears_along, noise_forms


def reads_text(model: Any) -> bool:
    """Whether text alone is an input of ``model``."""
    return model.main_input_name == "input_ids" and not _compares_with_text(model) and not hears_along(model)


def _compares_with_text(model: Any) -> bool:
    """Whether ``model`` embeds text and something else, as CLIP and CLAP do."""
    scales = (getattr(model, name, None) for name in ("logit_scale", "logit_scale_a"))
    # Cohere's language models have a plain number of that name.
    return any(isinstance(scale, torch.nn.Parameter) for scale in scales)


def text_inputs(model: Any, ids: torch.Tensor) -> Inputs:
    """``ids`` [batch, length] as the inputs of a forward pass."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if type(model).__name__.endswith("ForMultipleChoice"):
        # [batch, choices, length]
        return {name: tensor[:, None] for name, tensor in inputs.items()}
    return inputs


def one_token(model: Any) -> Inputs:
    return text_inputs(model, torch.ones(1, 1, dtype=torch.long, device=model.device))


def noise_inputs(model: Any, batch_size: int) -> Inputs:
    """Noise, for a model that does not read text alone: the first of the usual forms with which a forward pass runs.

    Raises Unsupported if none does, and CudaOom, HostOom or DeviceError for faults of the device.
    """
    said = None
    for inputs in noise_forms(model, batch_size, compares_with_text=_compares_with_text(model)):
        try:
            with torch.inference_mode():
                model(**inputs)
        except Exception as error:
            if (fault := find_fault(error)) is not None:
                raise fault.kind(one_line(fault.error)) from error
            # Another form may be the right one.
            # Its frames hold what was computed, which would count as memory of the form that runs.
            said = said or error.with_traceback(None)
            continue
        return inputs
    takes = model.main_input_name
    why = f": {str(said).strip().splitlines()[0]}" if said is not None and str(said).strip() else ""
    raise Unsupported(f"no noise of the usual forms runs as input of {type(model).__name__} ({takes}){why}")


def describe_inputs(inputs: Inputs) -> str:
    """``pixel_values [1, 3, 224, 224]``"""
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
