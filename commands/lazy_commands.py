"""The commands by name, each imported when it is looked up: a short command does not wait for the imports of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any

import click


class LazyCommands(MutableMapping[str, click.Command]):
    """``modules`` says in which module of this package each command is; there it has its own name."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = dict(modules)
        self._added: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._added:
            module: Any = import_module(f"qbatch.commands.{self._modules[name]}")
            self._added[name] = getattr(module, name)
        return self._added[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._modules.setdefault(name, "")
        self._added[name] = command

    def __delitem__(self, name: str) -> None:
        del self._modules[name]
        self._added.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
