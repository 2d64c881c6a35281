"""Which GPUs a machine's workers take, by CUDA's own rules of naming."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from qbatch.core.errors import NoSuchDevice
from qbatch.worker.machine.gpu import Gpu, choose_gpus, installed_gpus, visible_gpus

UUIDS = ("GPU-aa11", "GPU-aa22", "GPU-bb33", "GPU-cc44")
INSTALLED = tuple(Gpu(index=index, uuid=uuid, name="a GPU", memory_bytes=2**30) for index, uuid in enumerate(UUIDS))


def indices(gpus: tuple[Gpu, ...]) -> list[int]:
    return [gpu.index for gpu in gpus]


@pytest.mark.parametrize(
    ("listed", "visible"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2", [2]),
        ("3,1", [3, 1]),
        (" 1 , 0 ", [1, 0]),
        ("GPU-bb33", [2]),
        ("GPU-bb", [2]),
        ("GPU-cc44,GPU-aa11", [3, 0]),
        ("GPU-aa", []),  # fits two
        ("GPU-", []),
        ("1,-1,2", [1]),
        ("0,9,1", [0]),
        ("0,nonsense,1", [0]),
        ("0,,1", [0]),
        ("1,GPU-bb", [1, 2]),
        ("1,1", [1]),  # a GPU has one worker
        ("0,²", [0]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(listed: str | None, visible: list[int]) -> None:
    environ = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert indices(visible_gpus(INSTALLED, environ)) == visible


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("all", [3, 1]),
        ("0", [3]),
        ("1,0", [1, 3]),
        ("GPU-aa22", [1]),
        ("GPU-cc", [3]),
        (" 1 ", [1]),
        ("0,GPU-cc44", [3]),
        ("1,1", [1]),
    ],
)
def test_gpus_are_chosen_among_those_visible_each_once(wanted: str, chosen: list[int]) -> None:
    assert indices(choose_gpus(wanted, (INSTALLED[3], INSTALLED[1]))) == chosen


@pytest.mark.parametrize("wanted", ["2", "0,7", "GPU-bb33", "GPU-", "-1", "", "0,", "²", "first"])
def test_a_gpu_that_is_not_visible_is_named(wanted: str) -> None:
    with pytest.raises(NoSuchDevice) as caught:
        choose_gpus(wanted, (INSTALLED[3], INSTALLED[1]))
    missing = next(name for name in wanted.split(",") if name not in ("0", "1"))
    assert repr(missing) in str(caught.value)
    assert "GPU-cc44" in str(caught.value), "what there is is said"


@pytest.mark.parametrize("wanted", ["all", "0", "GPU-aa11"])
def test_without_a_gpu_the_cpu_is_pointed_at(wanted: str) -> None:
    with pytest.raises(NoSuchDevice, match="--cpu"):
        choose_gpus(wanted, ())


def test_a_gpu_that_does_not_answer_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(index: int) -> int:
        if index == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetUUID": lambda index: UUIDS[index],
        "nvmlDeviceGetName": lambda _: b"a GPU",
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=2**30),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    assert installed_gpus() == (INSTALLED[0], INSTALLED[2])
    assert "ignoring GPU 1, which does not answer" in caplog.text
