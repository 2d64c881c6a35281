"""The base's side of a comparison: computed once for a model and protocol, stored, and shared by every width.

A reference is a folder: one safetensors file for each probe, and ``reference.json``, written last. It appears by a
rename, so a reader sees a whole one or none, and of two writers the first wins. Files are on the disk before that; what
a disk spoils all the same is removed by the next reader, and made anew.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from qbatch.core.digest import digest_file, root_sha256
from qbatch.core.domain import DType, Protocol, content_hash
from qbatch.core.errors import BenchmarkError, StorageError
from qbatch.core.filesystem import IS_TAKEN, move, storage_fault, sync, touch
from qbatch.core.measured.quality_figures import Quality, QualityFloor
from qbatch.worker.files.reference_folders import DESCRIPTION, IN_USE_S, beside, litter, occupants, remove
from qbatch.worker.measuring.quality.divergence import Divergence, divergence, summarize_divergence
from qbatch.worker.measuring.quality.floor import arithmetic_floor
from qbatch.worker.measuring.quality.probes import Probe, probes_hash, probes_of
from qbatch.worker.measuring.quality.replay import embedding_of, head_sha256, hidden_and_logits, logits_of, replayed
from qbatch.worker.measuring.quality.similarity import compare_embeddings
from qbatch.worker.measuring.versions import device_name, versions
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel, translated

log = logging.getLogger("qbatch.runner")

DEFAULT_MAX_BYTES = 8 << 30
_FORMAT = 2
_PROBE = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The base's outputs on the probes of a protocol. ``form`` is what is stored: "hidden" (the output head's input,
    to be replayed), "logits", or "embedding". ``probes`` may be fewer than the protocol has, for want of room;
    ``probes_sha256`` is of their tokens, ``content_sha256`` of the stored outputs.
    ``floor`` is how far 16-bit arithmetic alone moves the base; None where that could not be measured."""

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
    """The name of the folder for the reference of a source (by its fingerprint), so run and so read.

    Of the protocol only what decides the probes: one reference serves every shape. The versions are part of it since
    other kernels may round differently.
    """
    found = versions()
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
            "torch": found["torch"],
            "transformers": found["transformers"],
        }
    )


def open_reference(folder: Path) -> Reference | None:
    """The reference stored in ``folder``, marked as used just now; None where there is none.

    One that is damaged is none, and is removed. Raises StorageError.
    """
    description = folder / DESCRIPTION
    try:
        if not folder.is_dir():
            return None
        reference = _sound(folder)
        if reference is None:
            log.warning("%s is damaged and will be made anew", folder)
            remove(folder)
            return None
        touch(description)
    except FileNotFoundError:  # another worker made room
        return None
    except OSError as error:
        raise StorageError(f"cannot read {description}: {error}") from error
    return reference


def _sound(folder: Path) -> Reference | None:
    """None where the description says nothing of use, or the outputs are not those that were stored: every byte is
    read, since a wrong one is a wrong figure. Raises OSError."""
    try:
        fields = json.loads((folder / DESCRIPTION).read_bytes())
        floor = None if fields["floor"] is None else QualityFloor.from_json(fields["floor"])
        reference = Reference(folder=folder, **fields | {"floor": floor})
        is_whole = _content_sha256(folder, reference.probes) == reference.content_sha256
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return reference if is_whole else None


def _content_sha256(folder: Path, probes: int) -> str:
    return root_sha256([digest_file(_probe(folder, number)) for number in range(probes)])


def prepare_reference(
    loaded: LoadedModel,
    protocol: Protocol,
    eval_text: str,
    folder: Path,
    *,
    staging: Path | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    confirm: Callable[[], None] = lambda: None,
) -> Reference | None:
    """Store in ``folder`` what the base in ``loaded`` says to the protocol's probes, or adopt what is there.

    ``folder``'s name must stand for what decides the outputs: see ``reference_name``. All references beside it stay
    under ``max_bytes`` together: the least recently used are removed, and if this one is larger by itself, it holds
    fewer probes (one at least). It is written in ``staging``, which must not be there yet, on the same file system:
    who may be killed names a place that somebody clears. ``confirm`` is called before it is put in its place, and what
    it raises leaves nothing there. None where the model has nothing to compare (no tokenizer).
    Raises StorageError, DiskFull, BenchmarkError, CudaOom, HostOom or DeviceError.
    """
    existing = open_reference(folder)
    if existing is not None:
        return existing
    with translated(BenchmarkError, "cannot keep the base's outputs"), _storage_errors(folder):
        probes = probes_of(loaded, protocol, eval_text)
        if not probes:
            return None
        _write(loaded, probes, folder, staging or beside(folder), max_bytes, confirm)
        _evict(folder.parent, keep=folder, max_bytes=max_bytes)
    return open_reference(folder)


