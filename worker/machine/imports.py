"""Imports in a process that is going to be forked by those who use the GPU.

A process that has initialised CUDA gives it to no fork. Some libraries ask at import what the GPU can do, which
initialises it: torchao does, and transformers imports torchao where it is installed.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MODEL_LIBRARIES = (
    "torch",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "accelerate",
)
"""What every process that loads a model imports. Not bitsandbytes itself: importing it initialises CUDA in any case."""

COMPILER = ("torch._inductor.compile_fx", "torch._dynamo.repro.after_dynamo", "torch._dynamo.backends.debugging")
"""What bitsandbytes imports of torch where there is a GPU, which takes it 3 s. Without one it does not."""

# Their cached answers would say for good that there is no GPU.
_ASK_ABOUT_THE_GPU = ("accelerate.utils.imports", "torch.utils._triton", "transformers.utils.import_utils")

# torch then asks NVML which GPUs are visible, and leaves CUDA alone.
_HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def import_without_gpu(names: Sequence[str]) -> None:
    """Import each module of ``names`` as if there was no GPU. Raises ImportError.

    All objects that exist then are exempt from garbage collection for good, in this process and its forks.
    """
    with _no_gpu(), no_garbage_collection():
        for name in names:
            importlib.import_module(name)
    for name in _ASK_ABOUT_THE_GPU:
        if name in sys.modules:
            _forget_answers(name)


@contextmanager
def _no_gpu() -> Iterator[None]:
    kept = {name: os.environ.get(name) for name in _HIDDEN}
    os.environ.update(_HIDDEN)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For imports: they make millions of objects that stay, and to look through them again and again takes a fifth of
    the time. Afterwards nobody looks through what exists by then, in this process and its forks."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Before the first collection. In a fork, looking through these objects would also copy their pages.
        gc.freeze()
        if was_enabled:
            gc.enable()


def _forget_answers(module: str) -> None:
    for value in vars(sys.modules[module]).values():
        if callable(clear := getattr(value, "cache_clear", None)):
            clear()
