"""A bar on standard error, for what takes long with a long list."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

# In models. A shorter list is done before anybody wonders.
_LONG_LIST = 500


@contextmanager
def progress_bar(label: str, sources: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """To be called with a number of models whenever so many more are done. Shown if standard error is a terminal."""
    if quiet or sources < _LONG_LIST or not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=sources, label=label, file=sys.stderr, show_pos=True) as bar:
        yield bar.update
