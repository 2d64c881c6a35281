"""What is recorded of a runner's many reports."""

from __future__ import annotations

from qbatch.core.domain import Stage
from qbatch.core.job_progress import JobProgress
from qbatch.worker.runner.messages import Progressed, Stepped
from qbatch.worker.serving.running_progress import RunningProgress


class SetClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def moved(*job_ids: int, read: int, written: int = 0) -> Progressed:
    return Progressed(job_ids=job_ids, bytes_read=read, bytes_written=written, bytes_total=1000)


def test_of_many_reports_the_newest_is_recorded_once_a_second() -> None:
    clock = SetClock()
    progress = RunningProgress(clock=clock)
    assert not progress.is_due()
    recorded = []
    for tick in range(32):  # four seconds of eight reports each
        progress.moved(moved(1, 2, read=tick))
        if progress.is_due():
            recorded.append(progress.take())
        clock.now += 0.125
    assert [taken[1].bytes_read for taken in recorded] == [0, 8, 16, 24]
    assert [set(taken) for taken in recorded] == [{1, 2}] * 4
    progress.moved(moved(1, 2, read=31))
    clock.now += 1
    assert progress.is_due(), "the newest is recorded too"
    progress.take()
    clock.now += 1
    progress.moved(moved(1, read=31))
    assert progress.take().get(2) is None, "what did not change is not written again"


def test_the_rate_is_the_mean_of_the_stage() -> None:
    clock = SetClock()
    progress = RunningProgress(clock=clock)
    progress.entered([1], Stage.QUANTIZING)
    for seconds, read, written in ((0.0, 100, 0), (2.0, 200, 100), (4.0, 300, 200)):
        clock.now = 100.0 + seconds
        progress.moved(moved(1, read=read, written=written))
    assert progress.take()[1].bytes_per_s == 100.0


def test_a_step_is_over_with_its_stage_and_bytes_stay_until_others_move() -> None:
    progress = RunningProgress(clock=SetClock())
    progress.entered([1], Stage.FETCHING)
    progress.moved(moved(1, read=1000))
    progress.entered([1], Stage.QUANTIZING)
    assert progress.take()[1] == JobProgress(), "what was fetched says nothing of what is quantized"
    progress.moved(moved(1, read=400, written=600))
    progress.entered([1], Stage.BENCHMARKING)
    progress.stepped(Stepped(job_ids=(1,), step="speed, round 1/3"))
    assert progress.take()[1] == JobProgress(
        bytes_read=400, bytes_written=600, bytes_total=1000, step="speed, round 1/3"
    )
    progress.entered([1], Stage.LOADING)
    assert progress.take()[1].step is None


def test_a_width_that_is_tried_alone_leaves_what_was_read_for_the_others() -> None:
    """Two are quantized in one pass, and then each is tried and published."""
    progress = RunningProgress(clock=SetClock())
    progress.entered([1, 2], Stage.QUANTIZING)
    for job_id in (1, 2):
        progress.moved(moved(job_id, read=400, written=600))
    for job_ids, stage in (
        ([1], Stage.PUBLISHING),
        ([2], Stage.QUANTIZING),
        ([2], Stage.PUBLISHING),
        ([1, 2], Stage.PUBLISHING),
    ):
        progress.entered(job_ids, stage)
    whole = JobProgress(bytes_read=400, bytes_written=600, bytes_total=1000)
    assert progress.take() == {1: whole, 2: whole}


def test_progress_is_stored_and_read_back_whatever_other_versions_store() -> None:
    whole = JobProgress(bytes_read=1, bytes_written=0, bytes_total=3, bytes_per_s=2.5, step="kernels")
    assert JobProgress.from_json(whole.to_json()) == whole
    assert JobProgress.from_json({"bytes_read": 1, "a_new_key": 5}) == JobProgress(bytes_read=1)
    assert JobProgress.from_json(None) == JobProgress.from_json({}) == JobProgress()
