"""A published adapter on the checkpoint that it belongs to, with plain ``PeftModel.from_pretrained``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from qbatch.core.adapter_names import ADAPTER_WEIGHTS
from qbatch.core.errors import BenchmarkError, WorkerLacks
from qbatch.core.methods.registry import is_installed
from qbatch.core.recovery import EXTRA, LIBRARY

# What PEFT calls an adapter that was given no name.
_NAME = "default"


def import_peft() -> None:
    """Raises WorkerLacks without it, or if it cannot be imported."""
    how = f"pip install 'qbatch[{EXTRA}]'"
    if not is_installed(LIBRARY):
        raise WorkerLacks(f"an adapter is loaded with PEFT, which is not installed here: {how}")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise WorkerLacks(f"an adapter is loaded with PEFT, which cannot be imported ({error}): {how}") from error


def with_adapter(model: Any, folder: Path, *, is_trainable: bool = False) -> Any:
    """``model`` with the adapter in ``folder``. It stays of its own class, and its layers compute with the adapter,
    whose factors alone get gradients if it ``is_trainable``.

    Raises Unsupported without PEFT, and BenchmarkError if the adapter is not one of these layers alone.
    """
    import_peft()
    from peft import PeftModel

    with warnings.catch_warnings():
        # Names that differ are compared below, and of what PEFT calls in transformers nobody here can change anything.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.simplefilter("ignore", FutureWarning)
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable).get_base_model()
    _refuse_other_names(adapted, folder)
    return adapted.eval()


def adapter_parameters(model: Any) -> dict[str, Any]:
    """The parameters of ``model`` that belong to its adapter, by the names that they have in the adapter's file."""
    return {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": parameter
        for name, parameter in model.named_parameters()
        if f".lora_A.{_NAME}." in name or f".lora_B.{_NAME}." in name
    }


def _refuse_other_names(model: Any, folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
    if different := sorted(stored ^ adapter_parameters(model).keys()):
        raise BenchmarkError(
            f"PEFT finds other layers of {type(model).__name__} for {folder.name} than it has, "
            f"the first is {different[0]}"
        )
