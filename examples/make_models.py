"""Train the example models: a tiny Llama (bfloat16) and a tiny Bloom (float32), with their tokenizers.

They are trained on the standard library's documentation and sources, long enough for perplexity to be meaningful.
Models that already exist are not trained again, and an interrupted run leaves no incomplete model.

    python -m examples.make_models [FOLDER]        (from the repository's root; default: models/ beside this file)
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.progress import BackgroundTask, progress
from qbatch.core.methods.registry import every_silenced_logger

_CHAT_TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A model to train. All widths are multiples of 64, because bitsandbytes' CPU kernels need that. ``dtype`` is the
    dtype in which the model is stored."""

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
    missing = [example for example in EXAMPLES if not (into / example.name).exists()]
    if not missing:
        print(f"the example models are already in {into}")
        return
    names = " and ".join(example.name for example in missing)
    print(f"training {names} in {into}, which takes about a minute on two cores", flush=True)
    # This process imports nothing heavy, so that it can report the progress of the others immediately.
    work = {example.name: BackgroundTask.start(_make, example, into) for example in missing}
    for line in progress(work):
        print(line, flush=True)


def _make(example: Example, into: Path, report: Callable[[str], None]) -> str:
    report("importing torch and transformers")
    # transformers imports torchao where it is installed, which warns of kernels that nothing here uses.
    for name in every_silenced_logger():
        logging.getLogger(name).setLevel(logging.ERROR)
    import torch

    from examples.training import make

    # One process per model, with one thread: several threads wait for each other, and are very slow on a busy machine.
    torch.set_num_threads(1)
    return make(example, into, report=report)


if __name__ == "__main__":
    main(sys.argv[1:])
