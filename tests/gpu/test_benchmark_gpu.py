"""The benchmark on a real GPU: its clock, its memory, its references, and the reasons it gives."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qbatch.core.domain import BASELINE, DType, Protocol, Scheme
from qbatch.core.errors import BenchmarkError, CudaOom
from qbatch.core.measured.measurement import Measurement
from qbatch.worker.measuring.quality.reference import compare, prepare_reference
from qbatch.worker.measuring.quality.replay import head_sha256
from qbatch.worker.measuring.speed.device_clock import CudaClock
from qbatch.worker.measuring.speed.generation import WarmedShapes, time_generation
from qbatch.worker.measuring.stats import summarize
from qbatch.worker.measuring.why.capture import Captures
from qbatch.worker.measuring.why.decode_kernels import KernelsRequest, Shape
from qbatch.worker.measuring.why.roofs import measure_roofs
from qbatch.worker.models.load import LoadedModel, load, translated
from tests import tiny
from tests.benchmarking import benchmark
from tests.unit.benchmark_models import INT8, NF4, QUICK, TEXT, quantized

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
PREFILL_S, STEP_S, SLOW_STEP_S, FIRST_CALLS_EXTRA_S = 0.100, 0.020, 0.060, 0.300
SLOW_EVERY = 10
PROMPT_TOKENS, NEW_TOKENS = 8, 41
PROTOCOL = replace(QUICK, prompt_tokens=64, new_tokens=16, warmup_iterations=1, min_iterations=2)


class SleepyConfig(PretrainedConfig):
    model_type = "sleepy"
    num_hidden_layers: int = 1


class SleepyModel(PreTrainedModel, GenerationMixin):
    """Keeps the device, not the host, asleep for a set time in each forward, and for longer in the first few."""

    config_class = SleepyConfig

    def __init__(self, config: SleepyConfig, slow_calls: int, cycles_per_s: float) -> None:
        super().__init__(config)
        self.embed = torch.nn.Embedding(16, 8)
        self.steps = 0
        self.slow_calls = slow_calls
        self.cycles_per_s = cycles_per_s

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutputWithPast:
        torch.cuda._sleep(int(self._delay_s(input_ids.shape[1]) * self.cycles_per_s))
        return CausalLMOutputWithPast(logits=torch.zeros(*input_ids.shape, 16, device=input_ids.device))

    def _delay_s(self, length: int) -> float:
        self.slow_calls -= 1
        extra_s = FIRST_CALLS_EXTRA_S if self.slow_calls >= 0 else 0.0
        if length == PROMPT_TOKENS:
            self.steps = 0
            return PREFILL_S + extra_s
        self.steps += 1
        return (SLOW_STEP_S if self.steps % SLOW_EVERY == 0 else STEP_S) + extra_s


@pytest.fixture(scope="module")
def cycles_per_s() -> float:
    """How many cycles of ``torch.cuda._sleep`` make a second on this device, once its clock is up."""
    clock = CudaClock(DEVICE)
    torch.cuda._sleep(1_000_000_000)
    marks = [clock.mark()]
    torch.cuda._sleep(1_000_000_000)
    marks.append(clock.mark())
    return 1_000_000_000 / clock.intervals_s(marks)[0]


def on_gpu(folder: Path) -> LoadedModel:
    return load(folder, dtype=DType.BFLOAT16, device=DEVICE)


def run(folder: Path, scheme: Scheme, protocol: Protocol = PROTOCOL) -> Measurement:
    return benchmark(
        on_gpu(folder),
        folder=folder,
        scheme=scheme.resolved(DType.BFLOAT16),
        dtype=DType.BFLOAT16,
        protocol=protocol,
        eval_text=TEXT,
        on_step=lambda _step: None,
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_injected_device_delays_are_found_within_five_per_cent(batch_size: int, cycles_per_s: float) -> None:
    protocol = replace(PROTOCOL, batch_size=batch_size, min_iterations=3)
    prompts = torch.ones(batch_size, PROMPT_TOKENS, dtype=torch.long, device=DEVICE)
    model = SleepyModel(SleepyConfig(), slow_calls=3, cycles_per_s=cycles_per_s).eval().to(DEVICE)
    times = time_generation(
        model, prompts, new_tokens=NEW_TOKENS, protocol=protocol, clock=CudaClock(DEVICE), warmed=WarmedShapes()
    )
    prefill, decode, per_token = summarize(times.prefill_s), summarize(times.decode_s), summarize(times.per_token_s)
    mean_step_s = (STEP_S * (SLOW_EVERY - 1) + SLOW_STEP_S) / SLOW_EVERY
    assert per_token.count == 3 * (NEW_TOKENS - 1)
    assert [prefill.p50, prefill.p95] == pytest.approx([PREFILL_S] * 2, rel=0.05)
    assert per_token.p50 == pytest.approx(STEP_S, rel=0.05)
    assert per_token.p95 == pytest.approx(SLOW_STEP_S, rel=0.05)
    assert batch_size * (NEW_TOKENS - 1) / decode.mean == pytest.approx(batch_size / mean_step_s, rel=0.05)


def test_a_round_of_one_generation_finds_injected_device_delays(cycles_per_s: float) -> None:
    """A warm-up of five tokens, four prefills, and one generation."""
    protocol = replace(PROTOCOL, warmup_tokens=5, prefill_iterations=4, min_iterations=3, rounds=3)
    prompts = torch.ones(1, PROMPT_TOKENS, dtype=torch.long, device=DEVICE)
    model = SleepyModel(SleepyConfig(), slow_calls=3, cycles_per_s=cycles_per_s).eval().to(DEVICE)
    times = time_generation(
        model, prompts, new_tokens=NEW_TOKENS, protocol=protocol, clock=CudaClock(DEVICE), warmed=WarmedShapes()
    )
    assert [len(times.prefill_s), len(times.decode_s), len(times.per_token_s)] == [5, 1, NEW_TOKENS - 1]
    assert times.prefill_s == pytest.approx([PREFILL_S] * 5, rel=0.05)
    assert summarize(times.per_token_s).p50 == pytest.approx(STEP_S, rel=0.05)
    mean_step_s = (STEP_S * (SLOW_EVERY - 1) + SLOW_STEP_S) / SLOW_EVERY
    assert times.decode_s[0] / (NEW_TOKENS - 1) == pytest.approx(mean_step_s, rel=0.05)


@pytest.mark.parametrize("scheme", [BASELINE, NF4, INT8], ids=lambda scheme: scheme.method.value)
def test_a_gpu_s_measurement_has_memory_and_its_versions(tmp_path: Path, scheme: Scheme) -> None:
    source = tiny.make_causal(tmp_path / "llama")
    folder = source if scheme.is_baseline else quantized(source, tmp_path / "checkpoint", scheme)
    measurement = run(folder, scheme)
    memory = measurement.details.to_json()["memory"]
    assert measurement.max_allocated_bytes is not None
    assert measurement.weights_bytes < measurement.max_allocated_bytes <= memory["max_reserved"]
    assert memory["max_global_vram"] >= memory["max_reserved"]
    assert measurement.decode_tokens_per_s is not None
    assert measurement.perplexity == pytest.approx(tiny.VOCAB_SIZE, rel=0.3)
    assert measurement.details.to_json()["versions"]["cuda"]
    assert measurement.details.to_json()["versions"]["driver"]
    assert "NVIDIA" in measurement.device_name


@pytest.mark.parametrize("arch", ["llama", "bloom", "gpt2"])
def test_a_reference_replays_bit_for_bit_and_int8_is_nearer_than_nf4(tmp_path: Path, arch: str) -> None:
    source = tiny.make_causal(tmp_path / arch, arch)
    base = on_gpu(source)
    reference = prepare_reference(base, PROTOCOL, TEXT, tmp_path / "references" / arch)
    assert reference is not None
    assert reference.form == "hidden"
    assert compare(base, reference, PROTOCOL, TEXT).kl_max == 0
    kl = [
        compare(on_gpu(quantized(source, tmp_path / name, scheme)), reference, PROTOCOL, TEXT).kl_mean or 0.0
        for name, scheme in (("int8", INT8), ("nf4", NF4))
    ]
    assert 0 < kl[0] < kl[1]


@pytest.mark.timeout(600)
def test_an_explanation_has_every_part(tmp_path: Path) -> None:
    """A tiny model's weights fit in the cache, so there is no verdict, but everything it is made of is there."""
    source = tiny.make_causal(tmp_path / "llama")
    details = run(source, BASELINE, replace(PROTOCOL, rounds=2, why=True, energy=True)).details.to_json()
    assert details["flags"].keys() == {"foreign_processes", "throttled", "clocks_changed"}
    assert details["rounds"]["count"] == 2
    why = details["why"]
    assert why["verdict"] is None
    assert why["reason"] == "the weights fit in the GPU's cache"
    assert why["profile"]["device_busy_s"] > 0
    assert 0 < why["busy_share"] < 1
    assert why["profile"]["launches"] > 10
    assert why["roofs"]["copy_bytes_per_s"] > 1e11
    assert why["kernels_alone"]["reason"] is None
    assert 0 < why["kernels_alone"]["step_s"] < why["step_wall_s"]
    energy = why["energy"]
    assert energy["idle_w"] > 0
    assert energy["decode"]["gross_j_per_token"] > 0


