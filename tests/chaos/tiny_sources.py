"""The tiny models that the batches are of: made when they are first needed, the same for every stack."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from qbatch.core.identity import fingerprint_of
from qbatch.core.model_files import content_files
from qbatch.core.storage import MANIFEST
from qbatch.worker.files.content import NoDigestCache, hash_content
from tests import tiny

_TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
# Of a model's later weights: no number of a model is as high.
_LATER = 10**6


class Sources:
    """Models in a folder, by number. ``changed`` are the folders whose weights were rewritten after they were made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._seeds: dict[Path, int] = {}
        self._versions: dict[str, Mapping[str, torch.Tensor]] = {}
        self._newest: dict[Path, str] = {}
        self.changed: set[Path] = set()

    def __contains__(self, folder: Path) -> bool:
        return folder in self._seeds

    def model(self, number: int) -> Path:
        """The folder of that model, made unless it is there."""
        folder = self._folder / f"m{number}"
        with self._lock:
            if folder not in self._seeds:
                _make(folder, number, seed=number)
                self._seeds[folder] = number
                self._remember(folder)
        return folder

    def rewrite(self, folder: Path) -> None:
        """Put other weights into its files, byte for byte in place, as a training run that goes on does."""
        with self._lock:
            self.changed.add(folder)
            self._seeds[folder] += _LATER
            fresh = folder.with_name(f".{folder.name}")
            _make(fresh, int(folder.name.removeprefix("m")), seed=self._seeds[folder])
            for file in fresh.glob("*.safetensors"):
                content, target = file.read_bytes(), folder / file.name
                assert len(content) == target.stat().st_size
                with target.open("r+b") as opened:
                    opened.write(content)
            shutil.rmtree(fresh)
            self._remember(folder)

    def _remember(self, folder: Path) -> None:
        (weights,) = folder.glob("*.safetensors")
        # Copies: what is loaded is mapped from the file, and would change with it.
        tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
        self._newest[folder] = fingerprint_of_folder(folder)
        self._versions[self._newest[folder]] = tensors

    def is_of_former_weights(self, checkpoint: Path) -> bool:
        """Whether the weights that its manifest names were rewritten since."""
        return _named_by(checkpoint) in self._versions.keys() - self._newest.values()

    def differences(self, checkpoint: Path) -> Iterator[str]:
        """What of a checkpoint was not made of the weights that its manifest names: what is left unquantized tells."""
        version = self._versions.get(_named_by(checkpoint))
        if version is None:
            yield "is of weights that never were"
            return
        (weights,) = checkpoint.glob("*.safetensors")
        plain = {name: tensor for name, tensor in load_file(weights).items() if tensor.is_floating_point()}
        others = [
            name
            for name in plain.keys() & version.keys()
            if not torch.equal(version[name].to(plain[name].dtype), plain[name])
        ]
        if others:
            yield f"has {', '.join(sorted(others))} of other weights than it says"


def _named_by(checkpoint: Path) -> str:
    return str(json.loads((checkpoint / MANIFEST).read_text())["source"]["fingerprint"])


def fingerprint_of_folder(folder: Path) -> str:
    """What a worker calls the model in ``folder`` as it is now."""
    return fingerprint_of(hash_content(lambda: content_files(folder), NoDigestCache()).root_sha256)


def is_encoder(folder: Path) -> bool:
    return int(folder.name.removeprefix("m")) % 4 == 3


def _make(folder: Path, number: int, *, seed: int) -> None:
    transformers_logging.disable_progress_bar()
    if is_encoder(folder.with_name(f"m{number}")):
        tiny.make_encoder(folder, "masked-lm", seed=seed, **_TINY, intermediate_size=64)
    elif number % 4 == 2:
        tiny.make_causal(folder, "bloom", seed=seed, hidden_size=64, n_layer=1, n_head=2)
    else:
        tiny.make_causal(folder, dtype="bfloat16", seed=seed, **_TINY, intermediate_size=64, num_key_value_heads=2)
