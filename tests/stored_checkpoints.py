"""Checkpoints of made-up models on a storage, published through the real function and recorded as a worker does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import update

from qbatch.core.digest import digest_file
from qbatch.core.domain import DeviceKind, DType, Method, Scheme
from qbatch.core.measured.details import Details
from qbatch.core.settings import Settings
from qbatch.models_db import checkpoints, jobs
from qbatch.models_db.database_id import database_id
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job
from qbatch.worker.checkpoints.publish import Origin, publish
from qbatch.worker.checkpoints.published import Verified
from qbatch.worker.files.staging import stage
from tests.rows import PROTOCOL, a_batch, a_worker, bundle, claim, measured

# 4 bits are smaller, and near enough.
_KL = {Method.NF4: 0.01, Method.INT8: 0.002}
_WEIGHTS_BYTES = {Method.NF4: 4, Method.INT8: 8}
WEIGHTS = b"weights" * 100


def key_of(model: str, method: Method = Method.NF4) -> str:
    return hashlib.sha256(f"{model} {method}".encode()).hexdigest()


def put_checkpoint(
    settings: Settings,
    model: str,
    method: Method = Method.NF4,
    *,
    database: str | None = None,
    names: Sequence[str] = (),
) -> Verified:
    """Publish one. ``database`` is the id of the one whose job does it; ``names`` are files beside the weights."""
    folder = stage(settings.staging / "w", 1, 1)
    for name in ("model.safetensors", *names):
        (folder / name).write_bytes(WEIGHTS)
    return publish(
        folder,
        storage=settings.storage,
        source=folder,
        key=key_of(model, method),
        origin=Origin(
            model=model,
            revision=None,
            fingerprint="f",
            scheme=Scheme(method=method),
            dtype=DType.BFLOAT16,
            device_kind="cpu",
            device_name="a CPU",
            versions={},
            database=database,
        ),
        files=[digest_file(folder / "model.safetensors")],
        audit={},
        quantize_s=1.0,
        confirm=lambda: None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A batch whose jobs succeeded; ``paths`` and ``folders`` are of its checkpoints, in job order."""

    batch_id: int
    job_ids: list[int]
    paths: list[str]
    folders: list[Path]


def identity_of(database: Database) -> str:
    with database.read() as session:
        return database_id(session)


def set_key(database: Database, job_id: int, key: str) -> None:
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(checkpoint_key=key))


def a_measured_batch(database: Database, settings: Settings, model: str, *methods: Method) -> Made:
    """A batch of one model, quantized and measured."""
    methods = methods or (Method.NF4,)
    batch_id, ids = a_batch(database, bundle(model, *methods))
    paths = []
    own = identity_of(database)
    details = Details.from_json({"task": "causal-lm", "quality": {"rows": 1000}})
    # The widest is claimed first.
    tokens = sorted(claim(database, ids, a_worker(database)))
    for token, method in zip(tokens, methods, strict=True):
        published = put_checkpoint(settings, model, method, database=own).published
        set_key(database, token[0], published.key)
        with database.write() as session:
            checkpoints.record(
                session,
                key=published.key,
                path=published.path,
                root_sha256=published.root_sha256,
                disk_bytes=published.disk_bytes,
                job_id=token[0],
            )
            assert jobs.succeed(
                session,
                token,
                replace(measured(), kl_mean=_KL[method], weights_bytes=_WEIGHTS_BYTES[method], details=details),
                protocol=PROTOCOL.for_device(DeviceKind.CPU),
                checkpoint_path=published.path,
            )
        paths.append(published.path)
        logs = settings.logs_of(own)
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"j{token[0]}-1.log").write_text("said")
    return Made(batch_id=batch_id, job_ids=ids, paths=paths, folders=[settings.storage / path for path in paths])
