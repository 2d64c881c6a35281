"""Which tokens a model is measured with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qbatch.worker.measuring.tokens import prompts, text_ids
from qbatch.worker.models.load import LoadedModel
from tests import tiny
from tests.unit.benchmark_models import TEXT, loaded_on_cpu


@pytest.fixture
def llama(tmp_path: Path) -> LoadedModel:
    return loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))


def plain_ids(loaded: LoadedModel, text: str) -> list[int]:
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_each_row_is_the_next_piece_of_text_behind_the_special_tokens(tmp_path: Path) -> None:
    loaded = loaded_on_cpu(tiny.make_encoder(tmp_path / "bert"))
    ids = plain_ids(loaded, TEXT)
    whole = loaded.tokenizer("text")["input_ids"]
    first, last = whole[0], whole[-1]
    expected = [[first, *ids[14 * row : 14 * row + 14], last] for row in range(3)]
    assert prompts(loaded, TEXT, batch_size=3, length=16).tolist() == expected
    assert len({tuple(row) for row in expected}) == 3


def test_a_text_that_ends_begins_anew(llama: LoadedModel) -> None:
    text = "a few words of it"
    around, ids = plain_ids(llama, text), llama.tokenizer(text)["input_ids"]
    before = ids[: len(ids) - len(around)]
    length = len(before) + 3 * len(around)
    (row,) = prompts(llama, text, batch_size=1, length=length).tolist()
    assert row == before + 3 * around


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 100, 5000])
def test_no_more_of_a_long_text_is_read_than_it_takes(
    llama: LoadedModel, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXT * (2_000_000 // len(TEXT))
    whole = plain_ids(llama, text)
    assert len(whole) > 5000
    read: list[int] = []
    tokenizer = llama.tokenizer

    class Watched:
        def __call__(self, piece: str, **options: Any) -> Any:
            read.append(len(piece))
            return tokenizer(piece, **options)

    object.__setattr__(llama, "tokenizer", Watched())
    assert text_ids(llama, text, most) == whole[:most]
    assert max(read) < 40 * (most + 100)


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 50_000 + "the end"], ids=["one word", "blanks"])
def test_a_text_of_few_tokens_is_read_to_its_end(llama: LoadedModel, text: str) -> None:
    assert text_ids(llama, text, 200) == plain_ids(llama, text)[:200]
