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
    """A context that shows a bar if standard error is a terminal. It gives a function to call with the number of models
    that were done since the last call."""
    if quiet or sources < _LONG_LIST or not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=sources, label=label, file=sys.stderr, show_pos=True) as bar:
        yield bar.update
