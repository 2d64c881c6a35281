"""Which batches and jobs a command is about: ``b12``, the name of a batch, ``latest``, ``j345``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qbatch.core.domain import LATEST, find_id, format_batch_id, format_job_id
from qbatch.core.errors import UsageError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from qbatch.models_db.session import Database

BATCH_WORDS = f"an id such as b12, the name of a batch, or {LATEST}"
TARGET_WORDS = f"an id such as b12 or j345, the name of a batch, or {LATEST}"
NO_BATCH = "there is no batch yet: `qbatch submit MODEL` stores one"
_SHOWN = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Batches and jobs that exist, each once."""

    batch_ids: tuple[int, ...] = ()
    job_ids: tuple[int, ...] = ()


def find_batches(database: Database, words: Sequence[str]) -> list[int]:
    """The ids of the batches that ``words`` mean, each once. Raises UsageError."""
    with database.read() as session:
        return list(dict.fromkeys(_find_batch(session, word.strip()) for word in words))


def find_targets(database: Database, words: Sequence[str]) -> Targets:
    """The batches and jobs that ``words`` mean. Raises UsageError."""
    batch_ids: dict[int, None] = {}
    job_ids: dict[int, None] = {}
    with database.read() as session:
        for word in (word.strip() for word in words):
            kind, number = find_id(word) or ("", 0)
            if kind == "j":
                _require_job(session, number)
                job_ids[number] = None
            else:
                batch_ids[_find_batch(session, word, takes_jobs=True)] = None
    return Targets(batch_ids=tuple(batch_ids), job_ids=tuple(job_ids))


def find_job(database: Database, word: str) -> int:
    """The job that ``word`` means. Raises UsageError."""
    found = find_id(word.strip())
    if found is None or found[0] != "j":
        raise UsageError(f"{word[:_SHOWN]!r} is not a job id such as j345")
    with database.read() as session:
        _require_job(session, found[1])
    return found[1]


def _find_batch(session: Session, word: str, *, takes_jobs: bool = False) -> int:
    from qbatch.models_db.batch_names import batches_named, newest_batch
    from qbatch.models_db.batches import batch_exists

    found = find_id(word)
    if found is not None and found[0] == "j":
        raise UsageError(f"{word} is a job id; this command takes batches: {BATCH_WORDS}")
    if found is not None:
        if not batch_exists(session, found[1]):
            raise UsageError(f"no such batch: {word}")
        return found[1]
    if word == LATEST:
        newest = newest_batch(session)
        if newest is None:
            raise UsageError(NO_BATCH)
        return newest
    named = batches_named(session, word)
    if not named:
        what, words = ("batch or job", TARGET_WORDS) if takes_jobs else ("batch", BATCH_WORDS)
        raise UsageError(f"no such {what}: {word[:_SHOWN]!r} (use {words})")
    if len(named) > 1:
        ids = ", ".join(format_batch_id(batch_id) for batch_id in named[-5:])
        raise UsageError(f"{len(named)} batches have the name {word[:_SHOWN]!r}: use an id ({ids})")
    return named[0]


def _require_job(session: Session, job_id: int) -> None:
    from qbatch.models_db.batches import job_exists

    if not job_exists(session, job_id):
        raise UsageError(f"no such job: {format_job_id(job_id)}")