def steps_of(tmp_path: Path, *schemes: Scheme) -> list[KernelsRequest]:
    """A request for each scheme, of two shapes, that does not say what is known not to be capturable."""
    source = tiny.make_causal(tmp_path / "llama")
    shapes = tuple(Shape(batch_size=batch_size, prompt_tokens=64, new_tokens=16) for batch_size in (1, 4))
    folders = (
        source if scheme.is_baseline else quantized(source, tmp_path / f"checkpoint-{number}", scheme)
        for number, scheme in enumerate(schemes)
    )
    return [KernelsRequest(folder=str(at), dtype="bfloat16", device=DEVICE, shapes=shapes) for at in folders]


def test_a_head_on_the_gpu_has_the_hash_of_its_bytes() -> None:
    """A few chunks of it, the last one shorter."""
    head = torch.nn.Linear(4096, 20_001, bias=False, dtype=torch.bfloat16)
    on_cpu = head_sha256(SimpleNamespace(get_output_embeddings=lambda: head))
    head.to(DEVICE)
    assert head_sha256(SimpleNamespace(get_output_embeddings=lambda: head)) == on_cpu


@pytest.mark.timeout(600)
def test_a_graph_is_captured_where_nothing_synchronises(tmp_path: Path) -> None:
    """A failed capture spoils neither those before it nor those after it, and every model has its profile."""
    requests = steps_of(tmp_path, NF4, INT8, BASELINE)
    with Captures() as captures:
        # The second time the imports are there.
        for answer in (captures.kernels(requests), captures.kernels(requests)):
            for of_model, captured in zip(answer, (True, False, True), strict=True):
                for found in of_model:
                    assert found.alone is not None
                    assert (found.alone.step_s is not None) == captured
                    assert (found.alone.reason is None) == captured
                    assert found.reason is None
                    assert found.profile is not None
                    assert found.profile.device_busy_s > 0


