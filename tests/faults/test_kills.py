"""A runner, a worker, or both are killed in every stage: the job is taken up again, and nothing is half done."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest

from qbatch.core.domain import Stage
from tests.faults.conftest import MakeModel, fleet_of
from tests.faults.fleet import LEASE_S, SCAN_S, Caught, Fleet
from tests.faults.fleet_services import PASSWORD, Redis
from tests.hub import Hub, serving
from tests.postgres import Postgres
from tests.waiting import until

# What a busy machine may add to a lease and a scan.
_SLACK_S = 15.0
_SIDECAR_BYTES = 96 * 2**20
_PATIENCE_S = 120.0
# Of a checkpoint's job. Chaos kills searches.
_STAGES = tuple(stage for stage in Stage if stage is not Stage.SEARCHING)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """None is SQLite in the fleet's home."""
    if request.param == "sqlite":
        yield None
        return
    server = Postgres()
    yield server.url
    server.close()


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, redis_server: Redis, hub: Hub, database_url: str | None
) -> Iterator[Fleet]:
    """Its workers fetch from a hub whose downloads can be held, and one job may be killed in every stage."""
    folder = tmp_path_factory.mktemp("kills")
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "no_proxy": "127.0.0.1"}
    url = f"redis://:{PASSWORD}@127.0.0.1:{redis_server.port}/1"
    with fleet_of(folder, url, database_url, QBATCH_MAX_FAILURES="30", QBATCH_BACKOFF_S="0.05", **online) as fleet:
        fleet.start("scheduler", "scheduler")
        for name in ("w1", "w2", "w3"):
            fleet.start(name, "worker", "--cpu")
        fleet.wait_for_workers(3)
        yield fleet


@pytest.mark.timeout(600)
def test_a_kill_in_any_stage_costs_an_attempt_and_leaves_nothing_half_done(
    fleet: Fleet, hub: Hub, make_model: MakeModel
) -> None:
    victims = ("runner", "worker", "both")
    hub.requests.clear()
    for name in victims:
        model = make_model(large=True)
        # Copied, hashed and flushed when a checkpoint is published, which would otherwise be over too soon to catch.
        (model / "LICENSE").write_bytes(bytes(_SIDECAR_BYTES))
        hub.publish(f"org/{name}", model)
    hub.flowing.clear()
    fetched = threading.Barrier(len(victims), action=hub.flowing.set)
    with ThreadPoolExecutor(len(victims)) as pool:
        for done in [pool.submit(_kill_in_every_stage, fleet, hub, name, fetched) for name in victims]:
            done.result()
    until(lambda: not fleet.staged(), "end of staging")


def _kill_in_every_stage(fleet: Fleet, hub: Hub, victims: str, fetched: threading.Barrier) -> None:
    (job,) = fleet.submit(f"org/{victims}")
    fleet.wait_for(lambda: any(f"org/{victims}/resolve" in r.path for r in hub.requests), "download")
    after = 0
    published: tuple[Path, int] | None = None
    for stage in _STAGES:
        # What is published is not written again: an attempt that was too quick would leave nothing to be caught at.
        unpublish = partial(_unpublish, fleet, job) if published is None else lambda: None
        caught = fleet.catch(job, stage, after=after, slipped=unpublish)
        killed_at = time.monotonic()
        _kill(caught, victims)
        _check_gone(caught, victims, killed_at)
        if stage is Stage.FETCHING:
            fetched.wait(_PATIENCE_S)
        fleet.wait_for_end_of(job, caught.attempt, LEASE_S + SCAN_S + _SLACK_S)
        after = caught.attempt
        if published is not None:
            assert _published(fleet, job) == published, "a published checkpoint is not written again"
        published = published or _published(fleet, job)
    fleet.succeed([job], _PATIENCE_S)
    assert _published(fleet, job) == published is not None
    outcomes = fleet.outcomes(job)
    assert fleet.result(job).attempt == len(outcomes), "each attempt was one more, and the last one's result stands"
    assert outcomes[-1] == "succeeded"
    assert set(outcomes[:-1]) == {"host_oom" if victims == "runner" else "worker_lost"}


