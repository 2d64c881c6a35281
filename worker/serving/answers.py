"""Which jobs of a bundle need no work, once their source is known."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from sqlalchemy.orm import Session

from qbatch.core.domain import Claim
from qbatch.core.errors import DatabaseUnreachable
from qbatch.core.storage import Standing, standing
from qbatch.models_db import checkpoints, jobs, results
from qbatch.models_db.results import Finished
from qbatch.models_db.session import Database
from qbatch.worker.runner.messages import Answered, CheckpointVerified, JobIdentity, Resolved

log = logging.getLogger("qbatch.worker")

_Standings = Mapping[str | None, Standing]
"""By the checkpoint's path; a baseline's is None."""


class Answers:
    """Earlier results for a bundle's jobs, measured on a device of the same name."""

    def __init__(self, database: Database, storage: Path, device_name: str, claims: Mapping[int, Claim]) -> None:
        self._database = database
        self._storage = storage
        self._device_name = device_name
        self._claims = claims
        # By path: what the runner was asked to read, and what it found to be as it was published.
        self._asked: set[str] = set()
        self._verified: set[str] = set()

    def find(self, resolved: Resolved) -> Answered:
        """End the jobs that an earlier result answers, and hand back those whose checkpoint another runner writes now:
        neither is to be worked on. While a checkpoint is doubtful, nothing is decided."""
        wanted = {n: identity for n, identity in resolved.jobs.items() if not self._claims[n].spec.force}
        try:
            with self._database.read() as session:
                self._database.require_own(session)
                found = self._found(session, wanted)
            stand = {one.checkpoint_path: self._standing(one) for answers in found for one in answers.values()}
            doubtful = self._doubtful(found, stand)
            if doubtful:
                self._asked |= doubtful.keys()
                return Answered(job_ids=frozenset(), doubtful=doubtful)
            sound = _sound(found, stand, whole=len(wanted))
            with self._database.write() as session:
                self._database.require_own(session)
                return self._record(session, resolved, sound)
        except DatabaseUnreachable as error:
            log.warning("%s; measuring anew", error)
            return Answered(job_ids=frozenset())

    def verified(self, message: CheckpointVerified) -> None:
        """The runner read a checkpoint that was doubtful."""
        published = message.published
        self._verified.add(published.path)
        try:
            with self._database.write() as session:
                self._database.require_own(session)
                checkpoints.verified_again(session, published.path, published.versions)
        except DatabaseUnreachable as error:
            log.warning("%s; that %s was verified is not recorded", error, published.path)

    def _found(self, session: Session, wanted: Mapping[int, JobIdentity]) -> list[dict[int, Finished]]:
        """By job, what may answer: results of this content, and results of 0.1.0 where those are for every job and the
        others are not."""
        new = self._by_key(session, {n: (one.key, one.protocol_hash) for n, one in wanted.items()})
        legacy = {n: (one.legacy_key, one.protocol_hash) for n, one in wanted.items() if one.legacy_key is not None}
        if len(new) == len(wanted) or len(legacy) < len(wanted):
            return [new]
        old = self._by_key(session, legacy)
        return [new, old] if len(old) == len(wanted) else [new]

    def _doubtful(self, found: Sequence[Mapping[int, Finished]], stand: _Standings) -> dict[str, str]:
        """The checkpoints, by path, that nobody was asked to read yet; each with its key."""
        return {
            str(one.checkpoint_path): one.checkpoint_key
            for answers in found
            for one in answers.values()
            if one.checkpoint_path not in self._asked and stand[one.checkpoint_path] is Standing.DOUBTFUL
        }

    def _by_key(self, session: Session, pairs: Mapping[int, tuple[str, str]]) -> dict[int, Finished]:
        found = results.find_finished(session, set(pairs.values()), device_names=[self._device_name])
        return {n: found[pair] for n, pair in pairs.items() if pair in found}

    def _standing(self, found: Finished) -> Standing:
        if found.checkpoint_path is None or found.checkpoint_path in self._verified:
            return Standing.SOUND
        return standing(self._storage, found.checkpoint_path, found.versions)

    def _record(self, session: Session, resolved: Resolved, sound: Mapping[int, Finished]) -> Answered:
        for job_id, identity in sorted(resolved.jobs.items()):
            jobs.note(session, self._token(job_id), checkpoint_key=identity.key)
        kept = results.keep(session, {one.job_id for one in sound.values()})
        answered = {
            n
            for n, one in sorted(sound.items())
            if one.job_id in kept and jobs.answer(session, self._token(n), one.job_id)
        }
        paths = checkpoints.paths(session, {identity.key for identity in resolved.jobs.values()})
        open_ = {n: one.key for n, one in resolved.jobs.items() if n not in answered and one.key not in paths}
        waiting = self._written_elsewhere(session, open_)
        jobs.hand_back(session, [self._token(job_id) for job_id in waiting])
        for job_id in sorted(answered):
            log.info("j%s is answered by an earlier result", job_id)
        for job_id in sorted(waiting):
            log.info("j%s goes back to the queue: another runner writes its checkpoint", job_id)
        return Answered(job_ids=frozenset(answered | waiting), paths=paths)

    def _written_elsewhere(self, session: Session, keys: Mapping[int, str]) -> set[int]:
        """Which of the jobs, by the keys of checkpoints that are not there yet."""
        quantized = {n: key for n, key in keys.items() if not self._claims[n].spec.scheme.is_baseline}
        written = jobs.keys_being_written(session, set(quantized.values()), but_by=self._claims.keys())
        return {n for n, key in quantized.items() if key in written}

    def _token(self, job_id: int) -> jobs.Token:
        return (job_id, self._claims[job_id].attempt)


def _sound(found: Sequence[Mapping[int, Finished]], stand: _Standings, *, whole: int) -> dict[int, Finished]:
    """By job, what answers. What 0.1.0 measured answers a bundle as a whole or not at all: its source has another name
    there, and nothing that is measured now could be set beside it."""
    new, *old = (
        {n: one for n, one in answers.items() if stand[one.checkpoint_path] is Standing.SOUND} for answers in found
    )
    return next((answers for answers in old if len(answers) == whole), new)
