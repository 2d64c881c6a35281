"""What makes two jobs the same: everything about a job settled, and hashed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from models_db.domain import DeviceKind, DType, JobSpec, Protocol, Scheme, content_hash, stored_dtype

# Rises when this package's own writing changes a checkpoint's bytes.
_WRITER = "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A job whose source and device kind are known: nothing about it is AUTO any more.

    ``key`` is the checkpoint's identity: source, scheme, dtype, device kind, and the versions that write it.
    """

    dtype: DType
    scheme: Scheme
    protocol: Protocol
    key: str


def settle(spec: JobSpec, *, fingerprint: str, source: DType, device_kind: DeviceKind) -> Settled:
    """Settle ``spec`` for a source of that fingerprint and dtype on a device of that kind (CUDA or CPU)."""
    dtype = stored_dtype(spec.dtype, source)
    scheme = spec.scheme.resolved(dtype)
    key = content_hash(
        {
            "fingerprint": fingerprint,
            "scheme": scheme.to_json(),
            "dtype": dtype,
            "device": device_kind,
            "versions": writer_versions(),
        }
    )
    return Settled(dtype=dtype, scheme=scheme, protocol=spec.protocol.for_device(device_kind), key=key)


def writer_versions() -> dict[str, str]:
    """The versions that decide a checkpoint's bytes."""
    return {"bitsandbytes": version("bitsandbytes"), "transformers": version("transformers"), "writer": _WRITER}
