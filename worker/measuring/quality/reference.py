"""Stored outputs of a baseline, with which its quantized models are compared: computed once per model and protocol.

A reference is a folder with a safetensors file for each probe, and ``reference.json``, which is written last. The
folder is renamed into place after its files are flushed to disk, so readers see a complete reference or none, and the
first of two writers wins. A reader that finds a damaged reference removes it, and it is computed again.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from qbatch.core.digest import digest_file, root_sha256
from qbatch.core.domain import DType, Protocol, content_hash
from qbatch.core.errors import BenchmarkError, StorageError
from qbatch.core.filesystem import OCCUPIED_ERRNOS, move, storage_fault, sync, touch
from qbatch.core.measured.quality_figures import (
    BASE_OUTPUTS_NOT_FINITE,
    ITS_OUTPUTS_NOT_FINITE,
    Quality,
    QualityFloor,
)
from qbatch.worker.files.reference_folders import (
    DESCRIPTION,
    IN_USE_S,
    abandoned_folders,
    remove,
    stored_references,
    temporary_name,
)
from qbatch.worker.files.writeback import start_writeback
from qbatch.worker.measuring.quality.divergence import Divergence, divergence, summarize_divergence
from qbatch.worker.measuring.quality.floor import arithmetic_floor
from qbatch.worker.measuring.quality.probes import Probe, probes_hash, probes_of
from qbatch.worker.measuring.quality.replay import (
    embedding_of,
    head_sha256,
    hidden_and_logits,
    logits_of,
    replayed_logits,
)
from qbatch.worker.measuring.quality.similarity import compare_embeddings
from qbatch.worker.measuring.versions import device_name, versions
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel, translated

log = logging.getLogger("qbatch.runner")

DEFAULT_MAX_BYTES = 8 << 30
OnWindow = Callable[[int, int, Probe, torch.Tensor], None]
_FORMAT = 3
_PROBE = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The base's outputs on the probes of a protocol.

    ``form``: what is stored, "hidden" (the inputs of the output head, from which it gives the logits again), "logits"
    or "embedding". ``probes``: their number, less than the protocol's if they would take too much space.
    ``probes_sha256`` is the hash of their tokens, ``content_sha256`` that of the stored outputs. ``floor``: how far
    16-bit arithmetic alone changes the base's outputs; None if that could not be measured.
    """

    folder: Path
    form: str
    probes: int
    probes_sha256: str
    content_sha256: str
    head_sha256: str | None
    model: str
    device_name: str
    floor: QualityFloor | None


def reference_name(*, fingerprint: str, dtype: DType, device_name: str, protocol: Protocol) -> str:
    """The folder name of the reference for a source (by its fingerprint), dtype, device and protocol.

    Only the protocol's fields that determine the probes count, so that all shapes share one reference. The versions
    count because other kernels may round differently.
    """
    installed = versions()
    return content_hash(
        {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "dtype": dtype.value,
            "device_name": device_name,
            "probes": {
                "text": protocol.eval_text_sha256,
                "window": protocol.eval_window,
                "stride": protocol.eval_stride,
                "windows": protocol.eval_max_windows,
            },
            "torch": installed["torch"],
            "transformers": installed["transformers"],
        }
    )


def open_reference(folder: Path) -> Reference | None:
    """The reference stored in ``folder``, marked as used just now; None if there is none.

    A damaged reference is removed and counts as none. Raises StorageError.
    """
    description = folder / DESCRIPTION
    try:
        if not folder.is_dir():
            return None
        reference = _read_if_intact(folder)
        if reference is None:
            log.warning("%s is damaged; it is removed and will be computed again", folder)
            remove(folder)
            return None
        touch(description)
    except FileNotFoundError:  # another worker removed it to free space
        return None
    except OSError as error:
        raise StorageError(f"cannot read {description}: {error}") from error
    return reference


def _read_if_intact(folder: Path) -> Reference | None:
    """Read the reference; None if its description is invalid or its outputs are not those that were stored.

    Every byte is checked, since a wrong one would give a wrong figure. Raises OSError.
    """
    try:
        fields = json.loads((folder / DESCRIPTION).read_bytes())
        floor = None if fields["floor"] is None else QualityFloor.from_json(fields["floor"])
        reference = Reference(folder=folder, **fields | {"floor": floor})
        is_whole = _content_sha256(folder, reference.probes) == reference.content_sha256
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return reference if is_whole else None


