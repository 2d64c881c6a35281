"""A known speed is found as a whole set, of one model's rows of the same rounds, on both databases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from qbatch.core.domain import DeviceKind, Method
from qbatch.core.measured.details import Details
from qbatch.core.measured.speed_figures import TimedRounds
from qbatch.models_db import jobs
from qbatch.models_db.session import Database
from qbatch.models_db.speed_lookup import find_known_speeds
from tests.rows import PROTOCOL, a_batch, a_worker, bundle, claim, measured

KEY = "k" * 64
PAIR = (Method.NONE, Method.NF4)


def record(database: Database, job_id: int, beside: Sequence[int], *, model: str = "a", key: str | None = KEY) -> None:
    (token,) = claim(database, [job_id], a_worker(database, f"w{job_id}"))
    rounds = TimedRounds(count=3, interleaved_with=tuple(f"j{other}" for other in beside))
    details = Details(fingerprint=model, speed_key=key, rounds=rounds)
    row = replace(measured(), decode_tokens_per_s=float(job_id), details=details)
    with database.write() as session:
        protocol = PROTOCOL.for_device(DeviceKind.CPU)
        assert jobs.succeed(session, token, row, protocol=protocol, checkpoint_path=None)


def found(database: Database, *job_ids: int, key: str = KEY) -> dict[int, tuple[str, float | None]]:
    with database.read() as session:
        known = find_known_speeds(session, dict.fromkeys(job_ids, key))
        return {job_id: (one.job_id, one.figures.decode_tokens_per_s) for job_id, one in known.items()}


def test_a_set_is_found_whole_and_by_scheme(database: Database) -> None:
    _, (base, nf4, int8, base_b, nf4_b, int8_b) = a_batch(database, bundle("/a"), bundle("/b"))
    assert found(database, base_b, nf4_b) == {}
    record(database, base, [nf4, int8])
    assert found(database, base_b, nf4_b) == {}, "its other row is missing"
    record(database, nf4, [base, int8])
    assert found(database, base_b, nf4_b) == {base_b: (f"j{base}", base), nf4_b: (f"j{nf4}", nf4)}
    assert found(database, base_b, nf4_b, int8_b) == {}, "or nothing"
    assert found(database, nf4_b) == {}, "without its baseline"
    assert found(database, base_b, nf4_b, key="q" * 64) == {}


@pytest.mark.parametrize("beside", [[], ["other"]], ids=["alone", "another round"])
def test_rows_of_different_rounds_are_no_set(database: Database, beside: list[str]) -> None:
    _, (base, nf4, base_b, nf4_b) = a_batch(database, bundle("/a", *PAIR), bundle("/b", *PAIR))
    record(database, base, [nf4])
    record(database, nf4, [999] if beside else [])
    assert found(database, base_b, nf4_b) == {}


def test_rows_of_different_models_are_no_set(database: Database) -> None:
    pairs = [bundle(f"/{name}", *PAIR) for name in "abc"]
    _, (base, nf4, base_b, nf4_b, base_c, nf4_c) = a_batch(database, *pairs)
    record(database, base, [nf4, nf4_b], model="a")
    record(database, nf4_b, [base_b, base], model="b")
    assert found(database, base_c, nf4_c) == {}
    record(database, nf4, [base], model="a")
    assert found(database, base_c, nf4_c) == {base_c: (f"j{base}", base), nf4_c: (f"j{nf4}", nf4)}


def test_another_batch_s_and_a_speed_that_is_not_a_row_s_own_are_not_found(database: Database) -> None:
    _, (base, nf4) = a_batch(database, bundle("/a", *PAIR))
    record(database, base, [nf4])
    record(database, nf4, [base])
    _, (base_b, nf4_b, base_c, nf4_c) = a_batch(database, bundle("/b", *PAIR), bundle("/c", *PAIR))
    assert found(database, base_b, nf4_b) == {}
    record(database, base_b, [nf4_b], key=None)
    record(database, nf4_b, [base_b], key=None)
    assert found(database, base_c, nf4_c) == {}
