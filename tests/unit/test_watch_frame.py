"""What a terminal of any size shows of batches while they run."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from qbatch.core.domain import JobState
from qbatch.core.job_progress import JobProgress
from qbatch.core.watched import Snapshot, WatchedBatch, WatchedJob, WatchedWorker
from qbatch.views.formats import text_width
from qbatch.views.live import STARTING, rendered
from qbatch.views.shortened import cut, shorten
from qbatch.views.watch_frame import ScreenSize, frame
from tests.unit.golden_screen import check_screen

_GIB = 2**30
_LONG = "/data/checkpoints/experiments/2026-11/a-very-long-run-name/llama-3.2-3b-sft-step-12000"
WIDTHS = (40, 80, 120, 200)


def a_job(number: int, model: str, method: str, stage: str = "benchmarking", **known: object) -> WatchedJob:
    job = WatchedJob(job_id=f"j{number}", model=model, method=method, state=JobState.RUNNING, stage=stage)
    return replace(job, **known)  # type: ignore[arg-type]


def a_worker(name: str, *jobs: str, **known: object) -> WatchedWorker:
    worker = WatchedWorker(
        name=f"{name}-123-ab@node1",
        host="node1",
        device_name="NVIDIA H200",
        state="ready",
        memory_bytes=141 * _GIB,
        used_bytes=int(41.5 * _GIB),
        busy_share=0.97,
        jobs=jobs,
    )
    return replace(worker, **known)  # type: ignore[arg-type]


def a_batch(batch_id: str = "b12", name: str | None = None, **known: object) -> WatchedBatch:
    counts = {JobState.SUCCEEDED: 2, JobState.RUNNING: 4, JobState.QUEUED: 9, JobState.FAILED: 1}
    batch = WatchedBatch(batch_id=batch_id, name=name, counts=counts, elapsed_s=754.2, left_s=1500.0)
    return replace(batch, **known)  # type: ignore[arg-type]


_MOVED = JobProgress(bytes_read=3 * _GIB, bytes_written=_GIB, bytes_total=23 * _GIB, bytes_per_s=1.2 * _GIB)
RUNNING = (
    a_job(3, _LONG, "bnb-nf4", "quantizing", progress=_MOVED, elapsed_s=41.2),
    a_job(4, _LONG, "torchao-int8-dynamic", "quantizing", progress=_MOVED, elapsed_s=41.2),
    a_job(5, "Qwen/Qwen2.5-7B-Instruct", "none", progress=JobProgress(step="speed, round 2/3"), elapsed_s=754.0),
    a_job(6, "Qwen/Qwen2.5-7B-Instruct", "bnb-int8", is_active=False, elapsed_s=754.0),
    a_job(7, "bigscience/bloom-1b7", "bnb-nf4", "loading", progress=_MOVED, elapsed_s=12_000.0),
)
WORKERS = (
    a_worker("gpu0", "j3", "j4"),
    a_worker("gpu1", "j5", "j6", busy_share=0.09),
    a_worker("gpu2", "j7", used_bytes=None, busy_share=None),
    a_worker("gpu3", used_bytes=0, busy_share=0.0),
    a_worker("gpu4", "j9", state="lost", used_bytes=None, busy_share=None),
)
SNAPSHOT = Snapshot(batches=(a_batch(name="llama-sweep"),), running=RUNNING, workers=WORKERS, live_workers=4)
WAITING = Snapshot(batches=(a_batch(counts={JobState.QUEUED: 16}, elapsed_s=21.0, left_s=None),))


def drawn(snapshot: Snapshot, width: int, *notes: str, height: int = 30) -> list[str]:
    """As rich prints it."""
    out = io.StringIO()
    Console(file=out, width=width, height=height).print(
        rendered(frame(snapshot, ScreenSize(width=width, height=height), notes))
    )
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_frame_looks_as_it_did(width: int) -> None:
    check_screen(f"watch-{width}", "\n".join([*drawn(SNAPSHOT, width), "", *drawn(WAITING, width, STARTING)]))


@pytest.mark.parametrize("width", [*range(20, 130), 200])
def test_every_line_fits_and_no_scheme_is_pushed_off(width: int) -> None:
    # A character of such a name takes two columns.
    wide = a_job(8, "组织/模型-7B-聊天-很长的名字", "bnb-nf4", "loading")
    lines = drawn(replace(SNAPSHOT, running=(*RUNNING, wide)), width)
    assert max(map(text_width, lines)) <= width
    if width >= 40:
        for job in RUNNING:
            (line,) = (line for line in lines if line.startswith(f"{job.job_id} "))
            assert job.scheme in line
            assert job.stage in " ".join(lines)


@pytest.mark.parametrize("height", [3, 6, 10, 24])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_frame_is_lower_than_the_terminal_and_says_what_it_leaves_out(height: int, width: int) -> None:
    many = tuple(a_job(n, "llama", "bnb-nf4", is_active=n % 10 == 0) for n in range(60))
    fleet = tuple(a_worker(f"gpu{n}", f"j{n}") for n in range(40))
    batches = tuple(a_batch(f"b{n}") for n in range(30))
    lines = drawn(Snapshot(batches=batches, running=many, workers=fleet), width, STARTING, height=height)
    assert len(lines) < height
    if height == 24 and width == 120:
        assert [line for line in lines if "more" in line] == [
            "and 26 more batches",
            "and 49 more running",
            "and 36 more workers",
        ]
        assert any(line.startswith("j50 ") for line in lines), "what is worked on comes first"


def test_what_a_job_does_moves_in_every_stage() -> None:
    lines = drawn(SNAPSHOT, 120)
    for job_id, said in (
        ("j3", "4.0/23.0 GiB, 1.2 GiB/s"),
        ("j5", "speed, round 2/3"),
        ("j6", "waits for its turn"),
        ("j7", "3:20:00"),
    ):
        assert any(line.startswith(job_id) and said in line for line in lines)
    assert "GiB/s" not in next(line for line in lines if line.startswith("j7")), "bytes of a stage that is over"


def test_workers_are_told_apart_by_their_hosts_where_there_are_several() -> None:
    both = Snapshot(batches=(), workers=(a_worker("gpu0", "j1"), a_worker("gpu0", host="node2")))
    assert [line.split()[0] for line in drawn(both, 120)] == ["gpu0@node1", "gpu0@node2"]


def test_why_nothing_is_sent_is_said() -> None:
    paused = replace(WAITING, pauses=("j7 needs 20 GiB of disk space, and 3 GiB are free",))
    assert drawn(paused, 80)[-1] == "j7 needs 20 GiB of disk space, and 3 GiB are free"


def test_names_lose_their_middle() -> None:
    assert shorten("meta-llama/Llama-3.1-8B-Instruct", 20) == "meta-ll…-8B-Instruct"
    assert shorten("short", 20) == "short"
    assert [text_width(shorten("组织/模型-7B-聊天-很长的名字", width)) <= width for width in range(1, 30)] == [
        True
    ] * 29
    assert (cut("abcdef", 4), cut("abcdef", 1), cut("abcdef", 0)) == ("abc…", "…", "")


def test_colours_are_left_out_where_nobody_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setenv("TERM", "xterm-256color")
        out = io.StringIO()
        console = Console(file=out, width=80, height=24, force_terminal=True)
        console.print(rendered(frame(SNAPSHOT, ScreenSize(width=80, height=24))))
        shown[no_color] = out.getvalue()
    assert "\x1b[32m" in shown[""]
    assert not any(f"\x1b[{code}m" in shown["1"] for code in (31, 32, 33))