def _content_sha256(folder: Path, probes: int) -> str:
    # Side by side: they are hashed when they are written and each time that a model is compared with them.
    with ThreadPoolExecutor() as pool:
        return root_sha256(pool.map(digest_file, [_probe(folder, number) for number in range(probes)]))


def prepare_reference(
    loaded: LoadedModel,
    protocol: Protocol,
    eval_text: str,
    folder: Path,
    *,
    staging: Path | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    confirm: Callable[[], None] = lambda: None,
    on_window: OnWindow = lambda number, count, probe, logits: None,  # noqa: ARG005
) -> Reference | None:
    """Store the outputs of the base in ``loaded`` on the protocol's probes in ``folder``, unless already there.

    ``folder``: named by ``reference_name``. It and the references next to it take at most ``max_bytes`` together: the
    least recently used ones are removed, and a reference that is too large by itself holds fewer probes, but at least
    one. ``staging``: where to write it first, a path on the same file system that does not exist yet; a process that
    may be killed should pass one that is cleaned up later. ``confirm`` is called before the folder is renamed into
    place; if it raises, nothing is stored. ``on_window`` is called with what is computed of a model that predicts
    tokens: the number of each probe, from 0, how many there are, the probe, and its logits [rows, vocabulary]. Returns
    None if the model has nothing to compare (no tokenizer). Raises StorageError, DiskFull, BenchmarkError, CudaOom,
    HostOom or DeviceError.
    """
    existing = open_reference(folder)
    if existing is not None:
        return existing
    with translated(BenchmarkError, "cannot store the outputs of the baseline"), _storage_errors(folder):
        probes = probes_of(loaded, protocol, eval_text)
        if not probes:
            return None
        _write(loaded, probes, folder, staging or temporary_name(folder), max_bytes, confirm, on_window)
        _evict(folder.parent, keep=folder, max_bytes=max_bytes)
    return open_reference(folder)


def compare(
    loaded: LoadedModel,
    reference: Reference,
    protocol: Protocol,
    eval_text: str,
    on_probe: Callable[[int, int], None] = lambda number, count: None,  # noqa: ARG005
) -> Quality:
    """Compare the model in ``loaded`` with its base's ``reference``, by ``divergence`` or ``similarity``.

    ``on_probe`` is called with the number of each probe, from 1, and how many there are, before it is computed. Raises
    BenchmarkError if the tokens are not the same, or the output head is not the base's.
    """
    probes = probes_of(loaded, protocol, eval_text)[: reference.probes]
    if probes_hash(probes) != reference.probes_sha256:
        raise BenchmarkError("the baseline was measured on other tokens: its text, protocol or tokenizer differs")
    if reference.form == "hidden" and head_sha256(loaded.model) != reference.head_sha256:
        raise BenchmarkError(
            "the checkpoint's output head differs from the baseline's, so it cannot recompute the baseline's logits"
        )
    figures = _compare_embeddings if reference.form == "embedding" else _compare_logits
    return replace(
        figures(loaded, reference, probes, on_probe),
        against=reference.form,
        base_device_name=reference.device_name,
        floor=reference.floor or QualityFloor(),
    )


def _compare_logits(
    loaded: LoadedModel, reference: Reference, probes: list[Probe], on_probe: Callable[[int, int], None]
) -> Quality:
    divergences: list[Divergence] = []
    for number, probe in enumerate(probes):
        on_probe(number + 1, len(probes))
        stored = _read(reference, number).to(loaded.device)
        base = replayed_logits(loaded.model, stored, probe) if reference.form == "hidden" else stored
        if base.shape[-1] == 1:
            # The softmax of a single number is always 1, so the two models would always agree.
            raise BenchmarkError("the model outputs a single number, which is not a distribution that can be compared")
        found = divergence(base, logits_of(loaded.model, probe, loaded.device), probe.targets)
        if found.kl.isnan().any():
            # argmax takes the first NaN for the largest value, so the two models would always agree.
            raise _not_finite(base.isfinite().all())
        divergences.append(found)
    return summarize_divergence(divergences)


def _compare_embeddings(
    loaded: LoadedModel, reference: Reference, probes: list[Probe], on_probe: Callable[[int, int], None]
) -> Quality:
    base = torch.stack([_read(reference, number) for number in range(len(probes))])
    embeddings = []
    for number, probe in enumerate(probes):
        on_probe(number + 1, len(probes))
        embeddings.append(embedding_of(loaded.model, probe, loaded.device))
    other = torch.stack(embeddings)
    if not (base.isfinite().all() and other.isfinite().all()):
        raise _not_finite(base.isfinite().all())
    return compare_embeddings(base, other)


