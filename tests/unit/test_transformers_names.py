"""What transformers knows is read from its sources as it says itself."""

from __future__ import annotations

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from qbatch.core.errors import JobError, SourceCorrupt, Unsupported
from qbatch.core.transformers_names import has_class, model_types, refuse_unknown_architecture
from qbatch.worker.models.class_of_type import class_of_type


def test_the_model_types_are_those_of_transformers() -> None:
    assert list(model_types().items()) == list(CONFIG_MAPPING_NAMES.items())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LlamaModel", "NomicBertModel", "Llama4TextModel"])
def test_a_class_of_transformers_is_found(name: str) -> None:
    assert isinstance(getattr(transformers, name), type)
    assert has_class(name)


@pytest.mark.parametrize("name", ["QuuxForCausalLM", "pipeline", "", 'a"b', "../x"])
def test_what_is_no_class_is_not_found(name: str) -> None:
    assert not has_class(name)


@pytest.mark.parametrize("model_type", ["llama", "bert", "t5", "gpt2", "mistral", "mixtral", "nomic_bert", "clip"])
@pytest.mark.parametrize("ending", ["ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForTokenClassification"])
def test_a_class_that_another_stands_in_for_is_accepted(model_type: str, ending: str) -> None:
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
    name = f"Unheard{ending}"
    config = {"model_type": model_type, "architectures": [name]}
    if class_of_type(config_class, name) is not None:
        refuse_unknown_architecture(config)
    else:
        with pytest.raises(Unsupported, match=f"no architecture '{name}'"):
            refuse_unknown_architecture(config)


def test_every_base_model_is_accepted_as_it_is_and_in_other_capitals() -> None:
    for model_type, names in MODEL_MAPPING_NAMES.items():
        if model_type not in CONFIG_MAPPING_NAMES:
            continue
        name = names if isinstance(names, str) else names[0]
        refuse_unknown_architecture({"model_type": model_type, "architectures": [name]})


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"model_type": "quux"}, Unsupported, "does not know the model type 'quux'"),
        ({}, SourceCorrupt, "has no model_type"),
        ({"model_type": ["llama"]}, SourceCorrupt, "not a name"),
        ({"model_type": "llama", "architectures": ["Quux"]}, Unsupported, "has no architecture 'Quux'"),
        ({"model_type": "x" * 500}, Unsupported, "…"),
    ],
)
def test_what_transformers_does_not_know_is_refused(
    config: dict[str, object], error: type[JobError], says: str
) -> None:
    with pytest.raises(error, match=says):
        refuse_unknown_architecture(config)


def test_code_of_its_own_and_no_architecture_are_left_to_workers() -> None:
    refuse_unknown_architecture({"model_type": "quux", "auto_map": {"AutoConfig": "a.B"}})
    refuse_unknown_architecture({"model_type": "llama", "architectures": None})
