"""A tiny Llama that has learned something: on random weights no layer matters more than another."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from examples.make_models import EXAMPLES
from examples.training import make

# A fraction of the demo's steps, on a part of its texts: enough to leave ln 2048 = 7.6 nats far behind.
_STEPS = 60
_TEXTS = 60


def make_trained(folder: Path) -> Path:
    """The demo's Llama in ``folder``/tiny-llama, trained for a few seconds."""
    example = EXAMPLES[0]
    make(example, folder, report=lambda _: None, texts=[*topics.values()][:_TEXTS], steps=_STEPS)
    return folder / example.name
