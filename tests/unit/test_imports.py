"""What a runner imports is imported before it is forked, and as if there was no GPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qbatch.worker.machine.imports import import_without_gpu
from qbatch.worker.methods.bnb_weights import _compile_when_called


@pytest.fixture
def curious(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that looks for GPUs when it is imported, and remembers through transformers that there was none."""
    (tmp_path / "curious.py").write_text(
        "import os\n"
        "from transformers.utils.import_utils import is_torch_cuda_available\n"
        "seen = os.environ['CUDA_VISIBLE_DEVICES']\n"
        "answer = is_torch_cuda_available()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "curious"


def test_a_module_that_asks_about_gpus_sees_none(curious: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    import_without_gpu([curious])
    assert sys.modules.pop(curious).seen == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ


def test_what_libraries_remember_of_it_is_forgotten(curious: str) -> None:
    from torch.utils._triton import has_triton
    from transformers.utils.import_utils import is_torch_greater_or_equal

    has_triton()
    is_torch_greater_or_equal("2.0")
    import_without_gpu([curious])
    del sys.modules[curious]
    assert has_triton.cache_info().currsize == 0
    assert is_torch_greater_or_equal.cache_info().currsize == 0


def test_garbage_is_not_collected_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting it again and again is a fifth of the time that a forkserver takes to start."""
    (tmp_path / "large.py").write_text("import gc\ncollects = gc.isenabled()\nlists = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    frozen = gc.get_freeze_count()
    import_without_gpu(["large"])
    large = sys.modules.pop("large")
    assert not large.collects
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + 1000, "what is imported stays, so nobody looks through it later"


def test_a_module_that_is_missing_is_an_error() -> None:
    with pytest.raises(ImportError, match="not_there"):
        import_without_gpu(["not_there"])


def test_who_serves_a_device_imports_nothing_that_computes() -> None:
    """Its runners do. Of each worker's start that was a third, and 200 MB for as long as it runs."""
    program = """
import sys, qbatch.worker.serving.celery_worker
print({"torch", "transformers", "numpy", "huggingface_hub", "alembic"} & sys.modules.keys())
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


def test_a_forkserver_ends_without_taking_its_modules_apart() -> None:
    """Half a second of a core for torch's. Its forks end as they say."""
    program = """
import atexit, os, sys
import qbatch.worker.serving.quick_end
atexit.register(print, "what others want done is done")
sys.last = type("Module", (), {"__del__": lambda self: os.write(1, b"taken apart")})()
if os.fork() == 0:
    del sys.last
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.count("what others want done is done") == 2
    assert shown.stdout.splitlines()[-2:] == ["3", "what others want done is done"]


def test_bitsandbytes_is_imported_without_the_compiler() -> None:
    """Its fallbacks are compiled when they are called, which nothing here does: 580 modules less in each worker."""
    program = """
import sys, torch
from qbatch.worker.methods.bnb_weights import WEIGHTS
before = torch.compile
WEIGHTS.quiet_import()
assert torch.compile is before
print("bitsandbytes" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["True", "False"]


def test_a_function_is_compiled_once_it_is_called() -> None:
    compiled = []

    def compiler(function: Callable[[int], int], *, dynamic: bool) -> Callable[[int], int]:
        compiled.append(dynamic)
        return lambda number: -function(number)

    @_compile_when_called(compiler, dynamic=True)
    def double(number: int) -> int:
        return 2 * number

    assert compiled == []
    assert [double(1), double(2)] == [-2, -4]
    assert compiled == [True]
    assert double.__name__ == "double"
