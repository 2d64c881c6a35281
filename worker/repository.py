"""A hub repository at one commit, and which of its files a model needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from models_db.errors import SourceCorrupt, SourceNotFound, UnsafeSource
from models_db.sources import INDEX_NAME, SINGLE_NAME

_MODULES_NAME = "modules.json"
# What a model needs beside its weights, by name in the repository's root. Other frameworks' indexes are left out.
_SIDECARS = (
    "*.json", "*.txt", "*.model", "tokenizer.model.*", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.jinja", "*.md",
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates/*.jinja"
_MODULE_FILES = (".json", ".txt", ".model", ".safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
# Whatever pattern such a name also fits.
_NEVER = (*_PICKLES, ".pkl", ".onnx", ".gguf", ".py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """``files`` is path → bytes; no path leads out of the repository."""

    repo_id: str
    commit: str
    files: Mapping[str, int]

    @property
    def entry(self) -> str:
        """Its name as a folder: the id's slug and twelve digits of the commit."""
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '--', self.repo_id).lstrip('.')}--{self.commit[:12]}"

    @property
    def guides(self) -> list[str]:
        """The small files that say which others are needed; ``wanted`` reads them."""
        return [name for name in (INDEX_NAME, _MODULES_NAME) if name in self.files]

    def check(self) -> None:
        """Raises SourceNotFound or UnsafeSource for a repository that holds no model of ours."""
        if "config.json" not in self.files:
            raise SourceNotFound(f"{self.repo_id} has no config.json")
        if INDEX_NAME in self.files or SINGLE_NAME in self.files:
            return
        if any(path.endswith(_PICKLES) for path in self.files):
            raise UnsafeSource(f"{self.repo_id} holds pickles and no safetensors")
        raise SourceNotFound(f"{self.repo_id} has neither {SINGLE_NAME} nor {INDEX_NAME}")

    def wanted(self, folder: Path) -> list[str]:
        """The paths to fetch, in order. ``folder`` holds the guides. Raises SourceCorrupt where one is broken."""
        return sorted({*self._sidecars(), *self._weights(folder), *self._module_files(folder)})

    def _sidecars(self) -> Iterator[str]:
        for path in self.files:
            if path.endswith(_NEVER) or (path.endswith(".index.json") and path != INDEX_NAME):
                continue
            if fnmatchcase(path, _TEMPLATES) or ("/" not in path and any(fnmatchcase(path, p) for p in _SIDECARS)):
                yield path

    def _weights(self, folder: Path) -> set[str]:
        """What the index names, no more: a repository may hold the same weights twice, in another layout."""
        if INDEX_NAME not in self.files:
            return {SINGLE_NAME}
        try:
            names = set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceCorrupt(f"{self.repo_id}: {INDEX_NAME} is not a safetensors index") from error
        for name in names:
            if name not in self.files or not name.endswith(".safetensors"):
                raise SourceCorrupt(f"{self.repo_id}: {INDEX_NAME} names {name!r}, which the repository does not hold")
        return names

    def _module_files(self, folder: Path) -> Iterator[str]:
        """Files of the sentence-transformers modules (pooling, dense) that modules.json names."""
        if _MODULES_NAME not in self.files:
            return
        try:
            modules = {module["path"] for module in json.loads((folder / _MODULES_NAME).read_text())}
        except (ValueError, KeyError, TypeError) as error:
            raise SourceCorrupt(f"{self.repo_id}: {_MODULES_NAME} is not a list of modules") from error
        for path in self.files:
            module, slash, _ = path.partition("/")
            if slash and module in modules and path.endswith(_MODULE_FILES):
                yield path
