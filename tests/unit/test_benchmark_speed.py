"""The timing method, on a model whose times are known because they are injected."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qbatch.core.errors import BenchmarkError
from qbatch.worker.measuring.speed.device_clock import HostClock, repeat
from qbatch.worker.measuring.speed.generation import WarmedShapes, time_forward, time_generation
from qbatch.worker.measuring.stats import percentile, summarize
from tests.unit.benchmark_models import QUICK

PREFILL_S, STEP_S, SLOW_STEP_S, FIRST_CALLS_EXTRA_S = 0.100, 0.020, 0.060, 0.300
SLOW_EVERY = 10
PROMPT_TOKENS, NEW_TOKENS = 8, 41


class SlowConfig(PretrainedConfig):
    model_type = "slow"
    num_hidden_layers: int = 1


class SlowModel(PreTrainedModel, GenerationMixin):
    """Takes a set time for each forward, and longer for the first few.

    A step's time runs from the end of the step before, the prefill's from the call of ``generate``: so what happens in
    between is part of it. It notes what each came to, since a busy machine wakes a sleeper late.
    """

    config_class = SlowConfig

    def __init__(self, config: SlowConfig, slow_calls: int) -> None:
        super().__init__(config)
        self.embed = torch.nn.Embedding(16, 8)
        self.steps = 0
        self.slow_calls = slow_calls
        self.ended_s = 0.0
        self.prefills_s: list[float] = []
        self.steps_s: list[float] = []
        # How long each step was to take.
        self.set_s: list[float] = []

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.ended_s = time.perf_counter()
        return super().generate(*args, **kwargs)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutputWithPast:
        is_prefill = input_ids.shape[1] == PROMPT_TOKENS
        began_s, delay_s = self.ended_s, self._delay_s(is_prefill)
        logits = torch.zeros(*input_ids.shape, 16)
        time.sleep(max(0.0, began_s + delay_s - time.perf_counter()))
        self.ended_s = time.perf_counter()
        if is_prefill:
            self.prefills_s.append(self.ended_s - began_s)
        else:
            self.steps_s.append(self.ended_s - began_s)
            self.set_s.append(delay_s)
        return CausalLMOutputWithPast(logits=logits)

    def _delay_s(self, is_prefill: bool) -> float:
        self.slow_calls -= 1
        extra_s = FIRST_CALLS_EXTRA_S if self.slow_calls >= 0 else 0.0
        if is_prefill:
            self.steps = 0
            return PREFILL_S + extra_s
        self.steps += 1
        return (SLOW_STEP_S if self.steps % SLOW_EVERY == 0 else STEP_S) + extra_s


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_injected_delays_are_found_within_five_per_cent(batch_size: int) -> None:
    protocol = replace(QUICK, batch_size=batch_size, new_tokens=NEW_TOKENS, warmup_iterations=1, min_iterations=3)
    prompts = torch.ones(batch_size, PROMPT_TOKENS, dtype=torch.long)
    model = SlowModel(SlowConfig(), slow_calls=3).eval()
    times = time_generation(
        model, prompts, new_tokens=NEW_TOKENS, protocol=protocol, clock=HostClock(), warmed=WarmedShapes()
    )
    prefill, decode, per_token = summarize(times.prefill_s), summarize(times.decode_s), summarize(times.per_token_s)

    steps_s, set_s = model.steps_s[-per_token.count :], model.set_s[-per_token.count :]
    assert per_token.count == 3 * (NEW_TOKENS - 1)
    assert np.percentile(set_s, [50, 95]).tolist() == [STEP_S, SLOW_STEP_S]
    assert prefill.p50 == pytest.approx(np.median(model.prefills_s[-prefill.count :]), rel=0.05)
    assert [per_token.p50, per_token.p95] == pytest.approx(np.percentile(steps_s, [50, 95]), rel=0.05)
    throughput = batch_size * (NEW_TOKENS - 1) / decode.mean
    assert throughput == pytest.approx(batch_size / np.mean(steps_s), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_prefill_s_percentiles_are_found_within_five_per_cent(batch_size: int) -> None:
    protocol = replace(QUICK, batch_size=batch_size, new_tokens=2, warmup_iterations=2, min_iterations=40)
    prompts = torch.ones(batch_size, PROMPT_TOKENS, dtype=torch.long)
    model = SlowModel(SlowConfig(), slow_calls=3).eval()
    times = time_generation(model, prompts, new_tokens=2, protocol=protocol, clock=HostClock(), warmed=WarmedShapes())
    prefill = summarize(times.prefill_s)
    injected_s = model.prefills_s[-prefill.count :]
    assert prefill.count == 40
    assert min(injected_s) == pytest.approx(PREFILL_S, rel=0.05)
    assert [prefill.p50, prefill.p95] == pytest.approx(np.percentile(injected_s, [50, 95]), rel=0.05)


def test_a_round_has_its_share_of_iterations_and_is_not_disturbed() -> None:
    """A look takes as long as a slow step here, and is part of no time."""
    protocol = replace(QUICK, new_tokens=3, warmup_iterations=1, min_iterations=5, rounds=2)
    model, looks = SlowModel(SlowConfig(), slow_calls=0).eval(), list[int]()

    def look() -> None:
        looks.append(model.steps)
        time.sleep(SLOW_STEP_S)

    prompts = torch.ones(1, PROMPT_TOKENS, dtype=torch.long)
    times = time_generation(
        model,
        prompts,
        new_tokens=3,
        protocol=protocol,
        clock=HostClock(),
        warmed=WarmedShapes(),
        between_iterations=look,
    )
    assert len(times.prefill_s) == 3, "half of five, rounded up"
    assert looks == [2, 2, 2, 2], "after the warm-up and after each iteration, when its last step is done"
    assert min(times.prefill_s) < PREFILL_S + SLOW_STEP_S
    assert min(times.per_token_s) < STEP_S + SLOW_STEP_S


def test_a_short_warm_up_and_prefills_by_themselves_precede_one_generation() -> None:
    protocol = replace(QUICK, warmup_iterations=1, warmup_tokens=3, prefill_iterations=2, min_iterations=3, rounds=3)
    model, steps = SlowModel(SlowConfig(), slow_calls=3).eval(), list[int]()
    prompts = torch.ones(1, PROMPT_TOKENS, dtype=torch.long)
    times = time_generation(
        model, prompts, new_tokens=6, protocol=protocol, clock=HostClock(), warmed=WarmedShapes(),
        between_iterations=lambda: steps.append(model.steps),
    )  # fmt: skip
    assert [len(times.prefill_s), len(times.decode_s), len(times.per_token_s)] == [3, 1, 5]
    assert len(model.prefills_s) == 4, "the warm-up's, two by themselves, and the generation's"
    assert np.median(times.prefill_s) == pytest.approx(np.median(model.prefills_s[1:]), rel=0.05)
    assert steps == [2, 5], "after the warm-up and after the generation"
    assert sum(times.per_token_s) == pytest.approx(sum(model.steps_s[-5:]), rel=0.05)
    assert sum(model.set_s[-5:]) == pytest.approx(5 * STEP_S)


class PreparingModel(SlowModel):
    """Takes longer the first time that any such model meets a length of the cache, as where a library then prepares
    kernels for it."""

    def __init__(self, known_lengths: set[int]) -> None:
        super().__init__(SlowConfig(), slow_calls=0)
        self.known_lengths = known_lengths

    def _delay_s(self, is_prefill: bool) -> float:
        delay_s = super()._delay_s(is_prefill)
        is_new = self.steps not in self.known_lengths
        self.known_lengths.add(self.steps)
        return delay_s + is_new * SLOW_STEP_S


def _timed(model: SlowModel, warmed: WarmedShapes, *, full_first_warmup: bool) -> tuple[float, int]:
    """(the seconds that five decode steps of a round were to take, the steps of its warm-up)."""
    protocol = replace(
        QUICK, warmup_iterations=1, warmup_tokens=2, min_iterations=1, full_first_warmup=full_first_warmup
    )
    steps = list[int]()
    times = time_generation(
        model.eval(), torch.ones(1, PROMPT_TOKENS, dtype=torch.long), new_tokens=6, protocol=protocol,
        clock=HostClock(), warmed=warmed, between_iterations=lambda: steps.append(model.steps),
    )  # fmt: skip
    assert sum(times.per_token_s) == pytest.approx(sum(model.steps_s[-5:]), rel=0.05)
    return sum(model.set_s[-5:]), steps[0]


def test_what_a_length_costs_the_first_time_is_no_part_of_a_time() -> None:
    known, warmed = set[int](), WarmedShapes()
    decode_s, warmup_steps = _timed(PreparingModel(known), warmed, full_first_warmup=True)
    assert decode_s == pytest.approx(5 * STEP_S)
    assert warmup_steps == 5
    decode_s, warmup_steps = _timed(PreparingModel(known), warmed, full_first_warmup=True)
    assert decode_s == pytest.approx(5 * STEP_S), "what the first model had prepared serves the second"
    assert warmup_steps == 1


def test_a_short_warm_up_alone_leaves_that_cost_in_the_times() -> None:
    decode_s, warmup_steps = _timed(PreparingModel(set()), WarmedShapes(), full_first_warmup=False)
    assert decode_s >= 5 * STEP_S + 4 * SLOW_STEP_S
    assert warmup_steps == 1


def test_each_shape_is_warmed_up_by_itself() -> None:
    protocol, warmed = replace(QUICK, warmup_tokens=2, full_first_warmup=True), WarmedShapes()
    warmed.add((1, 8, 6))
    others = {(1, 8, 6): 2, (2, 8, 6): 6, (1, 9, 6): 6, (1, 8, 7): 7}
    assert {shape: warmed.tokens_of_warmup(protocol, shape) for shape in others} == others


def test_an_encoder_s_round_has_its_passes_too() -> None:
    model = SlowModel(SlowConfig(), slow_calls=1).eval()
    inputs = {"input_ids": torch.ones(1, PROMPT_TOKENS, dtype=torch.long)}
    protocol = replace(QUICK, warmup_iterations=1, prefill_iterations=2, min_iterations=3, rounds=3)
    assert len(time_forward(model, inputs, protocol=protocol, clock=HostClock())) == 3
    assert len(model.prefills_s) == 4


def test_what_is_timed_runs_in_torch_s_inference_mode() -> None:
    """Without it a step takes the host a tenth longer."""
    modes: set[bool] = set()
    model = SlowModel(SlowConfig(), slow_calls=0).eval()
    model.register_forward_pre_hook(lambda *_: modes.add(torch.is_inference_mode_enabled()))
    prompts = torch.ones(1, 4, dtype=torch.long)
    time_generation(model, prompts, new_tokens=2, protocol=QUICK, clock=HostClock(), warmed=WarmedShapes())
    time_forward(model, {"input_ids": prompts}, protocol=QUICK, clock=HostClock())
    assert modes == {True}


class StubbornModel(SlowModel):
    """Stops after three tokens, whatever it is asked for."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["generation_config"] = GenerationConfig(max_new_tokens=3, pad_token_id=0)
        return super().generate(*args, **kwargs)


