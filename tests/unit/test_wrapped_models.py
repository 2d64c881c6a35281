"""A language model wrapped with ears or eyes is measured as itself.

Twelve types stand in transformers' mapping of encoder-decoders without being any. Eleven are wrapped here. Voxtral
Realtime cannot be: its forward adds a piece of sound to the embedding of every token and raises a ValueError without
one ("You must specify exactly one of input_features or encoder_inputs_embeds"), and its language model is a class of
its own, whose layers are scaled by an embedding of the delay. So it is timed on noise and has no perplexity, as a test
below shows.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from qbatch.worker.measuring.speed.model_inputs import noise_inputs, reads_text, text_inputs
from qbatch.worker.models.architecture import ModelKind, kind_of
from tests.shrunk import make, shrunk_config
from tests.tiny import make_tokenizer
from tests.unit.benchmark_models import measured

_SEQ2SEQ = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
# All of that mapping that are no encoder-decoders, with a language model of plain transformers inside; and one that
# sees.
_WRAPPERS = (
    "audioflamingo3",
    "glmasr",
    "granite_speech",
    "granite_speech_plus",
    "moss_transcribe_diarize",
    "musicflamingo",
    "nemo_speechlm",
    "qwen2_audio",
    "qwen3_asr",
    "vibevoice_asr",
    "voxtral",
    "llava",
)
_HEARS_ALONG = "voxtral_realtime"


def class_of(model_type: str) -> type[PreTrainedModel]:
    names = {**modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **_SEQ2SEQ}
    cls: type[PreTrainedModel] = getattr(transformers, names[model_type])
    return cls


@pytest.mark.parametrize("model_type", _SEQ2SEQ)
def test_only_an_encoder_decoder_is_one(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    config.architectures = [_SEQ2SEQ[model_type]]
    takes_target = "decoder_input_ids" in inspect.signature(class_of(model_type).forward).parameters
    assert (kind_of(config) is ModelKind.SEQ2SEQ) == takes_target


@pytest.mark.parametrize(
    ("model_type", "is_read"), [("cohere", True), ("llava", True), ("clip", False), ("vit", False)]
)
def test_what_reads_text_alone_is_told_from_what_does_not(model_type: str, is_read: bool) -> None:
    names = {"cohere": "CohereForCausalLM", "llava": "LlavaForConditionalGeneration", "clip": "CLIPModel"}
    cls = getattr(transformers, names.get(model_type, "ViTModel"))
    with torch.device("meta"):
        assert reads_text(cls(shrunk_config(model_type))) is is_read


def test_each_that_is_no_encoder_decoder_is_wrapped() -> None:
    plain = {name for name in _SEQ2SEQ if not transformers.AutoConfig.for_model(name).is_encoder_decoder}
    assert plain == {*_WRAPPERS, _HEARS_ALONG} - {"llava"}
    assert len(plain) == 12


def test_what_hears_with_every_token_reads_no_text_alone() -> None:
    model = make(class_of(_HEARS_ALONG), shrunk_config(_HEARS_ALONG))
    with pytest.raises(ValueError, match="input_features"):
        model(**text_inputs(model, torch.ones(1, 4, dtype=torch.long)))
    assert model.config.get_text_config().model_type not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert not reads_text(model)
    assert noise_inputs(model, 2).keys() == {"input_ids", "input_features"}


@pytest.mark.parametrize("model_type", _WRAPPERS)
@pytest.mark.filterwarnings("ignore")
def test_a_wrapped_text_model_gets_its_own_figures(model_type: str, tmp_path: Path) -> None:
    wrapper = make(class_of(model_type), shrunk_config(model_type))
    text = transformers.AutoModelForCausalLM.from_config(wrapper.config.get_text_config())
    text.model.load_state_dict(wrapper.get_submodule("model.language_model").state_dict())
    text.lm_head.load_state_dict(wrapper.lm_head.state_dict())
    figures = []
    for name, model in (("wrapped", wrapper), ("plain", text)):
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
        make_tokenizer(tmp_path / name)
        figures.append(measured(tmp_path / name))
    wrapped, plain = figures
    assert wrapped.details.task == plain.details.task == ModelKind.CAUSAL_LM
    assert plain.perplexity is not None
    assert wrapped.perplexity == plain.perplexity
    assert wrapped.details.perplexity.window_nll == plain.details.perplexity.window_nll
