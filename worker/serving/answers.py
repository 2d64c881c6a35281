"""Find earlier results that answer jobs of a bundle, once the content of their source is known."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sqlalchemy.orm import Session

from qbatch.core.domain import Claim
from qbatch.core.errors import DatabaseUnreachable
from qbatch.core.measured.known_speed import KnownSpeed
from qbatch.core.storage import CheckpointState, checkpoint_state
from qbatch.models_db import checkpoints, finished_results, jobs, searches, skip_list_keys
from qbatch.models_db.finished_results import Finished, FinishedPart
from qbatch.models_db.session import Database
from qbatch.models_db.speed_lookup import find_known_speeds
from qbatch.worker.runner.messages import Answered, CheckpointVerified, JobIdentity, Resolved

log = logging.getLogger("qbatch.worker")

_States = Mapping[str, CheckpointState]
"""The state of each checkpoint by its path."""


class Answers:
    """Looks for earlier results for the jobs of a bundle, measured on a device with the same name."""

    def __init__(self, database: Database, storage: Path, device_name: str, claims: Mapping[int, Claim]) -> None:
        self._database = database
        self._storage = storage
        self._device_name = device_name
        self._claims = claims
        # Paths of checkpoints that the runner was asked to read, and of those that it found to be intact.
        self._requested: set[str] = set()
        self._verified: set[str] = set()

    def find(self, resolved: Resolved) -> Answered:
        """Find out which jobs the runner need not work on, and record them.

        Jobs that an earlier result answers end here, and what an earlier search found answers searches. Jobs whose
        checkpoint another runner is writing are returned to the queue. If checkpoints must be read first to know
        whether they are intact, the answer lists only those.
        """
        wanted = {
            n: identity
            for n, identity in resolved.jobs.items()
            if not self._claims[n].spec.force and self._claims[n].spec.search is None
        }
        try:
            with self._database.read() as session:
                self._database.require_own(session)
                candidates = self._candidates(session, wanted)
            parts = [part for answers in candidates for one in answers.values() for part in one.parts]
            states = {part.path: self._state(part) for part in parts}
            unverified = self._unverified(candidates, states)
            if unverified:
                self._requested |= unverified.keys()
                return Answered(job_ids=frozenset(), unverified=unverified)
            sound = _sound(candidates, states, whole=len(wanted))
            with self._database.write() as session:
                self._database.require_own(session)
                answered = self._record(session, resolved, sound)
            return replace(answered, speeds=self._speeds(resolved, answered))
        except DatabaseUnreachable as error:
            log.warning("%s; measuring without looking for earlier results", error)
            return Answered(job_ids=frozenset())

    def verified(self, message: CheckpointVerified) -> None:
        """Record that the runner has read a checkpoint and found it intact."""
        published = message.published
        self._verified.add(published.path)
        try:
            with self._database.write() as session:
                self._database.require_own(session)
                checkpoints.verified_again(session, published.path, published.versions)
        except DatabaseUnreachable as error:
            log.warning("%s; it is not recorded that %s was verified", error, published.path)

    def _candidates(self, session: Session, wanted: Mapping[int, JobIdentity]) -> list[dict[int, Finished]]:
        """Results that may answer, by job: first those for this content, then perhaps those of version 0.1.0.

        The latter are included only if they cover every job and the former do not.
        """
        new = self._by_key(session, {n: (one.key, one.protocol_hash) for n, one in wanted.items()})
        legacy = {n: (one.legacy_key, one.protocol_hash) for n, one in wanted.items() if one.legacy_key is not None}
        if len(new) == len(wanted) or len(legacy) < len(wanted):
            return [new]
        old = self._by_key(session, legacy)
        return [new, old] if len(old) == len(wanted) else [new]

    def _unverified(self, candidates: Sequence[Mapping[int, Finished]], states: _States) -> dict[str, str]:
        """The checkpoints to read, path → key, without those that the runner was already asked to read."""
        return {
            part.path: part.key
            for answers in candidates
            for one in answers.values()
            for part in one.parts
            if part.path not in self._requested and states[part.path] is CheckpointState.UNVERIFIED
        }

    def _by_key(self, session: Session, pairs: Mapping[int, tuple[str, str]]) -> dict[int, Finished]:
        finished = finished_results.find_finished(session, set(pairs.values()), device_names=[self._device_name])
        baselines = {pair for n, pair in pairs.items() if self._claims[n].spec.scheme.is_baseline}
        answers = finished_results.answers_beside(baselines, finished)
        return {n: answers[pair] for n, pair in pairs.items() if pair in answers}

    def _state(self, part: FinishedPart) -> CheckpointState:
        if part.path in self._verified:
            return CheckpointState.SOUND
        return checkpoint_state(self._storage, part.path, part.versions)

    def _record(self, session: Session, resolved: Resolved, sound: Mapping[int, Finished]) -> Answered:
        jobs.lock_with_searches(session, resolved.jobs)
        for job_id, identity in sorted(resolved.jobs.items()):
            jobs.note(session, self._token(job_id), checkpoint_key=identity.key, base_key=identity.base_key)
        skip_list_keys.remember(
            session, {spelled: key for one in resolved.jobs.values() for spelled, key in one.spelled_keys.items()}
        )
        kept = finished_results.keep(session, {one.job_id for one in sound.values()})
        answered = {
            n
            for n, one in sorted(sound.items())
            if one.job_id in kept and jobs.answer(session, self._token(n), one.job_id)
        }
        answered |= self._answered_searches(session, resolved)
        paths = checkpoints.paths(session, {key for identity in resolved.jobs.values() for key in identity.keys})
        open_ = {n: one.key for n, one in resolved.jobs.items() if n not in answered and one.key not in paths}
        waiting = self._written_elsewhere(session, open_)
        jobs.hand_back(session, [self._token(job_id) for job_id in waiting])
        for job_id in sorted(answered):
            log.info("j%s is answered by an earlier result", job_id)
        for job_id in sorted(waiting):
            log.info("j%s returns to the queue: another runner is writing its checkpoint", job_id)
        return Answered(job_ids=frozenset(answered | waiting), paths=paths)

    def _answered_searches(self, session: Session, resolved: Resolved) -> set[int]:
        """The searches that need not be made, because what an earlier one found answers them."""
        keys = {
            n: one.key
            for n, one in resolved.jobs.items()
            if self._claims[n].spec.search is not None and not self._claims[n].spec.force
        }
        known = searches.newest(session, set(keys.values())) if keys else {}
        return {
            n
            for n, key in sorted(keys.items())
            if key in known and jobs.answer_search(session, self._token(n), key, known[key])
        }

    def _speeds(self, resolved: Resolved, answered: Answered) -> Mapping[int, KnownSpeed]:
        """The known speeds of the jobs that the runner must work on. Read outside of the transaction that ends the
        others, because whole rows are read."""
        still_open = resolved.jobs.keys() - answered.job_ids
        keys = {n: key for n in still_open if (key := resolved.jobs[n].speed_key) is not None}
        if not keys:
            return {}
        try:
            with self._database.read() as session:
                return find_known_speeds(session, keys)
        except DatabaseUnreachable as error:
            log.warning("%s; every model is timed", error)
            return {}

    def _written_elsewhere(self, session: Session, keys: Mapping[int, str]) -> set[int]:
        """The jobs whose checkpoint, given by its key, another runner is writing."""
        quantized = {n: key for n, key in keys.items() if not self._claims[n].spec.scheme.is_baseline}
        written = jobs.keys_being_written(session, set(quantized.values()), but_by=self._claims.keys())
        return {n for n, key in quantized.items() if key in written}

    def _token(self, job_id: int) -> jobs.Token:
        return (job_id, self._claims[job_id].attempt)


def _sound(candidates: Sequence[Mapping[int, Finished]], states: _States, *, whole: int) -> dict[int, Finished]:
    """The results with an intact checkpoint, by job.

    Results of version 0.1.0 are used only for all ``whole`` jobs together: their source has another identity, so they
    cannot be compared with what is measured now.
    """
    new, *old = (
        {n: one for n, one in answers.items() if all(states[part.path] is CheckpointState.SOUND for part in one.parts)}
        for answers in candidates
    )
    return next((answers for answers in old if len(answers) == whole), new)