def _kill(caught: Caught, victims: str) -> None:
    """SIGKILL; a runner that is not killed goes on working, until it notices."""
    if victims == "worker":
        caught.runner.resume()
    if victims != "runner":
        caught.worker.kill()
    if victims != "worker":
        caught.runner.kill()


def _check_gone(caught: Caught, victims: str, killed_at: float) -> None:
    """Within a lease: what a killed worker had started, too."""
    family = [caught.runner] if victims == "runner" else [caught.worker, caught.forkserver, caught.runner]
    _, alive = psutil.wait_procs(family, timeout=killed_at + LEASE_S + _SLACK_S - time.monotonic())
    assert alive == [], f"{victims} killed"


def _published(fleet: Fleet, job: int) -> tuple[Path, int] | None:
    """The checkpoint and its inode, where it is published."""
    folder = fleet.checkpoint_of(job)
    return (folder, folder.stat().st_ino) if folder is not None else None


def _unpublish(fleet: Fleet, job: int) -> None:
    """Move the checkpoint away at once: its worker may be about to write its card."""
    if (found := _published(fleet, job)) is not None:
        found[0].rename(fleet.settings.home / f"unpublished-{uuid.uuid4().hex}")


@pytest.mark.parametrize("suspended", ["worker", "worker and runner"])
def test_an_attempt_suspended_beyond_its_lease_changes_nothing_afterwards(
    fleet: Fleet, make_model: MakeModel, suspended: str
) -> None:
    (job,) = fleet.submit(make_model(large=True))
    caught = fleet.catch(job, Stage.QUANTIZING)
    fleet.suspend(caught.worker)
    if suspended == "worker":
        caught.runner.resume()  # it goes on until it misses its worker's pulse
    fleet.succeed([job])
    result, published = fleet.result(job), _published(fleet, job)
    caught.worker.resume()
    if suspended == "worker and runner":
        with contextlib.suppress(psutil.NoSuchProcess):  # its worker, awake, may have ended it by now
            caught.runner.resume()
    _, alive = psutil.wait_procs([caught.runner], timeout=LEASE_S + _SLACK_S)
    assert alive == []
    fleet.wait_for_live(3)
    assert fleet.outcomes(job)[-2:] == ["worker_lost", "succeeded"]
    assert fleet.result(job).attempt == result.attempt == caught.attempt + 1
    assert fleet.result(job).created_at == result.created_at
    assert _published(fleet, job) == published is not None
    until(lambda: not fleet.staged(), "end of staging")


def test_of_two_workers_that_want_one_checkpoint_one_writes_one_adopts(
    fleet: Fleet, hub: Hub, make_model: MakeModel
) -> None:
    # What a hub's model will be called is known once it is fetched: neither batch is held back for the other.
    hub.publish("org/race", make_model(large=True))
    (writer,) = fleet.submit("org/race")
    caught = fleet.catch(writer, Stage.QUANTIZING)
    (other,) = fleet.submit("org/race", force=True)
    fleet.wait_for(lambda: "handed_back" in fleet.outcomes(other), "the other to stand back")
    assert fleet.checkpoint_of(other) is None
    caught.runner.resume()
    fleet.succeed([writer, other])
    assert len(list(fleet.settings.checkpoints.glob("race/*"))) == 1
    assert fleet.result(writer).checkpoint_path == fleet.result(other).checkpoint_path
    assert fleet.result(writer).attempt == caught.attempt, "it did not begin again"
    last = fleet.job(other).attempt
    assert f"j{other}: quantizing" not in (fleet.logs / f"j{other}-{last}.log").read_text()
    assert fleet.job(other).failures == 0
    until(lambda: not fleet.staged(), "end of staging")
