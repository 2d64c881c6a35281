"""What is installed is one package, ``qbatch``, whatever its checkout is called and whatever else lies about."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import qbatch
from qbatch.cli import main
from qbatch.core.domain import DeviceKind
from qbatch.worker.serving.runner_forkserver import PRELOADED

ROOT = Path(qbatch.__file__).parents[2]
PAGE = ("charts.jinja", "report.css", "report.jinja", "report.js", "tables.jinja")
OLD_NAMES = ("cli", "commands", "core", "models_db", "scheduler", "views", "worker")


def python(*args: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=os.environ | environ, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree under another name."""
    copy = tmp_path_factory.mktemp("elsewhere") / "a-clone"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> zipfile.ZipFile:
    # Without isolation: what builds it is installed, and no index is asked.
    made = python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", ".", cwd=checkout)
    assert made.returncode == 0, made.stderr
    (path,) = (checkout / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def modules() -> Iterator[Path]:
    for name in OLD_NAMES:
        path = ROOT / name
        yield from path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]


def test_a_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {f"qbatch/{path.relative_to(ROOT)}" for path in modules()}
    assert files == expected | {
        "qbatch/__init__.py",
        "qbatch/__main__.py",
        "qbatch/core/loaders/sglang.json",
        "qbatch/core/loaders/vllm.json",
        *(f"qbatch/views/report/page/{name}" for name in PAGE),
        "qbatch/worker/measuring/code_text.txt",
        "qbatch/worker/measuring/dialogue_text.txt",
        "qbatch/worker/measuring/eval_text.txt",
        "qbatch/worker/searching/search_text.txt",
    }


def test_an_installed_wheel_runs(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    shown = python("-P", "-m", "qbatch", "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert shown.returncode == 0, shown.stderr
    where = python("-P", "-c", "import qbatch.cli as it; print(it.__file__)", PYTHONPATH=str(tmp_path / "site"))
    assert where.stdout.strip() == str(tmp_path / "site" / "qbatch" / "cli.py")


def test_a_checkout_may_have_any_name(checkout: Path, tmp_path: Path) -> None:
    shown = python("-P", "-m", "qbatch", "--version", cwd=tmp_path, PYTHONPATH=str(checkout / "src"))
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize("name", OLD_NAMES)
def test_an_old_name_cannot_be_imported(name: str) -> None:
    """A class that could be imported under two names would be two classes."""
    with pytest.raises(ImportError, match=f"qbatch.{name}"):
        __import__(name)


def _commands(group: click.Group, *prefix: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, *prefix, name)
        else:
            yield (*prefix, name)


@pytest.mark.parametrize("command", [(), *_commands(main)], ids=" ".join)
def test_help_works_beside_modules_of_our_old_names(command: tuple[str, ...], strangers: Path) -> None:
    shown = python("-P", "-m", "qbatch", *command, "--help", cwd=strangers, PYTHONPATH=_path(strangers))
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize("command", ["status", "results", "workers", "doctor"])
def test_commands_work_beside_modules_of_our_old_names(command: str, strangers: Path, tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    shown = python("-P", "-m", "qbatch", command, cwd=strangers, PYTHONPATH=_path(strangers), QBATCH_HOME=home)
    assert "Traceback" not in shown.stderr
    assert shown.returncode in (0, 1), shown.stderr


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """A folder of somebody's modules that are called as qbatch's are."""
    for name in OLD_NAMES:
        (tmp_path / f"{name}.py").touch()
    return tmp_path


def _path(strangers: Path) -> str:
    return os.pathsep.join([str(strangers), str(ROOT / "src")])


def test_every_name_that_is_preloaded_is_found() -> None:
    """A forkserver is silent about one that it does not find."""
    preloaded = [*PRELOADED[DeviceKind.CPU], *PRELOADED[DeviceKind.CUDA]]
    program = f"""
import multiprocessing
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload({preloaded!r})
from qbatch.worker.machine.imports import COMPILER
from qbatch.worker.serving.runner_imports import NAMES
names = [*NAMES, *COMPILER, *{preloaded!r}]
missing = f"import sys; print([name for name in {{names}} if name not in sys.modules])"
child = context.Process(target=exec, args=(missing,))
child.start()
child.join()
"""
    shown = python("-c", program)
    assert shown.stdout.strip() == "[]", shown.stderr