@pytest.mark.timeout(600)
def test_a_server_that_its_runner_forked_before_it_used_the_gpu_captures(tmp_path: Path) -> None:
    (request,) = steps_of(tmp_path, NF4)
    log = tmp_path / "log"
    program = f"""
from pathlib import Path
from qbatch.worker.serving import runner_imports
from qbatch.worker.measuring.why.kernels_server import fork_server
server = fork_server()
import torch
from qbatch.worker.measuring.why.capture import Captures
from qbatch.worker.measuring.why.decode_kernels import KernelsRequest, Shape
torch.zeros(1, device="cuda")
with Captures(server, log_path=Path({str(log)!r})) as captures:
    captures.prepare([{request!r}])
    for found in captures.kernels([{request!r}])[0]:
        print(found.alone.step_s > 0, found.profile.device_busy_s > 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n" * 2, done.stderr
    said = [line.split(" INFO ")[1] for line in log.read_text().splitlines() if "qbatch.kernels" in line]
    assert said == [f"{what} {request.folder}" for what in ("loading", "capturing", "profiling")], "loaded once"


@pytest.mark.timeout(600)
def test_one_process_captures_all_models_where_no_capture_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLM.int8's outlier path is known not to be capturable, so it is not tried, and profiled all the same."""
    asked: list[int] = []
    original = Captures._ask

    def ask(captures: Captures, tasks: Any) -> Any:
        asked.append(len(tasks))
        return original(captures, tasks)

    monkeypatch.setattr(Captures, "_ask", ask)
    requests = steps_of(tmp_path, BASELINE, INT8, NF4)
    requests[1] = replace(requests[1], not_captured="known")
    with Captures() as captures:
        bf16, int8, nf4 = captures.kernels(requests)
    assert asked == [3]
    assert [found.alone and found.alone.reason for found in int8] == ["known"] * 2
    for found in (*bf16, *int8, *nf4):
        assert found.profile is not None
    for found in (*bf16, *nf4):
        assert found.alone is not None
        assert found.alone.step_s is not None


@pytest.mark.timeout(600)
def test_int8_waits_for_its_outliers_and_16_bits_for_the_host(tmp_path: Path) -> None:
    """Steps short enough for any host to be slower than the device, of weights too large for its cache."""
    source = tiny.make_causal(
        tmp_path / "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8
    )
    asked = replace(PROTOCOL, why=True)
    reasons = [
        run(folder, scheme, asked).details.why
        for folder, scheme in ((source, BASELINE), (quantized(source, tmp_path / "int8", INT8), INT8))
    ]
    assert [why.verdict for why in reasons] == ["host-bound", "synchronization-bound"]
    waits = [why.profile.synchronizations for why in reasons]
    assert waits[0] < 16 < waits[1]


def test_roofs_are_those_of_a_gpu() -> None:
    roofs = measure_roofs(DEVICE, torch.bfloat16)
    assert 1e11 < roofs.copy_bytes_per_s < 2e13
    assert 1e13 < roofs.matmul_flops_per_s < 1e16


def test_running_out_of_memory_is_its_own_error() -> None:
    with pytest.raises(CudaOom), translated(BenchmarkError, "allocating"):
        torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