def _not_finite(is_base_finite: torch.Tensor) -> BenchmarkError:
    return BenchmarkError(ITS_OUTPUTS_NOT_FINITE if is_base_finite else BASE_OUTPUTS_NOT_FINITE)


def _read(reference: Reference, number: int) -> torch.Tensor:
    path = _probe(reference.folder, number)
    try:
        return load_file(path)[_PROBE]
    except (SafetensorError, KeyError) as error:
        raise BenchmarkError(f"the stored outputs of the baseline in {path} are damaged") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def _probe(folder: Path, number: int) -> Path:
    return folder / f"{number:04}.safetensors"


def _write(
    loaded: LoadedModel,
    probes: list[Probe],
    folder: Path,
    staging: Path,
    max_bytes: int,
    confirm: Callable[[], None],
    on_window: OnWindow,
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging.mkdir(parents=True)
    try:
        form, count = _write_probes(loaded, probes, staging, max_bytes, on_window)
        reference = Reference(
            folder=folder,
            form=form,
            probes=count,
            probes_sha256=probes_hash(probes[:count]),
            content_sha256=_content_sha256(staging, count),
            head_sha256=head_sha256(loaded.model) if form == "hidden" else None,
            model=type(loaded.model).__name__,
            device_name=device_name(loaded.device),
            floor=arithmetic_floor(loaded, probes),
        )
        fields = asdict(reference) | {"floor": None if reference.floor is None else reference.floor.to_json()}
        del fields["folder"]
        (staging / DESCRIPTION).write_text(json.dumps(fields), encoding="utf-8")
        with ThreadPoolExecutor() as pool:  # each waits for the disk
            list(pool.map(sync, staging.iterdir()))
        sync(staging)
        confirm()
        move(staging, folder)
        sync(folder.parent)
    except OSError as error:
        if error.errno not in OCCUPIED_ERRNOS:
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_probes(
    loaded: LoadedModel, probes: list[Probe], staging: Path, max_bytes: int, on_window: OnWindow
) -> tuple[str, int]:
    """(form, number of probes written). If a hidden state does not give its logits again, logits are stored for all."""
    if loaded.kind is ModelKind.ENCODER:
        embeddings = (embedding_of(loaded.model, probe, loaded.device) for probe in probes)
        return "embedding", _write_all(embeddings, staging, max_bytes)
    try:
        return "hidden", _write_all(_hidden(loaded, probes, on_window), staging, max_bytes)
    except _NotReplayable:
        return "logits", _write_all(_logits(loaded, probes, on_window), staging, max_bytes)


def _hidden(loaded: LoadedModel, probes: list[Probe], on_window: OnWindow) -> Iterator[torch.Tensor | None]:
    for number, probe in enumerate(probes):
        hidden, logits = hidden_and_logits(loaded.model, probe, loaded.device)
        on_window(number, len(probes), probe, logits)
        yield hidden


def _logits(loaded: LoadedModel, probes: list[Probe], on_window: OnWindow) -> Iterator[torch.Tensor]:
    for number, probe in enumerate(probes):
        logits = logits_of(loaded.model, probe, loaded.device)
        on_window(number, len(probes), probe, logits)
        yield logits


class _NotReplayable(Exception):
    """The output head does not give the same logits again from a hidden state."""


def _write_all(tensors: Iterator[torch.Tensor | None], staging: Path, max_bytes: int) -> int:
    written = 0
    for number, tensor in enumerate(tensors):
        if tensor is None:
            raise _NotReplayable
        # Not save_file, which creates files with mode 0600 regardless of the umask.
        content = save({_PROBE: tensor.cpu().contiguous()})
        written += len(content)
        if number and written > max_bytes:
            return number
        with _probe(staging, number).open("wb") as file:
            file.write(content)
            file.flush()
            start_writeback(file.fileno(), 0, len(content))
    return number + 1


def _evict(root: Path, *, keep: Path, max_bytes: int) -> None:
    """Remove the least recently used references in ``root`` until the rest take at most ``max_bytes``.

    Also remove what killed processes left behind.
    """
    for folder in abandoned_folders(root):
        shutil.rmtree(folder, ignore_errors=True)
    kept = sorted(stored_references(root))
    total = sum(size for _, _, size in kept)
    for used_s, folder, size in kept:
        if total <= max_bytes or folder == keep or time.time() - used_s < IN_USE_S:
            continue
        total -= size
        remove(folder)


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_fault(error)(f"cannot store the outputs of the baseline in {folder}: {error.strerror}") from error