def compare(loaded: LoadedModel, reference: Reference, protocol: Protocol, eval_text: str) -> Quality:
    """Set the model in ``loaded`` beside its base's ``reference``: the statistics of ``divergence`` or ``similarity``.

    Raises BenchmarkError where the two are not about the same tokens, or the output head is not the base's.
    """
    probes = probes_of(loaded, protocol, eval_text)[: reference.probes]
    if probes_hash(probes) != reference.probes_sha256:
        raise BenchmarkError("the base was measured on other tokens: another text, protocol or tokenizer")
    if reference.form == "hidden" and head_sha256(loaded.model) != reference.head_sha256:
        raise BenchmarkError("the checkpoint's output head is not its base's, so the base cannot be replayed")
    figures = _compare_embeddings if reference.form == "embedding" else _compare_logits
    return replace(
        figures(loaded, reference, probes),
        against=reference.form,
        base_device_name=reference.device_name,
        floor=reference.floor or QualityFloor(),
    )


def _compare_logits(loaded: LoadedModel, reference: Reference, probes: list[Probe]) -> Quality:
    found: list[Divergence] = []
    for number, probe in enumerate(probes):
        stored = _read(reference, number).to(loaded.device)
        base = replayed(loaded.model, stored, probe) if reference.form == "hidden" else stored
        if base.shape[-1] == 1:
            # The softmax of a single number is 1 whatever the number: the two would always agree.
            raise BenchmarkError("the model says a single number, which is no distribution to compare")
        found.append(divergence(base, logits_of(loaded.model, probe, loaded.device), probe.targets))
    return summarize_divergence(found)


def _compare_embeddings(loaded: LoadedModel, reference: Reference, probes: list[Probe]) -> Quality:
    base = torch.stack([_read(reference, number) for number in range(len(probes))])
    other = torch.stack([embedding_of(loaded.model, probe, loaded.device) for probe in probes])
    return compare_embeddings(base, other)


def _read(reference: Reference, number: int) -> torch.Tensor:
    path = _probe(reference.folder, number)
    try:
        return load_file(path)[_PROBE]
    except (SafetensorError, KeyError) as error:
        raise BenchmarkError(f"the base's outputs in {path} are damaged") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def _probe(folder: Path, number: int) -> Path:
    return folder / f"{number:04}.safetensors"


def _write(
    loaded: LoadedModel, probes: list[Probe], folder: Path, staging: Path, max_bytes: int, confirm: Callable[[], None]
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging.mkdir(parents=True)
    try:
        form, count = _write_probes(loaded, probes, staging, max_bytes)
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
        sync(*staging.iterdir(), staging)
        confirm()
        move(staging, folder)
        sync(folder.parent)
    except OSError as error:
        if error.errno not in IS_TAKEN:
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_probes(loaded: LoadedModel, probes: list[Probe], staging: Path, max_bytes: int) -> tuple[str, int]:
    """(form, number of probes written). Logits replace hidden states from the start where one does not replay."""
    if loaded.task is ModelKind.ENCODER:
        embeddings = (embedding_of(loaded.model, probe, loaded.device) for probe in probes)
        return "embedding", _write_all(embeddings, staging, max_bytes)
    hidden = (hidden_and_logits(loaded.model, probe, loaded.device)[0] for probe in probes)
    try:
        return "hidden", _write_all(hidden, staging, max_bytes)
    except _NotReplayable:
        logits = (logits_of(loaded.model, probe, loaded.device) for probe in probes)
        return "logits", _write_all(logits, staging, max_bytes)


class _NotReplayable(Exception):
    """A hidden state did not give its logits again."""


def _write_all(tensors: Iterator[torch.Tensor | None], staging: Path, max_bytes: int) -> int:
    written = 0
    for number, tensor in enumerate(tensors):
        if tensor is None:
            raise _NotReplayable
        # Not save_file, which gives the file mode 0600 whatever the umask says.
        content = save({_PROBE: tensor.cpu().contiguous()})
        written += len(content)
        if number and written > max_bytes:
            return number
        _probe(staging, number).write_bytes(content)
    return number + 1


def _evict(root: Path, *, keep: Path, max_bytes: int) -> None:
    """Remove the least recently used references of ``root`` until the rest have at most ``max_bytes``, and what
    writers and removers that were killed left behind."""
    for left in litter(root):
        shutil.rmtree(left, ignore_errors=True)
    kept = sorted(occupants(root))
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
        raise storage_fault(error)(f"cannot keep the base's outputs in {folder}: {error.strerror}") from error
