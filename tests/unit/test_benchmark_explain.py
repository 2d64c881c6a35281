"""Why a step takes as long as it does: what can be checked without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from qbatch.core.domain import DType
from qbatch.core.measured.decode_figures import MeasuredEnergy
from qbatch.worker.measuring.pooled_rounds import pool
from qbatch.worker.measuring.speed import energy
from qbatch.worker.measuring.speed.energy import (
    EnergySpan,
    NoEnergyCounter,
    loop_between_ticks,
    measure_energy,
    net_energy,
)
from qbatch.worker.measuring.speed.fairness import FairnessMonitor, GpuConditions, flags_of
from qbatch.worker.measuring.speed.phases import Round
from qbatch.worker.measuring.speed.size import measure_size
from qbatch.worker.measuring.why import roofs
from qbatch.worker.measuring.why.decode_kernels import (
    KernelsAlone,
    Shape,
    StepKernels,
    as_generate_decodes,
    decode_step,
)
from qbatch.worker.measuring.why.explain import Explanation
from qbatch.worker.measuring.why.profile import StepProfile, covered, profile_decode, summarize_events
from qbatch.worker.measuring.why.roofs import Roofs
from qbatch.worker.measuring.why.traffic import StepWork, active_expert_share, step_work
from qbatch.worker.measuring.why.verdict import Verdict, judge
from tests import tiny
from tests.unit.benchmark_models import NF4, QUICK, loaded_on_cpu, measured, quantized

EMBEDDING_BYTES = tiny.VOCAB_SIZE * 128 * 2
ROOFS = Roofs(copy_bytes_per_s=4e12, matmul_flops_per_s=8e14, dtype="bfloat16")
PROFILE = StepProfile(steps=8, device_busy_s=0.007, launches=1000, synchronizations=1)
SHAPE = Shape(batch_size=2, prompt_tokens=8, new_tokens=4)


def event(name: str, begin_us: float, end_us: float, category: str = "cuda_runtime") -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": begin_us, "dur": end_us - begin_us}


def test_busy_time_counts_what_overlaps_once() -> None:
    assert covered([(0, 4), (2, 6), (10, 11), (3, 5)]) == 7
    assert covered([]) == 0


def test_events_become_averages_of_a_step() -> None:
    events = [
        event("cudaLaunchKernel", 0, 1),
        event("cudaLaunchKernelExC", 1, 2),
        event("cuLaunchKernel", 2, 3, "cuda_driver"),
        event("cudaStreamSynchronize", 3, 9),
        event("cudaDeviceSynchronize", 9, 10),
        event("gemm", 10, 40, "kernel"),
        event("Memcpy DtoH", 30, 45, "gpu_memcpy"),
        event("Memset", 45, 50, "gpu_memset"),
        event("a range of the user's", 0, 1000, "gpu_user_annotation"),
        event("aten::mm", 0, 30, "cpu_op"),
    ]
    assert summarize_events(events, steps=2) == StepProfile(
        steps=2, device_busy_s=20e-6, launches=1.5, synchronizations=0.5
    )


@pytest.mark.parametrize("prompt_tokens", [8, tiny.MAX_TOKENS - 4])
def test_eight_steps_of_generate_are_profiled_within_the_models_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt_tokens: int
) -> None:
    seen: list[str] = []

    def keep_names(events: list[dict[str, Any]], *, steps: int) -> StepProfile:
        seen.extend(event["name"] for event in events)
        return summarize_events(events, steps=steps)

    monkeypatch.setattr("qbatch.worker.measuring.why.profile.summarize_events", keep_names)
    model = loaded_on_cpu(tiny.make_causal(tmp_path, "gpt2")).model
    prompts = torch.ones(1, prompt_tokens, dtype=torch.long)
    profile = profile_decode(model, prompts, new_tokens=4, device="cpu")
    assert seen.count("aten::argmax") == profile.steps == 8
    assert (profile.device_busy_s, profile.launches) == (0, 0)


def test_the_prefill_and_three_steps_are_over_when_the_profile_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/measurements.md has it."""
    model, forwards, at = loaded_on_cpu(tiny.make_causal(tmp_path)).model, list[int](), dict[str, int]()
    model.register_forward_hook(lambda _module, _args, _output: forwards.append(1))
    for name in ("start", "stop"):
        original = getattr(torch.profiler.profile, name)

        def noted(profiler: Any, name: str = name, original: Any = original) -> None:
            at[name] = len(forwards)
            original(profiler)

        monkeypatch.setattr(torch.profiler.profile, name, noted)
    profile_decode(model, torch.ones(1, 8, dtype=torch.long), new_tokens=4, device="cpu")
    assert at == {"start": 1 + 3, "stop": 1 + 3 + 8}
    text = (Path(__file__).parents[2] / "docs" / "measurements.md").read_text(encoding="utf-8")
    assert "mean of 8 steps, after the prefill and 3 more" in text


