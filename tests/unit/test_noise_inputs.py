"""Noise in the form that a model takes is found for what sees or hears, alone or beside a text."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers

from qbatch.core.errors import CudaOom, DeviceError, HostOom, JobError
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


FAULTS = {
    "CUDA error: an illegal memory access was encountered": DeviceError,
    "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": CudaOom,
    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory": HostOom,
}


@pytest.mark.parametrize(("said", "kind"), FAULTS.items(), ids=["device", "its memory", "the host's memory"])
def test_a_fault_of_the_device_is_no_form_that_does_not_fit(said: str, kind: type[JobError]) -> None:
    name, _ = FORMS["granite_speech5_ctc"]
    model = make(getattr(transformers, name), shrunk_config("granite_speech5_ctc"))

    def breaks(*_: object) -> None:
        raise RuntimeError(said)

    model.register_forward_pre_hook(breaks)
    with pytest.raises(kind):
        noise_inputs(model, 2)


@pytest.mark.parametrize("model_type", FORMS)
def test_the_form_of_its_noise_is_found(model_type: str) -> None:
    name, form = FORMS[model_type]
    model = (
        make(getattr(transformers, name), shrunk_config(model_type, **FIELDS.get(model_type, {})))
        .to(torch.bfloat16)
        .eval()
    )
    assert describe_inputs(noise_inputs(model, 2)) == form


class Picky(torch.nn.Module):
    """Takes a text beside an image only, and computes something before it says so."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.config = shrunk_config("blip")
        self.computed: list[weakref.ref[torch.Tensor]] = []
        self.held: list[int] = []

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor | None = None, **_: Any) -> None:
        self.held.append(sum(ref() is not None for ref in self.computed))
        activations = pixel_values + 1
        self.computed.append(weakref.ref(activations))
        if input_ids is None:
            raise ValueError("where is the text?")


def test_what_a_form_that_does_not_run_has_computed_is_gone() -> None:
    """Else it would count as memory of the model. Without a collection of garbage, which comes at any time."""
    model = Picky()
    gc.disable()
    try:
        assert "input_ids" in noise_inputs(model, 2)
        assert len(model.held) > 1
        assert set(model.held) == {0}
        assert sum(ref() is not None for ref in model.computed) == 0
    finally:
        gc.enable()
