"""Train a Llama whose mixtures can be compared: of random weights no layer matters more than another.

    python -m benchmarks.trained_model MODELS
    python -m benchmarks.trained_model MODELS --device cuda:0 --layers 16 --hidden 512 --steps 8000 --windows 32

It is saved as MODELS/trained-12x128 (layers, width) in bfloat16. It learns in float32 from the standard library's
documentation and sources, in an order that is always the same; with it comes a tokenizer of 2048 tokens. The defaults
are for two CPU cores.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.report import log
from examples.make_models import Example

_SEED = 18
_HEAD_WIDTH = 32
_WINDOW_TOKENS = 256
_LOGGED_EVERY_S = 30.0


def example(layers: int, hidden: int) -> Example:
    return Example(
        name=f"trained-{layers}x{hidden}",
        architecture="llama",
        config={
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // _HEAD_WIDTH,
            "num_key_value_heads": hidden // _HEAD_WIDTH // 2,
            "max_position_embeddings": 1024,
        },
        dtype="bfloat16",
        prefix_bos=True,
        chat_template=None,
    )


def texts() -> list[str]:
    """The language reference, and the sources of the standard library's modules and packages but for its tests."""
    from pydoc_data.topics import topics

    found = [*topics.values(), *_sources(Path(sysconfig.get_path("stdlib")))]
    random.Random(_SEED).shuffle(found)
    return found


def _sources(folder: Path) -> Iterator[str]:
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    for path in sorted(folder.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(folder).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def said_now_and_then(every_s: float = _LOGGED_EVERY_S) -> Callable[[str], None]:
    due = time.monotonic()

    def report(text: str) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + every_s
            log(text)

    return report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--windows", type=int, default=8, help="of 256 tokens, in each step")
    given = parser.parse_args(argv)
    from examples.training import make

    print(
        make(
            example(given.layers, given.hidden),
            given.folder,
            report=said_now_and_then(),
            texts=texts(),
            steps=given.steps,
            window_tokens=_WINDOW_TOKENS,
            windows_per_step=given.windows,
            device=given.device,
        )
    )


if __name__ == "__main__":
    main()
