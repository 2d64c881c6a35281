"""A CPU that emulates 16-bit arithmetic is recognised and reported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qbatch.cli import main
from qbatch.core.domain import DType
from qbatch.views.checks import State
from qbatch.views.comparison import Preference
from qbatch.views.emulation import arithmetic_check, emulation_remarks, native_check
from qbatch.worker.machine import cpu_arithmetic
from qbatch.worker.machine.cpu_arithmetic import arithmetic_slowdowns, bfloat16_instructions
from tests.unit.measured_rows import result
from tests.unit.printed import comparison, read, results_table

EPYC = "AMD EPYC 7302 (2 cores)"


def measured(number: int, scheme: str, slowdown: dict[str, float] | None, **fields: Any) -> dict[str, Any]:
    return result(number, scheme, device_name=EPYC, details={"arithmetic_slowdown": slowdown}, **fields)


def on_one_line(text: str) -> str:
    return " ".join(text.split())


def test_what_a_cpu_computes_in_is_measured_and_a_gpu_s_is_not() -> None:
    found = arithmetic_slowdowns("cpu", (DType.BFLOAT16, DType.FLOAT32))
    assert found is not None
    assert found.keys() == {"bfloat16"}
    assert 0.01 < found["bfloat16"] < 1000
    assert arithmetic_slowdowns("cpu", (DType.FLOAT32, DType.FLOAT32)) == {}
    assert arithmetic_slowdowns("cuda:0", (DType.BFLOAT16,)) is None


def test_doctor_measures_a_cpu_without_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN kept to AVX2, which has none."""
    monkeypatch.setenv("QBATCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = {check["check"]: check for check in json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)}
    assert found["cpu"]["state"] == "note"
    times = re.search(r"emulates bfloat16: a matrix product takes ([\d.]+) times as long", found["cpu"]["message"])
    assert times is not None
    assert float(times[1]) > 3


def test_measuring_leaves_the_threads_as_they_were() -> None:
    import torch

    before = torch.get_num_threads()
    cpu_arithmetic.arithmetic_slowdown.__wrapped__(DType.BFLOAT16)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("cpuinfo", "environ", "instructions"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx512f avx512_bf16 vaes\n", {}, "avx512_bf16"),
        ("flags\t\t: fpu avx512_bf16 amx_bf16\n", {}, "amx_bf16"),
        ("Features\t: fp asimd bf16\n", {}, "bf16"),
        ("model name\t: has avx512_bf16\nflags\t\t: fpu avx2\n", {}, None),
        ("flags\t\t: avx512_bf16\n", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, None),
        ("", {}, None),
    ],
)
def test_a_processor_s_bfloat16_is_seen(cpuinfo: str, environ: dict[str, str], instructions: str | None) -> None:
    assert bfloat16_instructions(cpuinfo, environ) == instructions


def test_tables_say_by_how_much_bfloat16_is_slower() -> None:
    rows = [
        measured(1, "none", {"bfloat16": 74.6}, weights_bytes=2**21),
        measured(2, "bnb-nf4", {"bfloat16": 76.2}, weights_bytes=2**20),
    ]
    for table in (results_table(rows), comparison(rows, Preference(), by="scheme", format="table")):
        assert f"{EPYC} emulates bfloat16: a matrix product takes 75 times as long there" in on_one_line(table)
        assert "Speeds measured in bfloat16, including the baseline's, show how fast the emulation is" in on_one_line(
            table
        )


def test_a_row_by_itself_says_it_too() -> None:
    (said,) = emulation_remarks(read([measured(2, "bnb-nf4", {"bfloat16": 2.71, "float16": 1.0})]))
    assert said.startswith(f"{EPYC} emulates bfloat16: a matrix product takes 2.7 times as long")
    assert "baseline" not in said


@pytest.mark.parametrize("slowdown", [{"bfloat16": 0.46}, {}, None])
def test_where_nothing_is_emulated_nothing_is_said(slowdown: dict[str, float] | None) -> None:
    assert "emulat" not in results_table([measured(1, "none", slowdown)])
    assert not list(emulation_remarks(read([result(1, state="queued", details=None)])))


def test_doctor_says_what_the_cpu_computes_in() -> None:
    emulating = arithmetic_check({"bfloat16": 74.6, "float16": 41.0})
    assert emulating.state is State.NOTE
    assert "emulates bfloat16: a matrix product takes 75 times as long as in float32" in emulating.message
    assert "the speeds of 16-bit models show how fast the emulation is" in emulating.message
    fast = arithmetic_check({"bfloat16": 0.5, "float16": 41.0})
    assert fast.state is State.OK
    assert fast.message.startswith("computes in bfloat16 as fast as in float32; emulates float16")
    assert native_check("amx_bf16").state is State.OK
