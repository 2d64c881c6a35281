"""A checkpoint's card: what is carried over from the source's, and metadata that the hub takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from qbatch.core.domain import DType, Method, Scheme
from qbatch.worker.checkpoints.card_file import is_own, quantized_metadata, read_metadata, write_card, write_first_card

SOURCE = """---
license: llama3.2
language:
- en
- de
base_model: org/base
base_model_relation: finetune
library_name: transformers
pipeline_tag: text-generation
tags: [chat, llama]
extra_gated_prompt: Sign here
widget:
- text: hello
---

# The model
"""


def card(folder: Path) -> ModelCardData:
    data: ModelCardData = ModelCard.load(folder / "README.md").data
    return data


def first_card(folder: Path, *, is_of_hub: bool) -> dict[str, Any]:
    scheme = Scheme(method=Method.NF4)
    write_first_card(folder, model="org/model", is_of_hub=is_of_hub, scheme=scheme, dtype=DType.BFLOAT16)
    found: dict[str, Any] = card(folder).to_dict()
    return found


def test_a_model_of_the_hub_is_the_base_of_its_quantized_one(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(SOURCE)
    assert first_card(tmp_path, is_of_hub=True) == {
        "license": "llama3.2",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "base_model": "org/model",
        "base_model_relation": "quantized",
        "tags": ["chat", "llama", "quantized", "qbatch", "bnb-nf4", "bitsandbytes", "4-bit"],
    }
    text = (tmp_path / "README.md").read_text()
    assert "# model, bnb-nf4" in text
    assert "# The model" not in text
    assert is_own(tmp_path)


def test_of_a_folder_the_base_is_named_but_not_as_what_was_quantized(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(SOURCE)
    metadata = first_card(tmp_path, is_of_hub=False)
    assert metadata["base_model"] == "org/base"
    assert "base_model_relation" not in metadata


def test_without_a_card_of_the_source_there_is_one_of_ours(tmp_path: Path) -> None:
    metadata = first_card(tmp_path, is_of_hub=False)
    assert metadata["library_name"] == "transformers"
    assert metadata.keys() == {"library_name", "tags"}
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"], "nothing partial is left"


def test_writing_it_again_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(SOURCE)
    before = first_card(tmp_path, is_of_hub=True), (tmp_path / "README.md").read_text()
    assert (first_card(tmp_path, is_of_hub=True), (tmp_path / "README.md").read_text()) == before


@pytest.mark.parametrize(
    "head",
    [
        "license: !!python/object/apply:os.system [id]",
        "a: &a [x,x]\nb: &b [*a,*a]\nlicense: [*b,*b]",
        "license: [1, {x: y}, null]",
        'license: "\\u001b[2J"',
        "license: " + "x" * 5000,
        "[" * 3000,
        "- just\n- a list",
        ": : :",
    ],
)
def test_a_hostile_card_has_nothing_to_carry(head: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    assert read_metadata(tmp_path) == {}


def test_what_somebody_wrote_is_known_as_theirs(tmp_path: Path) -> None:
    assert is_own(tmp_path)
    (tmp_path / "README.md").write_text("# Mine")
    assert not is_own(tmp_path)


def test_a_library_that_also_loads_it_is_kept() -> None:
    carried = {"library_name": "sentence-transformers", "tags": "one"}
    given: dict[str, Any] = {"scheme": "bnb-int8", "libraries": ("bitsandbytes",), "bits": 8}
    kept = quantized_metadata(carried, base_model=None, **given)
    assert kept["library_name"] == "sentence-transformers"
    assert kept["tags"][0] == "one"
    assert quantized_metadata({"library_name": "mlx"}, base_model=None, **given)["library_name"] == "transformers"


def test_control_characters_stay_out_of_a_card(tmp_path: Path) -> None:
    write_card(tmp_path, {}, "a\x1b[2Jb")
    assert "a\\x1b[2Jb" in (tmp_path / "README.md").read_text()
