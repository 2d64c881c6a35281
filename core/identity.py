"""The identity of a job's checkpoint: a hash over everything that decides its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version

from qbatch.core.digest import Checksums, FileDigest, root_sha256
from qbatch.core.domain import DeviceKind, DType, JobSpec, Protocol, Scheme, content_hash, stored_dtype
from qbatch.core.errors import Unsupported
from qbatch.core.file_stat import FileStat
from qbatch.core.methods.registry import Method, missing_library

# Increase this when a change in this package changes the bytes of checkpoints.
_WRITER = "1"
# Increase this when a change in this package changes what a search measures, or how it is stored.
_SEARCH_FORMAT = "4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A job whose source and device kind are known, so that none of its options is AUTO.

    ``key`` identifies the checkpoint: a hash of source, scheme, dtype, device kind, and the library versions that
    write it. Where it is an adapter, ``base_key`` is that of the checkpoint that it belongs to. Of a search the key
    identifies what the search measures: a hash of the same and of its protocol.
    """

    dtype: DType
    scheme: Scheme
    protocol: Protocol
    key: str
    base_key: str | None = None


def settle(
    spec: JobSpec, *, fingerprint: str, source: DType, device_kind: DeviceKind, skip_list: tuple[str, ...] | None = None
) -> Settled:
    """Resolve the AUTO options of ``spec`` for a source of that fingerprint and dtype on that device (CUDA or CPU).

    ``skip_list`` is what the scheme's ``skip_modules`` mean for this model, and is hashed in their place, so that two
    spellings are one checkpoint; None if they are to be hashed as they were spelt, as version 0.1.0 did.
    """
    dtype = stored_dtype(spec.dtype, source)
    scheme = spec.scheme.resolved(dtype)
    hashed = scheme if skip_list is None else replace(scheme, skip_modules=skip_list)
    search = {} if spec.search is None else {"search": {"format": _SEARCH_FORMAT, **spec.search.protocol.to_json()}}

    def key_of(stored: Scheme) -> str:
        return content_hash(
            {
                "fingerprint": fingerprint,
                "scheme": stored.to_json(),
                "dtype": dtype,
                "device": device_kind,
                "versions": dict(writer_versions(scheme.method)),
                **search,
            }
        )

    return Settled(
        dtype=dtype,
        scheme=scheme,
        protocol=spec.protocol.for_device(device_kind),
        key=key_of(hashed),
        base_key=None if scheme.recovery is None else key_of(hashed.base),
    )


def settle_base(settled: Settled) -> Settled:
    """The job that makes the checkpoint to which an adapter belongs. A job without an adapter is returned as it is."""
    if settled.base_key is None:
        return settled
    return replace(settled, scheme=settled.scheme.base, key=settled.base_key, base_key=None)


def source_fingerprint(stats: Mapping[str, FileStat], known: Mapping[FileStat, Checksums]) -> str | None:
    """The identity of a source, from the hashes of its files; None unless each was hashed in its current state."""
    if any(stat not in known for stat in stats.values()):
        return None
    digests = (
        FileDigest(name=name, size=stat.size, chunk_sha256=known[stat].chunk_sha256) for name, stat in stats.items()
    )
    return fingerprint_of(root_sha256(digests))


def fingerprint_of(root: str, *, runs_code: bool = False) -> str:
    """The identity of a source whose files have that root hash. With its own code running, it is another model."""
    return f"sha256:{root}+code" if runs_code else f"sha256:{root}"


@cache
def writer_versions(method: Method) -> Mapping[str, str]:
    """The versions that decide a checkpoint's bytes. Each is read from a file, and a batch asks for every job.

    Raises Unsupported where a library of the method is not installed here.
    """
    if (missing := missing_library(method.description)) is not None:
        raise Unsupported(missing)
    libraries = (*method.description.libraries, *method.description.also_depends_on, "transformers")
    # A package's builds for CPUs and for CUDA are of one version.
    return {name: version(name).partition("+")[0] for name in libraries} | {"writer": _WRITER}
