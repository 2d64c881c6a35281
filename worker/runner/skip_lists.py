"""What the skip lists of a bundle's jobs mean for its source. Each spelling is resolved once."""

from __future__ import annotations

from qbatch.core.domain import DType, JobSpec, stored_dtype
from qbatch.worker.quantizing.faults import as_job_error, quiet
from qbatch.worker.sources.fetch import LocalSource


class SkipLists:
    """The skip lists of one source, which was checked, and whose own dtype is ``dtype``."""

    def __init__(self, source: LocalSource, dtype: DType) -> None:
        self._source, self._dtype = source, dtype
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}

    def of(self, spec: JobSpec) -> tuple[str, ...] | None:
        """The list to publish; None if nothing is to be skipped. Raises JobError if the model cannot be built."""
        asked = spec.scheme.skip_modules
        if not asked:
            return None
        if asked not in self._known:
            self._known[asked] = self._resolved(asked, stored_dtype(spec.dtype, self._dtype))
        return self._known[asked]

    def _resolved(self, asked: tuple[str, ...], dtype: DType) -> tuple[str, ...]:
        from qbatch.worker.quantizing.planning.skeleton import skip_list_of_source

        try:
            with quiet():
                return skip_list_of_source(self._source.folder, asked, dtype, trusted=self._source.runs_code)
        except Exception as error:
            raise as_job_error(error) from error