TEXT_SHAPE = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}


def held_by(module: Any) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


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


def test_each_sequence_computes_with_its_own_experts_alone(tmp_path: Path) -> None:
    """However many are read for all of them."""
    model = loaded_on_cpu(tiny.make_causal(tmp_path, "mixtral")).model
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    others = measure_size(model).num_parameters - EMBEDDING_BYTES // 2 - experts
    for batch_size in (1, 2, 8):
        assert step_work(model, None, batch_size=batch_size).flops == 2 * batch_size * (others + experts // 2)


def test_experts_without_a_name_are_told_by_how_many_a_weight_stacks() -> None:
    shape = {**TEXT_SHAPE, "num_attention_heads": 8, "num_key_value_heads": 4, "kv_channels": 16}
    config = transformers.JetMoeConfig(num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True, **shape)
    model = transformers.JetMoeForCausalLM(config)
    unnamed = sum(p.nbytes for name, p in model.named_parameters() if p.dim() == 3 and ".experts." not in name)
    named = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    assert unnamed > 0
    assert step_work(model, None, batch_size=1).weight_bytes == held_by(model) - (unnamed + named) // 2


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (transformers.MixtralConfig(num_local_experts=8, num_experts_per_tok=2), 2 / 8),
        (transformers.Gemma4TextConfig(num_experts=128, top_k_experts=8), 8 / 128),
        (transformers.DbrxConfig(ffn_config={"moe_num_experts": 16, "moe_top_k": 4}), 4 / 16),
        (transformers.AriaTextConfig(moe_num_experts=64, moe_topk=6), 6 / 64),
        (SimpleNamespace(num_experts=16, moe_topk=[2, 2, 2]), 2 / 16),
        (SimpleNamespace(num_experts=16, moe_topk=[1, 2, 2]), None),
        (SimpleNamespace(num_experts=16), None),
        (transformers.LlamaConfig(), None),
    ],
    ids=["mixtral", "gemma4", "dbrx", "aria", "by layer", "by layer, unequal", "of an unknown name", "no mixture"],
)
def test_each_mixture_says_in_its_own_words_how_many_experts_it_takes(config: Any, share: float | None) -> None:
    assert active_expert_share(config, 1) == share


def test_a_mixture_of_unknown_size_gets_no_verdict_but_keeps_its_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qbatch.worker.measuring.why.explain.measure_roofs", lambda *_: ROOFS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(L2_cache_size=0))
    loaded = loaded_on_cpu(tiny.make_causal(tmp_path, "mixtral"))
    loaded.model.config.num_experts_per_tok = 0
    explanation = Explanation(replace(QUICK, why=True), lambda _step: None)
    shape = Round(times_s={}, prompts=torch.ones(1, 8, dtype=torch.long), new_tokens=4, conditions=None)
    explanation.observe(loaded, shape)
    why = concluded(explanation, StepKernels(profile=PROFILE))
    assert (why["verdict"], why["work"], why["bytes_per_s"]) == (None, None, None)
    assert "how many" in why["reason"]
    assert why["profile"]["steps"] == 8


