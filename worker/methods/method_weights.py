"""What a worker does for a method: the half of its description that computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qbatch.core.domain import Scheme
from qbatch.core.methods.description import MethodDescription
from qbatch.core.sources import TensorInfo
from qbatch.worker.methods.packing import Packing, StreamedPacking


class PlainWeights:
    """How a loaded model's weights are counted; as it stands, those of one that is not quantized. ``libraries`` are the
    packages that it computes with, beside torch and transformers."""

    libraries: tuple[str, ...] = ()

    def is_quantized(self, parameter: torch.Tensor) -> bool:
        return False

    def logical_elements(self, parameter: torch.Tensor) -> int:
        """Elements of the weight that a parameter stands for."""
        return parameter.numel()

    def held(self, parameter: torch.Tensor) -> Iterable[torch.Tensor]:
        """The tensors in memory that a parameter is, without scales and tables."""
        return (parameter,)

    def state(self, module: Any) -> Iterable[torch.Tensor]:
        """The scales and tables that ``module`` needs to use its weight."""
        return ()

    def memory_footprint(self, model: Any) -> int:
        """transformers' own figure: parameters and buffers, without quantization state."""
        return int(model.get_memory_footprint())

    def prepare(self, model: Any, device: str) -> int:
        """Have a loaded model's layers take kernels that can run them. Returns how many take a slower one; may be
        called again."""
        return 0


class MethodWeights(PlainWeights, ABC):
    """One library's methods: how a checkpoint is made, and how what was loaded of one is counted.

    ``why_whole`` says why the whole model is built to write a checkpoint; None where it is written tensor by tensor.
    """

    why_whole: str | None = None

    # Writing

    @abstractmethod
    def quantization_config(self, scheme: Scheme, skips: list[str] | None) -> Any:
        """transformers' own config of the scheme; ``skips`` is its whole list of modules to leave alone, None for its
        default."""

    @abstractmethod
    def packing(self, scheme: Scheme) -> Packing:
        """How the scheme stores a weight; a StreamedPacking where checkpoints are written tensor by tensor."""

    @abstractmethod
    def packing_of_config(self, config: Any) -> Packing:
        """The same of a published checkpoint, by transformers' own config. Raises SourceCorrupt where that is none."""

    def streamed_packing(self, scheme: Scheme) -> StreamedPacking:
        packing = self.packing(scheme)
        if not isinstance(packing, StreamedPacking):
            raise TypeError(f"{scheme.method} is not written tensor by tensor")
        return packing

    def why_not_on(self, description: MethodDescription, device: str) -> str | None:
        """Why the method does not work on this device; None where it does."""
        return None

    def why_not_loaded(self, names: Iterable[str]) -> str | None:
        """Why a checkpoint of a model whose state has those names could not be loaded again; None where it can."""
        return None

    def files_with_unsorted_metadata(self, folder: Path) -> Iterable[Path]:
        """Those of the weight files in which ``save_pretrained`` leaves an order to chance."""
        return ()

    @abstractmethod
    def figures(self, exact: torch.Tensor, weight: Any) -> torch.Tensor:
        """The FIGURES of a quantized parameter that was ``exact``."""

    def audit(self, pieces: list[dict[str, float]]) -> dict[str, Any]:
        """What the FIGURES of all weights' pieces say beyond the errors, by the audit's own names."""
        return {}

    def is_state_name(self, name: str) -> bool:
        """Whether a tensor of that name in a model's state is scales or tables, whose values nobody asks about."""
        return False

    # A published checkpoint

    def has_content(self, name: str) -> bool:
        """Whether what the tensor of that name holds follows from the config, beside its dtype and shape."""
        return False

    def content_problems(self, path: Path, tensor: TensorInfo, needed: torch.Tensor) -> list[str]:
        """What is wrong with such a tensor in the file ``path``; ``needed`` is what it should be."""
        return []

    @abstractmethod
    def quiet_import(self) -> None:
        """Import the library without its warnings and downloads."""