def test_a_model_that_stops_early_is_not_timed_as_if_it_had_not() -> None:
    model = StubbornModel(SlowConfig(), slow_calls=0).eval()
    prompts = torch.ones(1, PROMPT_TOKENS, dtype=torch.long)
    with pytest.raises(BenchmarkError, match="after 3 of 4 tokens"):
        time_generation(model, prompts, new_tokens=4, protocol=QUICK, clock=HostClock(), warmed=WarmedShapes())


def test_a_forward_s_injected_delay_is_found_within_five_per_cent() -> None:
    model = SlowModel(SlowConfig(), slow_calls=1).eval()
    model.register_forward_pre_hook(lambda module, _args: setattr(module, "ended_s", time.perf_counter()))
    inputs = {"input_ids": torch.ones(1, PROMPT_TOKENS, dtype=torch.long)}
    protocol = replace(QUICK, warmup_iterations=1, min_iterations=5)
    times_s = time_forward(model, inputs, protocol=protocol, clock=HostClock())
    assert len(times_s) == 5
    assert min(model.prefills_s[-5:]) == pytest.approx(PREFILL_S, rel=0.05)
    assert summarize(times_s).p50 == pytest.approx(np.median(model.prefills_s[-5:]), rel=0.05)


def test_iterations_go_on_until_both_minima_are_reached() -> None:
    assert repeat(lambda: None, min_iterations=7, min_duration_s=0) == 7
    called_s, ended_s = [], []

    def run() -> None:
        called_s.append(time.perf_counter())
        time.sleep(0.02)
        ended_s.append(time.perf_counter())

    before_s = time.perf_counter()
    assert repeat(run, min_iterations=1, min_duration_s=0.1) == len(ended_s)
    assert time.perf_counter() - before_s >= 0.1
    assert all(end_s - called_s[0] < 0.1 for end_s in ended_s[:-1]), "no call too many"


def test_percentiles_are_numpy_s() -> None:
    sample = np.random.default_rng(0).lognormal(size=101).tolist()
    stats = summarize(sample)
    assert [stats.p50, stats.p90, stats.p95, stats.p99] == pytest.approx(np.percentile(sample, [50, 90, 95, 99]))
    assert stats.mean == pytest.approx(np.mean(sample))
    assert stats.stdev == pytest.approx(np.std(sample, ddof=1))


def test_one_value_is_its_own_percentile_and_does_not_scatter() -> None:
    assert percentile([3.0], 99) == 3.0
    assert summarize([3.0]).stdev == 0.0
