"""Make the example models on the spot: a tiny Llama (bfloat16) and a tiny Bloom (float32), with their tokenizers.

They learn from the standard library's own documentation and sources, long enough for perplexity to mean
something. A model that is already there is left alone; an interrupted run leaves none half made.

    python -m examples.make_models [FOLDER]        (from the repository's root; default: models/ beside this file)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.progress import Piece, progress

_CHAT_TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A model to make. Every width is a multiple of 64, since bitsandbytes' CPU kernels need that. ``dtype`` is the one
    that it is stored in."""

    name: str
    architecture: str
    config: dict[str, Any]
    dtype: str
    prefix_bos: bool
    chat_template: str | None


EXAMPLES = (
    Example(
        name="tiny-llama",
        architecture="llama",
        config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        },
        dtype="bfloat16",
        prefix_bos=True,
        chat_template=_CHAT_TEMPLATE,
    ),
    Example(
        name="tiny-bloom",
        architecture="bloom",
        config={"hidden_size": 128, "n_layer": 4, "n_head": 4},
        dtype="float32",
        prefix_bos=False,
        chat_template=None,
    ),
)


def main(argv: Sequence[str]) -> None:
    into = Path(argv[0]) if argv else Path(__file__).parent / "models"
    wanted = [example for example in EXAMPLES if not (into / example.name).exists()]
    if not wanted:
        print(f"the example models are in {into}")
        return
    names = " and ".join(example.name for example in wanted)
    print(f"making {names} in {into}: about a minute on two cores", flush=True)
    # This process imports nothing heavy, so that it can say how far the others are from the first second on.
    work = {example.name: Piece.start(_make, example, into) for example in wanted}
    for line in progress(work):
        print(line, flush=True)


def _make(example: Example, into: Path, report: Callable[[str], None]) -> str:
    report("importing torch and transformers")
    import torch

    from examples.training import make

    # One thread and one process each: threads that wait for each other crawl on a machine that is busy.
    torch.set_num_threads(1)
    return make(example, into, report=report)


if __name__ == "__main__":
    main(sys.argv[1:])
