"""The interface that each method implements in the worker."""

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
    """How the weights of a loaded model are counted. This class itself is for unquantized models.

    ``libraries`` are the packages that the method computes with, besides torch and transformers.
    """

    libraries: tuple[str, ...] = ()

    def is_quantized(self, parameter: torch.Tensor) -> bool:
        return False

    def logical_elements(self, parameter: torch.Tensor) -> int:
        """The number of values that ``parameter`` represents after dequantization."""
        return parameter.numel()

    def held(self, parameter: torch.Tensor) -> Iterable[torch.Tensor]:
        """The tensors that hold the parameter's data in memory, without scales and tables."""
        return (parameter,)

    def state(self, module: Any) -> Iterable[torch.Tensor]:
        """The scales and tables that ``module`` needs to use its weight."""
        return ()

    def memory_footprint(self, model: Any) -> int:
        """transformers' own figure in bytes: parameters and buffers, without quantization state."""
        return int(model.get_memory_footprint())

    def why_not_captured(self, model: Any) -> str | None:
        """Why a decode step of a loaded model is known not to fit in a CUDA graph; None if it may."""
        return None

    def prepare(self, model: Any, device: str) -> int:
        """Select kernels that can run the layers of a loaded model. Returns how many layers use a slower kernel. May be
        called repeatedly."""
        return 0

    def use_generic_kernels(self, model: Any) -> None:
        """Restore each weight in the model's dtype before it is multiplied, as other engines do, and round once more
        than a kernel does that multiplies with the codes. Round to that dtype what an engine may hold in it. To be
        called before the first pass."""

    def quantize_rest(self, model: Any) -> tuple[str, ...]:
        """Replace each 16-bit layer by what an engine makes of it that quantizes everything while loading. Returns the
        layers' last names, none if no engine is known to do that."""
        return ()


class MethodWeights(PlainWeights, ABC):
    """The methods of one library: how a checkpoint is written, and how a loaded checkpoint is counted.

    ``why_whole`` is the reason if checkpoints are written by building the whole model; None if they are written tensor
    by tensor.
    """

    why_whole: str | None = None

    # Writing

    @abstractmethod
    def quantization_config(self, scheme: Scheme, skips: list[str] | None) -> Any:
        """transformers' quantization config for the scheme. ``skips`` is the complete list of modules to leave
        unquantized; None for transformers' default."""

    @abstractmethod
    def packing(self, scheme: Scheme) -> Packing:
        """How the scheme stores a weight. A StreamedPacking if checkpoints are written tensor by tensor."""

    @abstractmethod
    def packing_of_config(self, config: Any) -> Packing:
        """How a published checkpoint stores a weight, by transformers' quantization config. Raises SourceCorrupt if the
        config is not one that qbatch writes."""

    def streamed_packing(self, scheme: Scheme) -> StreamedPacking:
        """``packing`` for the streaming writer. Raises TypeError if the method cannot be streamed."""
        packing = self.packing(scheme)
        if not isinstance(packing, StreamedPacking):
            raise TypeError(f"{scheme.method} is not written tensor by tensor")
        return packing

    def why_not_on(self, description: MethodDescription, device: str) -> str | None:
        """Why the method does not work on ``device`` ("cpu" or "cuda:N"); None if it does."""
        return None

    def why_not_loaded(self, names: Iterable[str]) -> str | None:
        """Why a checkpoint whose state dict has these ``names`` could not be loaded again; None if it can."""
        return None

    def files_with_unsorted_metadata(self, folder: Path) -> Iterable[Path]:
        """The weight files whose metadata ``save_pretrained`` writes in random order."""
        return ()

    @abstractmethod
    def figures(self, exact: torch.Tensor, weight: Any) -> torch.Tensor:
        """The FIGURES of a quantized parameter, float64 [4]; ``exact`` are its values before quantization."""

    def audit(self, pieces: list[dict[str, float]]) -> dict[str, Any]:
        """The method's own entries in the audit, from the FIGURES of all pieces of all weights."""
        return {}

    def is_state_name(self, name: str) -> bool:
        """Whether the tensor ``name`` of a state dict holds scales or tables, which are not checked for NaN."""
        return False

    def restored(self, weight: Any) -> torch.Tensor:
        """What a quantized parameter stands for: float32 [rows, columns]. Only for methods that quantize nothing but
        weights."""
        raise NotImplementedError(f"{type(self).__name__} cannot restore a weight")

    # A published checkpoint

    def has_content(self, name: str) -> bool:
        """Whether the config determines the content of the tensor ``name``, not only its dtype and shape."""
        return False

    def content_problems(self, path: Path, tensor: TensorInfo, needed: torch.Tensor) -> list[str]:
        """What is wrong with the content of such a tensor in the file ``path``, one line each; ``needed`` is the
        expected tensor."""
        return []

    @abstractmethod
    def quiet_import(self) -> None:
        """Import the library without its warnings and downloads."""
