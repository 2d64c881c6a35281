"""A tokenizer is read the same whatever else is installed, and what is none is not taken for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers.integrations.mistral.tokenizer
from transformers import ByT5Tokenizer
from transformers.models.auto import tokenization_auto

from qbatch.core.errors import UnsafeSource
from qbatch.worker.models.tokenizer import load_tokenizer
from tests import incoming
from tests.tiny import make_causal


@pytest.mark.parametrize("kind", incoming.UNREADABLE_TOKENIZERS)
def test_what_is_no_tokenizer_says_why(kind: str, tmp_path: Path) -> None:
    source = incoming.unreadable_tokenizer(tmp_path, kind)
    assert load_tokenizer(source, trusted=False) == (None, incoming.UNREADABLE_TOKENIZERS[kind][1])


def test_a_tokenizer_of_bytes_needs_no_vocabulary(tmp_path: Path) -> None:
    source = incoming.unreadable_tokenizer(tmp_path, "nothing")
    ByT5Tokenizer().save_pretrained(source)
    tokenizer, why = load_tokenizer(source, trusted=False)
    assert why is None
    assert tokenizer("ab", add_special_tokens=False)["input_ids"]


def test_a_tokenizer_with_code_of_its_own_is_not_run(tmp_path: Path) -> None:
    source = incoming.unreadable_tokenizer(tmp_path, "qwen")
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(own))
    with pytest.raises(UnsafeSource, match="the tokenizer: the model needs code of its own"):
        load_tokenizer(source, trusted=False)


def test_another_library_does_not_read_it_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_causal(tmp_path, "mistral")
    (source / "tekken.json").write_text("{}")
    expected, _ = load_tokenizer(source, trusted=False)
    monkeypatch.setattr(transformers.integrations.mistral.tokenizer, "is_mistral_common_available", lambda: True)
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    tokenizer, _ = load_tokenizer(source, trusted=False)
    assert type(tokenizer) is type(expected)
    assert tokenizer("a text")["input_ids"] == expected("a text")["input_ids"]
