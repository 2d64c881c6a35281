"""A hub repository at one commit, and which of its files a model needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from qbatch.core.adapter_names import ADAPTER_CONFIG
from qbatch.core.errors import SourceCorrupt, SourceNotFound, UnsafeSource
from qbatch.core.folder_hint import MODULES_NAME
from qbatch.core.sources import (
    DOCUMENTS,
    INDEX_NAME,
    PICKLE_INDEX_NAME,
    PICKLE_NAME,
    PICKLE_SUFFIXES,
    SIDECARS,
    SINGLE_NAME,
    indexed_files,
)

_MODULE_FILES = (".json", ".txt", ".model", ".safetensors")
_OTHER_WEIGHTS = (*PICKLE_SUFFIXES, ".h5", ".msgpack")
# Files with these suffixes are never fetched as sidecars, even if they match one of the patterns.
_NEVER = (*_OTHER_WEIGHTS, ".onnx", ".gguf", ".py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A hub repository at one commit.

    ``files`` maps each path, none of which leads outside, to its size in bytes. ``hashes`` maps paths to the hub's
    hash: the sha256 of LFS and Xet files, and git's blob id of others. Pickles are fetched if they are allowed and
    there are no safetensors, Python files only ``with_code``.
    """

    repo_id: str
    commit: str
    files: Mapping[str, int]
    hashes: Mapping[str, str] = field(default_factory=dict)
    allow_pickle: bool = False
    with_code: bool = False

    @property
    def entry(self) -> str:
        """The name of its cache entry: a slug of the id and twelve digits of the commit."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "--", self.repo_id).lstrip(".")
        return f"{slug}--{self.commit[:12]}" + ("--code" if self.with_code else "")

    @property
    def is_pickled(self) -> bool:
        return not self.files.keys() & {INDEX_NAME, SINGLE_NAME} and bool(
            self.files.keys() & {PICKLE_INDEX_NAME, PICKLE_NAME}
        )

    @property
    def listing_files(self) -> list[str]:
        """The small files that list which others are needed; ``wanted`` reads them."""
        return [name for name in (self._index, MODULES_NAME) if name is not None and name in self.files]

    @property
    def _single(self) -> str:
        return PICKLE_NAME if self.is_pickled else SINGLE_NAME

    @property
    def _index(self) -> str | None:
        """The index; None if there is a single weight file. transformers prefers that, and an index may be stale."""
        name = PICKLE_INDEX_NAME if self.is_pickled else INDEX_NAME
        return name if name in self.files and self._single not in self.files else None

    def check(self) -> None:
        """Raise SourceNotFound or UnsafeSource if the repository contains no model that can be used."""
        if "config.json" not in self.files:
            raise SourceNotFound(f"{self.repo_id} has no config.json{self._where_the_model_is()}")
        if INDEX_NAME in self.files or SINGLE_NAME in self.files or (self.is_pickled and self.allow_pickle):
            return
        if any(path.endswith(_OTHER_WEIGHTS) for path in self.files) and not self.allow_pickle:
            raise UnsafeSource(f"{self.repo_id} has only pickles, no safetensors; use --allow-pickle to convert them")
        raise SourceNotFound(f"{self.repo_id} has neither {SINGLE_NAME} nor {INDEX_NAME}")

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter without the model that it belongs to."""
        weights = {SINGLE_NAME, INDEX_NAME, PICKLE_NAME, PICKLE_INDEX_NAME}
        return ADAPTER_CONFIG in self.files and not self.files.keys() & weights

    def _where_the_model_is(self) -> str:
        inner = next((path for path in sorted(self.files) if re.fullmatch(r"[A-Za-z0-9_-]+/config\.json", path)), None)
        if inner is None or MODULES_NAME not in self.files:
            return ""
        return f": its model is in the folder {inner.partition('/')[0]}: download it, and list that folder"

    def wanted(self, folder: Path) -> list[str]:
        """The paths to fetch, in order. ``folder`` contains ``listing_files``.

        Raises SourceCorrupt if one of them is broken.
        """
        index = [] if self._index is None else [self._index]
        return sorted({*self.sidecars(folder), *index, *self._weights(folder)})

    def sidecars(self, folder: Path) -> list[str]:
        """The paths to fetch, except weights and their index. Raises SourceCorrupt."""
        code = [path for path in self.files if self.with_code and path.endswith(".py")]
        return sorted({*self._root_files(), *self._module_files(folder), *code})

    def _root_files(self) -> Iterator[str]:
        for path in self.files:
            if path.endswith((*_NEVER, ".index.json")):
                continue
            if any(_matches(path, pattern) for pattern in (*SIDECARS, *DOCUMENTS)):
                yield path

    def _weights(self, folder: Path) -> set[str]:
        """The weight files that will be loaded; a repository may contain the same weights in another layout too."""
        if self._index is None:
            return {self._single}
        names = set(indexed_files(folder / self._index, suffix=".bin" if self.is_pickled else ".safetensors"))
        if missing := sorted(names - self.files.keys()):
            raise SourceCorrupt(f"{self.repo_id}: {self._index} lists {missing[0]!r}, which the repository lacks")
        return names

    def _module_files(self, folder: Path) -> Iterator[str]:
        """The files of sentence-transformers modules (pooling, dense) that modules.json lists."""
        if MODULES_NAME not in self.files:
            return
        try:
            modules = {module["path"] for module in json.loads((folder / MODULES_NAME).read_text())}
        except (ValueError, KeyError, TypeError) as error:
            raise SourceCorrupt(f"{self.repo_id}: {MODULES_NAME} is not a list of modules") from error
        for path in self.files:
            module, slash, _ = path.partition("/")
            if slash and module in modules and path.endswith(_MODULE_FILES):
                yield path


def _matches(path: str, pattern: str) -> bool:
    """Match like a glob, in which a star does not match a slash."""
    return path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)
