"""Finds a model's tokenizer, or says why there is none that can be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qbatch.core.errors import JobError, UnsafeSource
from qbatch.core.model_files import auto_map
from qbatch.worker.models.remote_code import REFUSAL

TOKENIZER_CONFIG = "tokenizer_config.json"
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
)
# Read by transformers only with other packages, or not at all; what is installed must not change what is measured.
_OF_TIKTOKEN = ("tiktoken.model", "*.tiktoken")
_OTHERS = ("tekken.json", "*.tiktoken", "*.model", "*.spm", "*.vocab", "*.bpe")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_LONGEST_TOKEN = 1024


def why_no_tokenizer(folder: Path) -> str | None:
    """Why the files in ``folder`` hold no tokenizer that can be read; None if they may hold one."""
    of_tiktoken = _files_of_tiktoken(folder)
    if any((folder / name).is_file() and name not in of_tiktoken for name in _VOCABULARIES):
        return None
    has_config = (folder / TOKENIZER_CONFIG).is_file()
    if has_config and (not of_tiktoken or auto_map(folder / TOKENIZER_CONFIG)):
        return None
    others = of_tiktoken or sorted(path.name for pattern in _OTHERS for path in folder.glob(pattern))
    return f"its only tokenizer is {others[0]}, which qbatch cannot read" if others else "it has no tokenizer"


def _files_of_tiktoken(folder: Path) -> list[str]:
    """Vocabularies that only tiktoken reads. Some have the name that SentencePiece's have."""
    named = sorted(path.name for pattern in _OF_TIKTOKEN for path in folder.glob(pattern))
    return [*named, *_ambiguous(folder / "tokenizer.model")]


def _ambiguous(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        if _TIKTOKEN_LINE.fullmatch(file.readline(_LONGEST_TOKEN)):
            yield path.name


def load_tokenizer(folder: Path, *, trusted: bool) -> tuple[Any, str | None]:
    """The tokenizer in ``folder``; or None, and why there is none that can be read.

    Raises UnsafeSource if it needs code and is not trusted, and whatever transformers raises.
    """
    if (reason := why_no_tokenizer(folder)) is not None:
        return None, reason
    if not _is_config_alone(folder):
        return _loaded(folder, trusted=trusted), None
    # Few tokenizers need no vocabulary: those of bytes and characters. Others are empty, or transformers raises.
    try:
        tokenizer = _loaded(folder, trusted=trusted)
        has_tokens = bool(tokenizer("text", add_special_tokens=False)["input_ids"])
    except JobError:
        raise
    except Exception:  # whatever transformers raises for such a folder
        has_tokens = False
    return (tokenizer, None) if has_tokens else (None, f"its {TOKENIZER_CONFIG} comes without a vocabulary")


def _is_config_alone(folder: Path) -> bool:
    patterns = (*_VOCABULARIES, *_OTHERS)
    return not any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def _loaded(folder: Path, *, trusted: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        # Where mistral-common is installed, its tokenizer would take the place of transformers' own.
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusted, mistral_format=False
        )
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise UnsafeSource(f"the tokenizer: {REFUSAL}") from error
        raise
