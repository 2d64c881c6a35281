"""The usual forms of what models see and hear, filled with noise, and of what they read besides."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]
Shape = tuple[int, ...]

_SEED = 0
_AUDIO_SAMPLES = 16_000
_AUDIO_FRAMES = 100
_VIDEO_FRAMES = 16
_FRAMES_IN_PROMPT = 4
_IMAGE_SIZE = 224
_PATCHES = 256
_TOKENS = 8
_BANDS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")


def hears_along(model: Any) -> bool:
    """Whether ``model`` hears a piece of sound with every token that it reads, as Voxtral Realtime does."""
    return {"input_ids", "input_features", "encoder_inputs_embeds"} <= _arguments(model)


def noise_forms(model: Any, batch_size: int, *, compares_with_text: bool) -> Iterator[Inputs]:
    """Inputs that ``model`` may take, likely ones first. ``compares_with_text``: it embeds a text besides."""
    generator = torch.Generator().manual_seed(_SEED)
    arguments = _arguments(model)
    if hears_along(model):
        yield _heard_along(model, batch_size, generator)
    for name, shapes in _SHAPES.items():
        if name != model.main_input_name and not (compares_with_text and name in arguments):
            continue
        for shape in shapes(model.config):
            values = torch.randn((batch_size, *shape), generator=generator)
            noise = {name: values.to(device=model.device, dtype=model.dtype)} | _whereabouts(model, values, arguments)
            if name == "state":
                noise |= _cameras(model, batch_size, generator)
            if name == "flattened_patches":
                noise[name][..., :2] = 1  # the row and the column of each patch
            for text in _texts(model, values, arguments, compares_with_text=compares_with_text):
                yield noise | text


def _heard_along(model: Any, batch_size: int, generator: torch.Generator) -> Inputs:
    """[bands, frames], of which each token hears as many as the encoder's convolution and the projector make one."""
    config = model.config
    frames = 2 * config.downsample_factor * _TOKENS
    heard = torch.randn((batch_size, config.audio_config.num_mel_bins, frames), generator=generator)
    return {
        "input_ids": torch.ones(batch_size, _TOKENS, dtype=torch.long, device=model.device),
        "input_features": heard.to(device=model.device, dtype=model.dtype),
    }


def _cameras(model: Any, batch_size: int, generator: torch.Generator) -> Inputs:
    """What one camera of a robot sees, and its places in front of what the robot is told to do."""
    told = model.config.vlm_config
    channels, height, width = _image(told.vision_config)
    places = height * width // told.vision_config.patch_size**2
    token = told.image_token_id
    ids = torch.tensor([token] * places + [_not(token)] * _TOKENS, device=model.device).expand(batch_size, -1)
    seen = torch.randn((batch_size, 1, channels, height, width), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": seen.to(device=model.device, dtype=model.dtype),
        "pixel_attention_mask": torch.ones(batch_size, 1, dtype=torch.bool, device=model.device),
    }


def _not(token: int) -> int:
    return 1 if token != 1 else 0


def _texts(model: Any, pixels: torch.Tensor, arguments: set[str], *, compares_with_text: bool) -> Iterator[Inputs]:
    """What is read besides: a text to compare with, the beginning of an answer, or a prompt about a picture."""
    ids = torch.ones(pixels.shape[0], _TOKENS, dtype=torch.long, device=model.device)
    if compares_with_text:
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return
    answers = model.config.is_encoder_decoder and "decoder_input_ids" in arguments
    yield {"decoder_input_ids": ids[:, :1]} if answers else {}
    if model.main_input_name.startswith("pixel_values") and "input_ids" in arguments:
        yield _prompt(model, ids, arguments, frames=pixels.shape[1] if pixels.dim() == 5 else 1)


