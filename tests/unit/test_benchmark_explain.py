"""Why a step takes as long as it does: what can be checked without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType

from tests import tiny
from tests.unit.benchmark_models import NF4, loaded_on_cpu, measured, quantized
from worker.benchmark.energy import EnergySpan, NoEnergyCounter, loop_between_ticks, net_energy
from worker.benchmark.graph import GraphRequest, decode_step, kernels_alone
from worker.benchmark.profile import StepProfile, covered, profile_decode, summarize_events
from worker.benchmark.roofs import Roofs
from worker.benchmark.size import measure_size
from worker.benchmark.traffic import StepWork, active_expert_share, step_work
from worker.benchmark.verdict import Verdict, judge

EMBEDDING_BYTES = tiny.VOCAB_SIZE * 128 * 2
ROOFS = Roofs(copy_bytes_per_s=4e12, matmul_flops_per_s=8e14, dtype="bfloat16")
REQUEST = GraphRequest(folder="/nowhere", dtype="bfloat16", device="cpu", batch_size=1, prompt_tokens=8, new_tokens=4)


def event(name: str, begin_us: float, end_us: float, *, device: bool = False, note: bool = False) -> SimpleNamespace:
    kind = DeviceType.CUDA if device else DeviceType.CPU
    span = SimpleNamespace(start=begin_us, end=end_us)
    return SimpleNamespace(name=name, device_type=kind, time_range=span, is_user_annotation=note)


def test_busy_time_counts_what_overlaps_once() -> None:
    assert covered([(0, 4), (2, 6), (10, 11), (3, 5)]) == 7
    assert covered([]) == 0


def test_events_become_averages_of_a_step() -> None:
    events = [
        event("cudaLaunchKernel", 0, 1),
        event("cudaLaunchKernelExC", 1, 2),
        event("cuLaunchKernel", 2, 3),
        event("cudaStreamSynchronize", 3, 9),
        event("cudaDeviceSynchronize", 9, 10),
        event("gemm", 10, 40, device=True),
        event("Memcpy DtoH", 30, 50, device=True),
        event("a range of the user's", 0, 1000, device=True, note=True),
        event("aten::mm", 0, 30),
    ]
    assert summarize_events(events, steps=2) == StepProfile(
        steps=2, device_busy_s=20e-6, launches=1.5, synchronizations=0.5
    )


@pytest.mark.parametrize("prompt_tokens", [8, tiny.MAX_TOKENS - 4])
def test_eight_steps_of_generate_are_profiled_within_the_positions_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt_tokens: int
) -> None:
    seen: list[str] = []

    def keep_names(events: list[Any], *, steps: int) -> StepProfile:
        seen.extend(event.name for event in events)
        return summarize_events(events, steps=steps)

    monkeypatch.setattr("worker.benchmark.profile.summarize_events", keep_names)
    model = loaded_on_cpu(tiny.make_causal(tmp_path, "gpt2")).model
    prompts = torch.ones(1, prompt_tokens, dtype=torch.long)
    profile = profile_decode(model, prompts, new_tokens=4, device="cpu")
    assert seen.count("aten::argmax") == profile.steps == 8
    assert (profile.device_busy_s, profile.launches) == (0, 0)


def test_a_step_reads_every_weight_but_the_embedding_s_table(tmp_path: Path) -> None:
    loaded = loaded_on_cpu(tiny.make_causal(tmp_path))
    cache = loaded.model(torch.zeros(3, 10, dtype=torch.long), use_cache=True).past_key_values
    work = step_work(loaded.model, cache, batch_size=3)
    size = measure_size(loaded.model)
    assert work.weight_bytes == size.weights_bytes - EMBEDDING_BYTES
    assert work.flops == 2 * 3 * (size.num_parameters - EMBEDDING_BYTES // 2)
    # Keys and values of 2 layers, 2 heads of 32, 10 places, 3 sequences, 2 bytes each.
    assert work.cache_bytes == 2 * 2 * 2 * 32 * 10 * 3 * 2


def test_a_tied_table_is_read_once_as_the_head(tmp_path: Path) -> None:
    loaded = loaded_on_cpu(tiny.make_causal(tmp_path, tie_word_embeddings=True))
    assert step_work(loaded.model, None, batch_size=1).weight_bytes == measure_size(loaded.model).weights_bytes


def test_quantization_state_is_read_too(tmp_path: Path) -> None:
    model = loaded_on_cpu(quantized(tiny.make_causal(tmp_path / "llama"), tmp_path / "nf4", NF4)).model
    size = measure_size(model)
    work = step_work(model, None, batch_size=1)
    assert work.weight_bytes == size.weights_bytes - EMBEDDING_BYTES
    assert work.flops == 2 * (size.num_parameters - EMBEDDING_BYTES // 2)


def test_of_a_mixture_only_the_experts_that_a_batch_can_choose(tmp_path: Path) -> None:
    model = loaded_on_cpu(tiny.make_causal(tmp_path, "mixtral")).model
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    everything = measure_size(model).weights_bytes - EMBEDDING_BYTES
    assert experts > 0
    assert step_work(model, None, batch_size=1).weight_bytes == everything - experts // 2
    assert step_work(model, None, batch_size=8).weight_bytes == everything
    assert active_expert_share(SimpleNamespace(), 1) == 1


@pytest.mark.parametrize(
    ("busy_s", "synchronizations", "weight_bytes", "flops", "expected"),
    [
        (0.007, 1, 16e9, 16e9, Verdict.HOST_BOUND),
        (0.007, 256, 16e9, 16e9, Verdict.SYNCHRONIZATION_BOUND),
        (0.019, 1, 46e9, 16e9, Verdict.MEMORY_BOUND),
        (0.019, 1, 1e9, 10e12, Verdict.COMPUTE_BOUND),
        (0.019, 256, 5e9, 16e9, Verdict.KERNEL_BOUND),
        (0.007, 1, 40e6, 16e9, None),
    ],
)
def test_the_verdict_names_what_limits(
    busy_s: float, synchronizations: float, weight_bytes: float, flops: float, expected: Verdict | None
) -> None:
    profile = StepProfile(steps=8, device_busy_s=busy_s, launches=1000, synchronizations=synchronizations)
    work = StepWork(weight_bytes=int(weight_bytes), cache_bytes=0, flops=flops)
    assert judge(wall_s=0.020, profile=profile, work=work, roofs=ROOFS, cache_size_bytes=50_000_000) is expected


class Machine:
    """A clock that moves when told, and a counter that shows ``watts`` in steps of 100 ms."""

    def __init__(self, watts: float) -> None:
        self.now = 0.03
        self.watts = watts

    def now_s(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def read_j(self) -> float:
        return int(self.now / 0.1 + 1e-9) * 0.1 * self.watts

    def work(self, seconds: float) -> Callable[[], None]:
        return lambda: self.sleep(seconds)


def test_a_loop_between_ticks_finds_the_power_although_the_counter_is_coarse() -> None:
    machine = Machine(watts=130.0)
    span = loop_between_ticks(machine.work(0.7), machine.read_j, min_s=10.0, now_s=machine.now_s, sleep=machine.sleep)
    assert span.count == 15
    assert span.seconds == pytest.approx(10.6, abs=0.2)
    assert span.watts == pytest.approx(130.0, rel=0.001)


def test_net_energy_is_what_idling_would_not_have_taken() -> None:
    idle = EnergySpan(joules=1200.0, seconds=10.0, count=1)
    busy = EnergySpan(joules=1500.0, seconds=12.0, count=6)
    energy = net_energy(busy, idle)
    assert energy.gross_j == pytest.approx(250.0)
    assert energy.net_j == pytest.approx((1500 - 120 * 12) / 6)
    assert energy.uncertainty_j == pytest.approx((12.5**2 + (12 * 12 / 10) ** 2) ** 0.5 / 6)


def test_a_counter_that_stands_still_is_no_counter() -> None:
    machine = Machine(watts=0.0)
    with pytest.raises(NoEnergyCounter, match="did not move"):
        loop_between_ticks(machine.work(1), machine.read_j, now_s=machine.now_s, sleep=machine.sleep)


def test_without_cuda_there_is_a_reason_in_place_of_a_graph() -> None:
    assert kernels_alone(REQUEST).reason == "there are no CUDA graphs on a CPU"


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2", "opt"])
@torch.inference_mode()
def test_the_captured_step_is_the_same_however_often_it_is_replayed(tmp_path: Path, arch: str) -> None:
    model = loaded_on_cpu(tiny.make_causal(tmp_path, arch)).model
    step, rewind = decode_step(model, replace(REQUEST, batch_size=2))
    expected = model(torch.ones(2, REQUEST.prompt_tokens + 1, dtype=torch.long)).logits[:, -1]
    for _ in range(3 * REQUEST.new_tokens):
        rewind()
        torch.testing.assert_close(step()[:, -1], expected)


def test_a_capturing_process_that_dies_leaves_a_reason() -> None:
    result = kernels_alone(replace(REQUEST, device="cuda:0"))
    assert result.step_s is None
    assert result.reason is not None
    assert "ended with 1" in result.reason
    assert "config.json" in result.reason


def test_a_cpu_s_measurement_explains_nothing(tmp_path: Path) -> None:
    assert measured(tiny.make_causal(tmp_path)).details["why"] is None