def test_of_every_table_a_step_reads_a_row_not_only_of_the_input_s(tmp_path: Path) -> None:
    """Positions, and the embeddings that each layer of a Gemma 3n or 4 has: more bytes than all its layers."""
    gpt2 = loaded_on_cpu(tiny.make_causal(tmp_path, "gpt2")).model
    assert step_work(gpt2, None, batch_size=1).weight_bytes == held_by(gpt2) - gpt2.transformer.wpe.weight.nbytes
    config = transformers.Gemma4TextConfig(
        **TEXT_SHAPE, head_dim=32, hidden_size_per_layer_input=64, vocab_size_per_layer_input=tiny.VOCAB_SIZE
    )
    gemma = transformers.Gemma4ForCausalLM(config)
    table = gemma.model.embed_tokens_per_layer.weight.nbytes
    assert table > 0
    assert step_work(gemma, None, batch_size=1).weight_bytes == held_by(gemma) - table, "the head is tied"


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_model_that_also_sees_the_text_decoder_and_the_head_are_read(tied: bool) -> None:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(
        text_config=TEXT_SHAPE | {"rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2},
        tie_word_embeddings=tied,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    assert held_by(model.model.visual) > 0
    # Untied, the table is left out and the head is not; tied, they are one.
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    assert step_work(model, None, batch_size=1).weight_bytes == held_by(model.model.language_model)


@pytest.mark.parametrize(
    ("busy_s", "launches", "synchronizations", "weight_bytes", "flops", "expected"),
    [
        pytest.param(0.007, 1000, 1, 16e9, 16e9, Verdict.HOST_BOUND, id="16 bits, eager, 8B"),
        pytest.param(0.007, 60, 3, 16e9, 16e9, Verdict.HOST_BOUND, id="few layers: what generate itself waits"),
        pytest.param(0.009, 4000, 256, 9e9, 16e9, Verdict.SYNCHRONIZATION_BOUND, id="LLM.int8's outlier path, 8B"),
        pytest.param(0.009, 10_000, 256, 9e9, 16e9, Verdict.SYNCHRONIZATION_BOUND, id="with more launches"),
        pytest.param(0.009, 3500, 2, 9e9, 16e9, Verdict.HOST_BOUND, id="LLM.int8 without it, 8B"),
        pytest.param(0.019, 1000, 1, 46e9, 16e9, Verdict.MEMORY_BOUND, id="at the copy roof"),
        pytest.param(0.019, 1000, 1, 1e9, 10e12, Verdict.COMPUTE_BOUND, id="at the arithmetic roof"),
        pytest.param(0.019, 1000, 256, 5e9, 16e9, Verdict.KERNEL_BOUND, id="busy, far from both"),
        pytest.param(0.0139, 1000, 1, 5e9, 16e9, Verdict.HOST_BOUND, id="busy for 69.5 %"),
        pytest.param(0.0141, 1000, 1, 5e9, 16e9, Verdict.KERNEL_BOUND, id="busy for 70.5 %"),
        pytest.param(0.019, 1000, 1, 0.595 * 0.019 * ROOFS.copy_bytes_per_s, 16e9, Verdict.KERNEL_BOUND, id="59.5 %"),
        pytest.param(0.019, 1000, 1, 0.605 * 0.019 * ROOFS.copy_bytes_per_s, 16e9, Verdict.MEMORY_BOUND, id="60.5 %"),
        pytest.param(
            0.019, 1000, 1, 5e9, 0.595 * 0.019 * ROOFS.matmul_flops_per_s, Verdict.KERNEL_BOUND, id="59.5 % of products"
        ),
        pytest.param(
            0.019,
            1000,
            1,
            5e9,
            0.605 * 0.019 * ROOFS.matmul_flops_per_s,
            Verdict.COMPUTE_BOUND,
            id="60.5 % of products",
        ),
        pytest.param(0.007, 1000, 1, 40e6, 16e9, None, id="in the cache"),
    ],
)
def test_the_verdict_names_what_limits(
    busy_s: float, launches: float, synchronizations: float, weight_bytes: float, flops: float, expected: Verdict | None
) -> None:
    profile = StepProfile(steps=8, device_busy_s=busy_s, launches=launches, synchronizations=synchronizations)
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


def test_a_loop_between_ticks_finds_the_power_of_a_coarse_counter() -> None:
    machine = Machine(watts=130.0)
    span = loop_between_ticks(machine.work(0.7), machine.read_j, min_s=10.0, now_s=machine.now_s, sleep=machine.sleep)
    assert span.count == 15
    assert span.seconds == pytest.approx(10.6, abs=0.2)
    assert span.watts == pytest.approx(130.0, rel=0.001)


def test_net_energy_is_what_idling_would_not_have_taken() -> None:
    idle = EnergySpan(joules=1200.0, seconds=10.0, count=1)
    busy = EnergySpan(joules=1500.0, seconds=12.0, count=6)
    found = net_energy(busy, idle)
    assert found.gross_j == pytest.approx(250.0)
    assert found.net_j == pytest.approx((1500 - 120 * 12) / 6)
    assert found.uncertainty_j == pytest.approx((12.5**2 + (12 * 12 / 10) ** 2) ** 0.5 / 6)


class Metered(Machine):
    """One whose power changes: the counter adds it up, and moves at each tick."""

    def __init__(self, watts: float) -> None:
        super().__init__(watts)
        self.joules = self.shown_j = 0.0
        self.tick = 0.1

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while self.tick <= end:
            self.joules += self.watts * (self.tick - self.now)
            self.now, self.shown_j = self.tick, self.joules
            self.tick += 0.1
        self.joules += self.watts * (end - self.now)
        self.now = end

    def read_j(self) -> float:
        return self.shown_j


def test_decoding_s_energy_is_generation_s_less_the_prefill_s_and_idle_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that draws 100 W idle; 300 W for the 0.5 s of a prefill, 200 W for the 2 s of decoding."""
    machine, drawn = Metered(watts=100.0), {"prefill": (0.5, 300.0), "generate": (2.5, 220.0)}

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            seconds, machine.watts = drawn[name]
            machine.sleep(seconds)
            machine.watts = 100.0

        return run

    loop = partial(loop_between_ticks, min_s=50.0, now_s=machine.now_s, sleep=machine.sleep)
    monkeypatch.setattr(energy, "loop_between_ticks", lambda work, _: loop(work, machine.read_j))
    monkeypatch.setattr(energy, "FairnessMonitor", lambda _: SimpleNamespace(conditions=lambda: conditions(1000)))
    monkeypatch.setattr(energy.time, "sleep", machine.sleep)
    found = measure_energy(None, prefill=call("prefill"), generate=call("generate"), tokens=256, decoded=32).to_json()
    near = partial(pytest.approx, rel=0.02)
    assert found["idle_w"] == near(100.0)
    assert (found["prefill"]["gross_j"], found["prefill"]["net_j"]) == (near(150.0), near(100.0))
    assert found["prefill"]["net_j_per_token"] == near(100.0 / 256)
    assert (found["decode"]["gross_j"], found["decode"]["net_j"]) == (near(400.0), near(200.0))
    assert (found["decode"]["gross_j_per_token"], found["decode"]["net_j_per_token"]) == (near(12.5), near(6.25))


def test_a_roof_counts_reads_writes_and_both_operations_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "_copy_s", lambda _: 0.5)
    monkeypatch.setattr(roofs, "_matmul_s", lambda *_: 0.25)
    found = roofs.measure_roofs.__wrapped__("cuda:0", torch.bfloat16)
    assert found.copy_bytes_per_s == 2 * 2**30 / 0.5
    assert found.matmul_flops_per_s == 2 * 8192**3 / 0.25
    assert found.dtype == "bfloat16"


def test_a_counter_that_stands_still_is_no_counter() -> None:
    machine = Machine(watts=0.0)
    with pytest.raises(NoEnergyCounter, match="did not change"):
        loop_between_ticks(machine.work(1), machine.read_j, now_s=machine.now_s, sleep=machine.sleep)


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2", "opt"])
@torch.inference_mode()
def test_the_captured_step_is_the_same_however_often_it_is_replayed(tmp_path: Path, arch: str) -> None:
    model = loaded_on_cpu(tiny.make_causal(tmp_path, arch)).model
    seen = ids_seen(model)
    step, rewind = decode_step(model, SHAPE, "cpu")
    rewind()
    step()
    expected = model(input_ids=torch.cat(seen, dim=1)).logits[:, -1]
    for _ in range(3 * SHAPE.new_tokens):
        rewind()
        torch.testing.assert_close(step()[:, -1], expected)


def ids_seen(model: Any) -> list[torch.Tensor]:
    """The ids of each call of ``model``, as they come."""
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _module, _args, given: seen.append(given["input_ids"]), with_kwargs=True)
    return seen


@torch.inference_mode()
def test_the_rows_of_a_captured_step_are_not_alike_and_the_same_each_time(tmp_path: Path) -> None:
    """Of a mixture, equal rows would read the experts of one."""
    model = loaded_on_cpu(tiny.make_causal(tmp_path, "mixtral")).model
    seen = ids_seen(model)
    for _ in range(2):
        decode_step(model, replace(SHAPE, batch_size=8), "cpu")[0]()
    prompt, token = seen[:2]
    assert (prompt.shape, token.shape) == ((8, SHAPE.prompt_tokens), (8, 1))
    assert len(set(map(tuple, prompt.tolist()))) == 8
    assert len(set(token.flatten().tolist())) > 4
    assert max(prompt.max(), token.max()) < tiny.VOCAB_SIZE
    assert torch.equal(torch.cat(seen[:2], dim=1), torch.cat(seen[2:], dim=1))


def concluded(explanation: Explanation, kernels: StepKernels | None) -> dict[str, Any]:
    return explanation.conclude(
        device="cuda:0", compute_dtype=DType.BFLOAT16, step_wall_s=0.02, kernels=kernels
    ).to_json()


def test_what_goes_wrong_while_explaining_is_a_reason(tmp_path: Path) -> None:
    """Here for want of a GPU: every part fails, and says so in its place."""
    loaded = replace(loaded_on_cpu(tiny.make_causal(tmp_path)), device="cuda:0")
    steps: list[str] = []
    explanation = Explanation(replace(QUICK, why=True, energy=True), steps.append)
    prompts = torch.ones(1, 8, dtype=torch.long)
    explanation.observe(loaded, Round(times_s={}, prompts=prompts, new_tokens=4, conditions=None))
    without = StepKernels(alone=KernelsAlone(reason="not captured"), reason="cannot profile a step: no")
    why = concluded(explanation, without)
    assert steps == ["energy"]
    assert explanation.fault is None
    assert (why["verdict"], why["profile"], why["reason"]) == (None, None, "cannot profile a step: no")
    assert why["energy"].keys() == {"reason"}
    assert why["kernels_alone"] == {"step_s": None, "reason": "not captured"}


def test_energy_is_measured_of_a_model_that_has_generated_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first loop would hold what is loaded and prepared once, where no speed was measured."""
    loaded = loaded_on_cpu(tiny.make_causal(tmp_path))
    passes = list[int]()
    loaded.model.register_forward_hook(lambda _model, _args, output: passes.append(output.logits.shape[1]))
    before = list[int]()

    def measure(*_: Any, **__: Any) -> MeasuredEnergy:
        before.extend(passes)
        return MeasuredEnergy(idle_w=50.0)

    monkeypatch.setattr("qbatch.worker.measuring.why.explain.nvml_handle", lambda _: nullcontext(object()))
    monkeypatch.setattr("qbatch.worker.measuring.why.explain.measure_energy", measure)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    explanation = Explanation(replace(QUICK, energy=True), lambda _step: None)
    shape = Round(times_s={}, prompts=torch.ones(1, 8, dtype=torch.long), new_tokens=4, conditions=None)
    explanation.observe(loaded, shape)
    assert explanation.energy.idle_w == 50.0
    assert len(before) == 4, "a prefill and three steps"


def test_a_mixture_is_captured_with_the_kernels_that_generate_decodes_with(tmp_path: Path) -> None:
    """On any device but a CPU: here one without data, where its prefill has others."""
    model = loaded_on_cpu(tiny.make_causal(tmp_path, "mixtral")).model.to("meta")
    model.set_experts_implementation("grouped_mm")
    with as_generate_decodes(model):
        assert set(model.get_experts_implementation().values()) == {"batched_mm"}
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}


def test_roofs_are_measured_once_and_before_the_end_of_all_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qbatch.worker.measuring.why.explain.measure_roofs", lambda *_: ROOFS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(L2_cache_size=0))
    steps = list[str]()
    explanation = Explanation(replace(QUICK, why=True), steps.append)
    explanation.measure_roofs("cuda:0", DType.BFLOAT16)
    assert steps == ["roofs"]
    why = concluded(explanation, StepKernels(profile=PROFILE))
    assert steps == ["roofs"]
    assert why["roofs"]["copy_bytes_per_s"] == ROOFS.copy_bytes_per_s


def test_after_a_fault_of_the_device_nothing_more_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("qbatch.worker.measuring.why.explain.step_work", fault)
    explanation = Explanation(replace(QUICK, why=True, energy=True), lambda _step: None)
    shape = Round(times_s={}, prompts=torch.ones(1, 8, dtype=torch.long), new_tokens=4, conditions=None)
    explanation.observe(loaded_on_cpu(tiny.make_causal(tmp_path)), shape)
    why = concluded(explanation, None)
    assert explanation.fault is not None
    assert why["reason"] == why["energy"]["reason"] == str(explanation.fault)


class Card:
    """A GPU as NVML tells of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pids = [os.getpid()]
        self.reasons = 0
        self.clock_mhz = 1980
        processes = lambda _handle: [SimpleNamespace(pid=pid) for pid in self.pids]  # noqa: E731
        monkeypatch.setattr("pynvml.nvmlDeviceGetComputeRunningProcesses", processes)
        monkeypatch.setattr("pynvml.nvmlDeviceGetCurrentClocksEventReasons", lambda _handle: self.reasons)
        monkeypatch.setattr("pynvml.nvmlDeviceGetClockInfo", lambda _handle, _kind: self.clock_mhz)


FAIR = {"foreign_processes": False, "throttled": False, "clocks_changed": False}


def test_a_gpu_to_oneself_at_a_steady_clock_is_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    card, watch = Card(monkeypatch), FairnessMonitor("handle")
    assert watch.conditions() is None, "nothing was seen yet"
    watch.sample()
    card.clock_mhz = 1935
    card.reasons = 0x1 | 0x2  # idle, and clocks that somebody set
    card.pids = [1]  # the host's number of this process
    watch.sample()
    assert flags_of([watch.conditions()]) == FAIR


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("foreign_processes", {"pids": [1, os.getpid()]}),
        ("foreign_processes", {"pids": [1, 2]}),
        ("throttled", {"reasons": 0x4}),
        ("throttled", {"reasons": 0x20}),
        ("clocks_changed", {"clock_mhz": 1700}),
    ],
)
def test_what_makes_a_measurement_unfair_is_flagged_though_it_passes(
    monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, Any]
) -> None:
    card, watch = Card(monkeypatch), FairnessMonitor("handle")
    before = {key: getattr(card, key) for key in change}
    for state in (before, change, before):
        for key, value in state.items():
            setattr(card, key, value)
        watch.sample()
    assert flags_of([watch.conditions()]) == FAIR | {name: True}


def conditions(clock_mhz: int, *, throttled: bool = False) -> GpuConditions:
    return GpuConditions(foreign_processes=False, throttled=throttled, slowest_mhz=clock_mhz, fastest_mhz=clock_mhz)


def test_the_flags_of_all_rounds_are_those_of_the_row() -> None:
    rounds = [conditions(1980), None, conditions(1935, throttled=True)]
    assert flags_of(rounds) == FAIR | {"throttled": True}
    assert flags_of([None, None]) is None


def test_clocks_steady_in_each_round_may_have_changed_between_rounds() -> None:
    shape = Round(times_s={"forward": [1.0]}, prompts=torch.ones(1, 8), new_tokens=0, conditions=None)
    slow, fast = replace(shape, conditions=conditions(1005)), replace(shape, conditions=conditions(1980))
    assert pool([fast, fast]).flags == FAIR
    assert pool([fast, slow, shape]).flags == FAIR | {"clocks_changed": True}


def test_a_cpu_s_measurement_explains_nothing(tmp_path: Path) -> None:
    details = measured(tiny.make_causal(tmp_path), protocol=replace(QUICK, why=True, energy=True)).details.to_json()
    assert details["why"] is None
    assert details["flags"] is None