def _prompt(model: Any, ids: torch.Tensor, arguments: set[str], *, frames: int) -> Inputs:
    """A text behind the places of the picture's embeddings, or of those of each frame, as BLIP-2, InstructBLIP and
    Kosmos-2 read it."""
    config = model.config
    places = frames * (getattr(config, "num_query_tokens", None) or getattr(config, "latent_query_num", None) or 0)
    tokens = (getattr(config, name, None) for name in ("video_token_index", "image_token_index"))
    token = next(filter(None, tokens), 1)
    picture = ids[:, :1].expand(-1, places) * token
    whole = torch.cat([picture, ids if places == 0 else ids * _not(token)], dim=1)
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    if "image_embeds_position_mask" in arguments:
        inputs["image_embeds_position_mask"] = torch.arange(whole.shape[1], device=ids.device).expand_as(whole) < places
    if "qformer_input_ids" in arguments:
        inputs["qformer_input_ids"] = ids
    if getattr(getattr(config, "text_config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :1]
    return inputs


def _whereabouts(model: Any, values: torch.Tensor, arguments: set[str]) -> Inputs:
    """Where patches stand in their picture, for models that take pictures of any shape."""
    if values.dim() != 3 or "spatial_shapes" not in arguments:
        return {}
    count, side = values.shape[1], math.isqrt(values.shape[1])
    return {
        "pixel_attention_mask": torch.ones(values.shape[0], count, dtype=torch.long, device=model.device),
        "spatial_shapes": torch.tensor([[side, side]] * values.shape[0], device=model.device),
    }


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def _images(config: Any) -> Iterator[Shape]:
    """[channels, height, width], for a video with frames before or after the channels, [patches, values of one]."""
    seen = getattr(config, "vision_config", None) or config
    channels, height, width = _image(seen)
    if hasattr(config, "video_token_index"):
        yield _FRAMES_IN_PROMPT, channels, height, width
    frames = getattr(seen, "num_frames", None)
    if isinstance(frames, int):
        yield frames, channels, height, width
        yield channels, frames, height, width
    yield channels, height, width
    if isinstance(patch := getattr(seen, "patch_size", None), int):
        yield math.isqrt(getattr(seen, "num_patches", None) or _PATCHES) ** 2, channels * patch**2


def _videos(config: Any) -> Iterator[Shape]:
    """[frames, channels, height, width]"""
    seen = getattr(config, "vision_config", None) or config
    frames = getattr(seen, "num_frames", None) or getattr(seen, "frames_per_clip", None) or _VIDEO_FRAMES
    yield (min(frames, _VIDEO_FRAMES), *_image(seen))


def _image(seen: Any) -> tuple[int, int, int]:
    """[channels, height, width]; for DepthPro so large that the smallest of its scaled images has a whole patch."""
    sizes = (getattr(seen, name, None) for name in ("image_size", "input_size", "crop_size"))
    of_backbone = getattr(getattr(seen, "backbone_config", None), "image_size", None)
    size = next(filter(None, [*sizes, of_backbone]), _IMAGE_SIZE)
    if ratios := getattr(seen, "scaled_images_ratios", None):
        size = int(seen.patch_size / min(ratios))
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
    channels = getattr(seen, "num_channels", None) or getattr(seen, "in_channels", None) or 3
    return channels, height, width


def _states(config: Any) -> Iterator[Shape]:
    """[values], where the joints of a robot are"""
    yield (config.max_state_dim,)


def _patches(config: Any) -> Iterator[Shape]:
    """[patches, row, column and values of one]"""
    seen = getattr(config, "vision_config", None) or config
    yield _PATCHES, 2 + (getattr(seen, "patch_embed_hidden_size", None) or 3 * 16**2)


def _features(config: Any) -> Iterator[Shape]:
    """[bands, frames] for Whisper and its relatives, [frames, bands] for others, some of which take several frames as
    one, [1, frames, bands] for CLAP."""
    heard = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    bands = next((n for name in _BANDS if isinstance(n := getattr(heard, name, None), int)), 80)
    positions = getattr(heard, "max_source_positions", None)
    frames = 2 * positions if isinstance(positions, int) else _AUDIO_FRAMES
    yield bands, frames
    for together in (1, 2, 4):
        yield _AUDIO_FRAMES, together * bands
    yield 1, 10 * _AUDIO_FRAMES + 1, bands


def _waves(config: Any) -> Iterator[Shape]:
    """[samples], [1, samples] for codecs, [frames, bands] for spectrograms."""
    yield (_AUDIO_SAMPLES,)
    yield 1, _AUDIO_SAMPLES
    frames, bands = getattr(config, "max_length", None), getattr(config, "num_mel_bins", None)
    if isinstance(frames, int) and isinstance(bands, int):
        yield frames, bands


_SHAPES = {
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "flattened_patches": _patches,
    "input_features": _features,
    "input_values": _waves,
    "inputs": _waves,
    "state": _states,
}
