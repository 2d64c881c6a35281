"""The job state machine. After ``batches`` has added a job, only the modules in this folder change its state.

    queued → running → succeeded | failed | cancelled

``attempt`` increases with every claim, so that writes by an earlier holder of the job are rejected. ``failures``
increases only if an attempt whose own work had started fails or is lost.

Every change of a job's state is made by one of these functions, in the caller's transaction:

- ``claiming``: a worker takes queued jobs;
- ``holding``: the holder of a job renews its lease and reports progress;
- ``outcomes``: an attempt succeeds, fails, or is given back;
- ``searching``: a search is recorded, and ends with the jobs that publish what it found;
- ``expiry``: jobs end because their lease expired, or because no GPU is large enough;
- ``user_requests``: a user cancels or retries jobs.

They share ``transitions``, which changes one locked row, ``ending``, which also does what follows for others, and
``carry_out``, which applies the decisions of ``qbatch.core.retry_policy``. A test checks that the rest of the package
does not change a job's state.
"""

from __future__ import annotations

from qbatch.core.domain import Token
from qbatch.models_db.jobs.claiming import claim
from qbatch.models_db.jobs.expiry import expire, give_up_too_large, shorten_future_times
from qbatch.models_db.jobs.holding import any_waits_for_space, heartbeat, held, keys_being_written, note
from qbatch.models_db.jobs.outcomes import answer, answer_unclaimed, fail, hand_back, succeed
from qbatch.models_db.jobs.searching import answer_search, answer_unclaimed_search, searched
from qbatch.models_db.jobs.transitions import lock_with_searches
from qbatch.models_db.jobs.user_requests import cancel, retry

__all__ = [
    "Token",
    "answer",
    "answer_search",
    "answer_unclaimed",
    "answer_unclaimed_search",
    "any_waits_for_space",
    "cancel",
    "claim",
    "expire",
    "fail",
    "give_up_too_large",
    "hand_back",
    "heartbeat",
    "held",
    "keys_being_written",
    "lock_with_searches",
    "note",
    "retry",
    "searched",
    "shorten_future_times",
    "succeed",
]
