"""The job state machine. Only the modules of this folder write a job's state, once ``batches`` has added the job.

    queued → running → succeeded | failed | cancelled

``attempt`` rises at every claim and fences out whoever held the job before. ``failures`` rises only when an attempt
whose own work had started is lost or fails.

Every change of a job's state goes through one of these functions, within the caller's transaction:

- ``claiming``: a worker takes queued jobs;
- ``holding``: who holds a job, renews its lease and says how far it is;
- ``outcomes``: an attempt ends, well or badly, or is given back;
- ``expiry``: what ends because nobody was heard of, or nobody is large enough;
- ``user_requests``: a user cancels or retries.

They share ``transitions``, which moves one locked row, and ``carry_out``, which does what
``qbatch.core.retry_policy`` decides. A test holds the rest of the package to leaving a job's state alone.
"""

from __future__ import annotations

from qbatch.core.domain import Token
from qbatch.models_db.jobs.claiming import claim
from qbatch.models_db.jobs.expiry import expire, give_up_too_large, mend_times
from qbatch.models_db.jobs.holding import any_waits_for_space, heartbeat, held, keys_being_written, note
from qbatch.models_db.jobs.outcomes import answer, fail, hand_back, succeed
from qbatch.models_db.jobs.user_requests import cancel, retry

__all__ = [
    "Token",
    "answer",
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
    "mend_times",
    "note",
    "retry",
    "succeed",
]
