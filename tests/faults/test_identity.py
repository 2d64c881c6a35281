"""A result belongs to the model whose files were used, even if files change, are copied or are replaced."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from qbatch.core.domain import Stage
from tests.faults.conftest import MakeModel
from tests.faults.fleet import Fleet

_WEIGHTS = "model.safetensors"


def tune(folder: Path) -> None:
    """Other weights of the same shape in the same file, with the same times: what no listing shows."""
    path = folder / _WEIGHTS
    before = path.stat()
    tensors = {name: tensor * 1.5 for name, tensor in load_file(path).items()}
    save_file(tensors, folder / "draft", metadata={"format": "pt"})
    content = (folder / "draft").read_bytes()
    (folder / "draft").unlink()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def flip_a_bit(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_two_models_of_one_shape_and_time_have_a_result_each(fleet: Fleet, make_model: MakeModel) -> None:
    one = make_model()
    other = shutil.copytree(one, one.with_name(f"{one.name}-tuned"))
    tune(other)
    for folder in (one, other):
        for path in folder.iterdir():
            os.utime(path, (0, 0))
    (first,) = fleet.submit(one)
    fleet.succeed([first])
    (second,) = fleet.submit(other)
    fleet.succeed([second])
    assert fleet.job(second).reused_from is None
    assert fleet.result(second).perplexity != fleet.result(first).perplexity
    assert fleet.result(second).details["fingerprint"] != fleet.result(first).details["fingerprint"]


def test_a_copy_is_answered_by_the_same_bytes_once_a_worker_has_read_it(fleet: Fleet, make_model: MakeModel) -> None:
    model = make_model()
    (first,) = fleet.submit(model)
    fleet.succeed([first])
    (again,) = fleet.submit(model)
    assert (fleet.job(again).state, fleet.job(again).reused_from) == ("succeeded", first), "at once: it was hashed"
    copy = shutil.copytree(model, model.with_name(f"{model.name}-copied"))
    with fleet.suspended(psutil.Process(fleet.running["scheduler"].pid)):
        (copied,) = fleet.submit(copy, send=False)
        assert fleet.job(copied).state == "queued", "submit reads no weights"
    fleet.succeed([copied])
    assert fleet.job(copied).reused_from == first


@pytest.mark.parametrize("stage", [Stage.QUANTIZING, Stage.BENCHMARKING])
def test_jobs_of_a_source_that_changes_run_once_more(fleet: Fleet, make_model: MakeModel, stage: Stage) -> None:
    model = make_model(large=True)
    baseline, quantized = fleet.submit(model, baseline=True)
    caught = fleet.catch(quantized if stage is Stage.QUANTIZING else baseline, stage)
    tune(model)
    caught.runner.resume()
    fleet.succeed([baseline, quantized])
    for job in (baseline, quantized):
        assert fleet.outcomes(job)[-2:] == ["source_changed", "succeeded"]
    found = [fleet.result(job).details["fingerprint"] for job in (baseline, quantized)]
    assert found[0] == found[1]
    (fresh,) = fleet.submit(model, bits=(16,), force=True)
    fleet.succeed([fresh])
    assert fleet.result(fresh).perplexity == fleet.result(baseline).perplexity, "it is that of what lies there now"


def test_a_source_that_keeps_changing_fails(fleet: Fleet, make_model: MakeModel) -> None:
    model = make_model(large=True)
    (job,) = fleet.submit(model)
    after = 0
    for _ in range(2):
        caught = fleet.catch(job, Stage.QUANTIZING, after=after)
        tune(model)
        caught.runner.resume()
        after = caught.attempt
    fleet.wait_for_state([job], "failed")
    assert fleet.job(job).error_kind == "source_changed"
    assert _WEIGHTS in (fleet.job(job).error_message or "")
    assert fleet.checkpoint_of(job) is None, "nothing was published"


def test_a_checkpoint_whose_bytes_changed_answers_nobody(fleet: Fleet, make_model: MakeModel) -> None:
    model = make_model()
    (first,) = fleet.submit(model)
    fleet.succeed([first])
    checkpoint = fleet.checkpoint_of(first)
    assert checkpoint is not None
    flip_a_bit(checkpoint / _WEIGHTS)
    (second,) = fleet.submit(model)
    fleet.succeed([second])
    assert fleet.job(second).reused_from is None
    assert fleet.checkpoint_of(second) == checkpoint, "written anew, in its place"
    (aside,) = checkpoint.parent.glob(f"{checkpoint.name}.rejected-*")
    assert aside.is_dir()


def test_a_checkpoint_that_was_restored_from_a_copy_is_read_and_answers(fleet: Fleet, make_model: MakeModel) -> None:
    model = make_model()
    (first,) = fleet.submit(model)
    fleet.succeed([first])
    checkpoint = fleet.checkpoint_of(first)
    assert checkpoint is not None
    copy = shutil.copytree(checkpoint, checkpoint.with_name("copy"))
    shutil.rmtree(checkpoint)
    copy.rename(checkpoint)
    with fleet.suspended(psutil.Process(fleet.running["scheduler"].pid)):
        (second,) = fleet.submit(model, send=False)
        assert fleet.job(second).state == "queued", "its files' times are not those that were verified"
    fleet.succeed([second])
    assert fleet.job(second).reused_from == first
    (third,) = fleet.submit(model)
    assert fleet.job(third).reused_from == first, "at once: it was verified as it lies there now"
