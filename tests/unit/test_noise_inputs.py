"""Noise in the form that a model takes is found for what sees or hears, alone or beside a text."""

from __future__ import annotations

import pytest
import torch
import transformers

from qbatch.worker.measuring.speed.model_inputs import describe_inputs, noise_inputs
from tests.shrunk import make, shrunk_config

TEXT = "input_ids [2, 8], attention_mask [2, 8]"
FORMS = {
    "blip": ("BlipForConditionalGeneration", f"pixel_values [2, 3, 384, 384], {TEXT}"),
    "granite_speech5_ctc": ("GraniteSpeech5ForCTC", "input_features [2, 100, 320]"),
    "instructblipvideo": (
        "InstructBlipVideoForConditionalGeneration",
        "pixel_values [2, 4, 3, 224, 224], input_ids [2, 136], attention_mask [2, 136], qformer_input_ids [2, 8]",
    ),
    "kosmos-2": (
        "Kosmos2ForConditionalGeneration",
        "pixel_values [2, 3, 224, 224], input_ids [2, 72], attention_mask [2, 72], image_embeds_position_mask [2, 72]",
    ),
    "pi0": (
        "PI0ForConditionalGeneration",
        "state [2, 32], input_ids [2, 264], attention_mask [2, 264], pixel_values [2, 1, 3, 224, 224], "
        "pixel_attention_mask [2, 1]",
    ),
    "siglip2": (
        "Siglip2Model",
        f"pixel_values [2, 256, 768], pixel_attention_mask [2, 256], spatial_shapes [2, 2], {TEXT}",
    ),
    "speech-encoder-decoder": ("SpeechEncoderDecoderModel", "inputs [2, 16000], decoder_input_ids [2, 1]"),
    "speech_to_text": ("Speech2TextForConditionalGeneration", "input_features [2, 100, 80], decoder_input_ids [2, 1]"),
    "voxtral_realtime": ("VoxtralRealtimeForConditionalGeneration", "input_ids [2, 8], input_features [2, 128, 64]"),
    "videoprism_vision_model": ("VideoPrismForVideoClassification", "pixel_values_videos [2, 16, 3, 36, 36]"),
}

FIELDS = {"videoprism_vision_model": {"image_size": 36}}  # the usual size takes seconds


@pytest.mark.parametrize("model_type", FORMS)
def test_the_form_of_its_noise_is_found(model_type: str) -> None:
    name, form = FORMS[model_type]
    model = (
        make(getattr(transformers, name), shrunk_config(model_type, **FIELDS.get(model_type, {})))
        .to(torch.bfloat16)
        .eval()
    )
    assert describe_inputs(noise_inputs(model, 2)) == form
