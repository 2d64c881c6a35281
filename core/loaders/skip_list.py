"""The skip list to publish: one that transformers and vLLM read alike, as far as there is one."""

from __future__ import annotations

import re
from collections.abc import Set

from qbatch.core.loaders.engine_names import EngineArchitecture
from qbatch.core.loaders.skip_rules import transformers_skips, vllm_skips

# Python keeps 512 compiled expressions, and transformers asks for each entry once for each module of the model: of a
# longer list each would be compiled anew every time.
_MOST_ENTRIES = 400
_PLAIN_NAME = re.compile(r"[\w.-]+")


class SkippedLayers:
    """The linear layers of a model by name, those that stay unquantized, and what the engine makes of their names."""

    def __init__(self, linears: Set[str], kept: Set[str], architecture: EngineArchitecture) -> None:
        self._linears, self._kept, self._architecture = linears, kept, architecture
        self._others = linears - kept
        self._others_in_engine = set(map(architecture.module_name, self._others))
        self._safe_folders: dict[str, bool] = {}

    def entries(self) -> Set[str]:
        """Full names; for each fused group that is kept as a whole its own name too, and the engine's where it differs.

        A name that transformers would also take for the end of another layer's is replaced by the folder that it lies
        in, or, where that holds other layers, by an exact expression, which transformers alone understands.
        """
        own = {self._entry(name) for name in self._kept}
        listed = own | self._for_engine(own)
        if len(listed) <= _MOST_ENTRIES:
            return listed
        own = {self._topmost_folder(name) or self._entry(name) for name in self._kept}
        return own | self._for_engine(own)

    def _entry(self, name: str) -> str:
        if self._is_exact(name):
            return name
        folder = next((folder for folder in reversed(_folders(name)) if self._is_safe_folder(folder)), None)
        # torchao's quantizer asks with the parameter's name.
        return folder or rf"{re.escape(name)}(?:\.weight)?$"

    def _topmost_folder(self, name: str) -> str | None:
        return next((folder for folder in _folders(name) if self._is_safe_folder(folder)), None)

    def _is_safe_folder(self, folder: str) -> bool:
        if folder not in self._safe_folders:
            within = f"{folder}."
            self._safe_folders[folder] = (
                not any(name.startswith(within) for name in self._others)
                and self._is_exact(folder)
                and self._is_exact_in_engine(folder)
            )
        return self._safe_folders[folder]

    def _for_engine(self, own: Set[str]) -> Set[str]:
        alone = {entry for entry in own if self._architecture.group_of(entry) is None}
        groups = {
            group.name
            for name in self._kept
            if own.isdisjoint(_folders(name))
            and (group := self._architecture.group_of(name)) is not None
            and self._others.isdisjoint(group.members)
        }
        names = groups | {self._architecture.renamed(name) for name in alone | groups}
        return {name for name in names if self._is_exact(name) and self._is_exact_in_engine(name)}

    def _is_exact(self, entry: str) -> bool:
        """Whether it is a plain name, and transformers skips no layer by it that is not to be kept."""
        return _PLAIN_NAME.fullmatch(entry) is not None and not any(map(transformers_skips([entry]), self._others))

    def _is_exact_in_engine(self, entry: str) -> bool:
        return not any(map(vllm_skips([entry]), self._others_in_engine))


def _folders(name: str) -> list[str]:
    """``a.b.c`` → ``a``, ``a.b``."""
    components = name.split(".")
    return [".".join(components[:count]) for count in range(1, len(components))]
