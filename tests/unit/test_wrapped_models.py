"""A language model wrapped with ears or eyes is measured as itself."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from qbatch.worker.measuring.speed.model_inputs import reads_text
from qbatch.worker.models.architecture import ModelKind, kind_of
from tests.shrunk import make, shrunk_config
from tests.tiny import make_tokenizer
from tests.unit.benchmark_models import measured

_SEQ2SEQ = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
# Each with a language model of plain transformers inside. The rest of the kind differ in their ears only.
_WRAPPERS = (
    "audioflamingo3",
    "glmasr",
    "granite_speech",
    "moss_transcribe_diarize",
    "musicflamingo",
    "qwen2_audio",
    "qwen3_asr",
    "voxtral",
    "llava",
)


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
