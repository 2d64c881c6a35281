"""Inputs for a forward pass of any model: token ids for one that reads text, noise for one that sees or hears."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qbatch.core.errors import Unsupported

Inputs = dict[str, torch.Tensor]

_SEED = 0
_AUDIO_SAMPLES = 16_000
_AUDIO_FRAMES = 100
_IMAGE_SIZE = 224
_TOKENS = 8
_SEES_OR_HEARS = ("pixel_values", "input_features", "input_values")


def reads_text(model: Any) -> bool:
    """Whether text alone is an input of ``model``."""
    return model.main_input_name == "input_ids" and not _compares_with_text(model)


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

    Raises Unsupported if none does.
    """
    said = None
    for inputs in _usual_forms(model, batch_size):
        try:
            with torch.inference_mode():
                model(**inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # another form may be the right one
            said = said or error
            continue
        return inputs
    takes = model.main_input_name
    why = f": {str(said).strip().splitlines()[0]}" if said is not None and str(said).strip() else ""
    raise Unsupported(f"no noise of the usual forms runs as input of {type(model).__name__} ({takes}){why}")


def describe_inputs(inputs: Inputs) -> str:
    """``pixel_values [1, 3, 224, 224]``"""
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())


def _usual_forms(model: Any, batch_size: int) -> Iterator[Inputs]:
    generator = torch.Generator().manual_seed(_SEED)
    for name in _SEES_OR_HEARS:
        if name != model.main_input_name and not (_compares_with_text(model) and name in _arguments(model)):
            continue
        for shape in _SHAPES[name](model.config):
            values = torch.randn((batch_size, *shape), generator=generator)
            noise = {name: values.to(device=model.device, dtype=model.dtype)}
            yield {**noise, **_tokens(model, batch_size)}


def _tokens(model: Any, batch_size: int) -> Inputs:
    """What is read besides: a text to compare with, or the beginning of an answer."""
    ids = torch.ones(batch_size, _TOKENS, dtype=torch.long, device=model.device)
    if _compares_with_text(model):
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder and "decoder_input_ids" in _arguments(model):
        return {"decoder_input_ids": ids[:, :1]}
    return {}


def _arguments(model: Any) -> set[str]:
    names: set[str] = set(type(model).forward.__code__.co_varnames)
    wrapped = getattr(type(model).forward, "__wrapped__", None)
    return names if wrapped is None else names | set(wrapped.__code__.co_varnames)


def _images(config: Any) -> Iterator[tuple[int, ...]]:
    """[channels, height, width], for a video with frames before or after the channels."""
    seen = getattr(config, "vision_config", None) or config
    size = getattr(seen, "image_size", None) or getattr(seen, "input_size", None) or _IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
    channels = getattr(seen, "num_channels", None) or getattr(seen, "in_channels", None) or 3
    frames = getattr(seen, "num_frames", None)
    if isinstance(frames, int):
        yield frames, channels, height, width
        yield channels, frames, height, width
    yield channels, height, width


def _features(config: Any) -> Iterator[tuple[int, ...]]:
    """[bands, frames] for Whisper and its relatives, [frames, bands] for others, [1, frames, bands] for CLAP."""
    heard = getattr(config, "audio_config", None) or config
    bands = next((n for name in _BANDS if isinstance(n := getattr(heard, name, None), int)), 80)
    positions = getattr(heard, "max_source_positions", None)
    frames = 2 * positions if isinstance(positions, int) else _AUDIO_FRAMES
    yield bands, frames
    yield _AUDIO_FRAMES, bands
    yield 1, 10 * _AUDIO_FRAMES + 1, bands


_BANDS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")


def _waves(config: Any) -> Iterator[tuple[int, ...]]:
    """[samples], [1, samples] for codecs, [frames, bands] for spectrograms."""
    yield (_AUDIO_SAMPLES,)
    yield 1, _AUDIO_SAMPLES
    frames, bands = getattr(config, "max_length", None), getattr(config, "num_mel_bins", None)
    if isinstance(frames, int) and isinstance(bands, int):
        yield frames, bands


_SHAPES = {"pixel_values": _images, "input_features": _features, "input_values": _waves}
