"""Writes the files of one target while its source is streamed."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qbatch.core.digest import FileDigest, digest_file
from qbatch.core.errors import JobError
from qbatch.core.sources import INDEX_NAME
from qbatch.worker.files.staging import require_space
from qbatch.worker.methods.implementations import weights_of
from qbatch.worker.quantizing.faults import as_job_error
from qbatch.worker.quantizing.planning.audit import error_audit
from qbatch.worker.quantizing.planning.layout import FileLayout, lay_out
from qbatch.worker.quantizing.planning.loading import TracedModel, Weight
from qbatch.worker.quantizing.planning.saving import Output, Shards
from qbatch.worker.quantizing.planning.space import allocated_bytes
from qbatch.worker.quantizing.streaming.output_file import OutputFile
from qbatch.worker.quantizing.tensors.trace import QuantizedPart


class TargetWriter:
    """One target's files, open for writing from any thread. After a failure, further writes are ignored."""

    def __init__(
        self,
        loaded: TracedModel,
        shards: Shards,
        offsets: Mapping[str, float],
        on_write: Callable[[int], None],
        writers: int,
        reserved_bytes: int,
    ) -> None:
        """Create the files. ``offsets`` are the means that double quantization subtracts, by parameter name;
        ``reserved_bytes`` is the disk space that other targets still need. Raises DiskFull, StorageError or OSError."""
        self.loaded = loaded
        self.offsets = offsets
        self.error: JobError | None = None
        self._on_write = on_write
        self._lock = threading.Lock()
        self._figures: dict[str, list[Sequence[float]]] = defaultdict(list)
        self._not_finite: set[str] = set()
        folder = loaded.target.folder
        layouts = [lay_out(name, outputs) for name, outputs in shards.files.items()]
        self.size = sum(layout.size for layout in layouts)
        require_space(folder, self.size + loaded.target.beside_bytes, reserved_bytes)
        self._files: list[OutputFile] = []
        try:
            self._open(folder, layouts, shards.index, writers)
        except BaseException:
            self.close()
            raise

    def _open(self, folder: Path, layouts: Sequence[FileLayout], index: str | None, writers: int) -> None:
        for layout in layouts:
            self._files.append(OutputFile(folder, layout, writers))
        self._places = {name: (file, start) for file in self._files for name, start in file.layout.starts.items()}
        self._parts = {
            (output.content.weight, output.content.key): output.name
            for output in self.outputs()
            if isinstance(output.content, QuantizedPart)
        }
        self._write_known(index)

    def _write_known(self, index: str | None) -> None:
        """Write everything that is known without reading the source: the index, and tensors with fixed bytes."""
        for file in self._files:
            self._on_write(len(file.layout.head))
        if index is not None:
            (self.loaded.target.folder / INDEX_NAME).write_text(index, encoding="utf-8")
        for output in self.outputs():
            if isinstance(output.content, bytes):
                self.write(output.name, output.content, 0)

    def unwritten_bytes(self) -> int:
        """The disk space that this target still needs beyond what is allocated to its files. Raises OSError."""
        allocated = allocated_bytes(self.loaded.target.folder / file.layout.name for file in self._files)
        return max(0, self.size - allocated) + self.loaded.target.beside_bytes

    def outputs(self) -> list[Output]:
        return [output for file in self._files for output in file.layout.outputs]

    def write(self, name: str, data: bytes | memoryview, offset: int) -> None:
        """Write ``data`` at byte ``offset`` of the tensor ``name``. An OSError fails this target, and is not raised."""
        if self.error is not None:
            return
        file, start = self._places[name]
        try:
            file.write(data, start + offset)
        except OSError as error:
            self.fail(error)
            return
        self._on_write(len(data))

    def write_part(self, weight: Weight, key: str, data: memoryview, first_value: int) -> None:
        """Write the part ``key`` of a quantized piece, whose first value is number ``first_value`` of the weight."""
        offset = self.loaded.packing.part_start(key, first_value, weight.shape[1])
        self.write(self._parts[weight.name, key], data, offset)

    def add_figures(self, weight: Weight, figures: Sequence[float]) -> None:
        """Record a piece's FIGURES for the audit."""
        with self._lock:
            self._figures[weight.name].append(figures)

    def note_not_finite(self, name: str) -> None:
        """Record for the audit that the unquantized tensor ``name`` contains a NaN or an infinity."""
        with self._lock:
            self._not_finite.add(name)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if self.error is None:
                self.error = as_job_error(error)

    def digests(self) -> tuple[FileDigest, ...]:
        """Checksums of all files in the target's folder. Raises ValueError if a weight file is incomplete."""
        weights = [file.digest() for file in self._files]
        known = {digest.name for digest in weights}
        others = [digest_file(path) for path in self.loaded.target.folder.iterdir() if path.name not in known]
        return tuple(sorted([*weights, *others], key=lambda digest: digest.name))

    def close(self) -> None:
        for file in self._files:
            file.close()

    def error_audit(self) -> dict[str, Any]:
        return error_audit(weights_of(self.loaded.target.scheme.description), self._figures, self._not_finite)
