"""Whether the text of a training repeats a passage of an evaluation text, as far as a model's tokenizer is here.

A worker looks again before it trains anything, at whole texts and with the tokenizer as the model has it. What is
looked for here is what can be found in a few seconds, however long the texts are and however many models there are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from qbatch.core.errors import Unsupported
from qbatch.core.search.shared_run import shared_passage_text, shared_run

log = logging.getLogger("qbatch.submit")

_FILE = "tokenizer.json"
# Reading that of a large model takes half a second.
_MOST_TOKENIZERS = 6
_MOST_CHARACTERS = 2**22
# A piece is read at a time, because the tokens of a text take a hundred times its memory.
_PIECE_CHARACTERS = 2**18
# The parts of the file that tell tokenizers apart. Fine-tunes of one model have the same.
_COMPARED_BYTES = 2**16


@dataclass(slots=True, kw_only=True)
class SharedPassages:
    """``trained_on``: the texts of trainings; ``judged_by``: those on which their rows are measured."""

    trained_on: Sequence[str]
    judged_by: Sequence[str]
    _passages: dict[str, str | None] = field(default_factory=dict)

    def refuse(self, folder: Path) -> None:
        """Raise Unsupported if the tokenizer in ``folder`` finds a passage that is in both, and OSError. Without one
        there, or with one that only a worker can read, nothing is known."""
        file = folder / _FILE
        if not self.trained_on or not file.is_file():
            return
        name = _name_of(file)
        if name not in self._passages and len(self._passages) < _MOST_TOKENIZERS:
            self._passages[name] = self._passage(file)
        if (passage := self._passages.get(name)) is not None:
            raise Unsupported(shared_passage_text(passage))

    def _passage(self, file: Path) -> str | None:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library has no error of its own
            log.info("%s is left to the workers: %s", file, error)
            return None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        judged = [[token for ids in _pieces_of_ids(tokenizer, text) for token in ids] for text in self.judged_by]
        for text in self.trained_on:
            for ids in _pieces_of_ids(tokenizer, text):
                run = next((run for by in judged if (run := shared_run(ids, by)) is not None), None)
                if run is not None:
                    return str(tokenizer.decode(list(run)))
        return None


def _name_of(file: Path) -> str:
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(0)
        begin = opened.read(_COMPARED_BYTES)
        opened.seek(max(0, size - _COMPARED_BYTES))
        return sha256(b"%d " % size + begin + opened.read()).hexdigest()


def _pieces_of_ids(tokenizer: Any, text: str) -> Iterator[list[int]]:
    """The tokens of the first characters of ``text``. Pieces end where lines do."""
    begin, end = 0, min(len(text), _MOST_CHARACTERS)
    while begin < end:
        cut = min(begin + _PIECE_CHARACTERS, end)
        cut = text.find("\n", cut, end) + 1 or end
        (encoding,) = tokenizer.encode_batch_fast([text[begin:cut]], add_special_tokens=False)
        yield encoding.ids
        begin = cut
