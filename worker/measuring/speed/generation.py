"""Time text generation, or forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from qbatch.core.domain import Protocol
from qbatch.core.errors import BenchmarkError
from qbatch.worker.measuring.speed.device_clock import Clock, repeat

_NOTHING = nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationTimes:
    """Times in seconds, an entry for each iteration, in ``per_token_s`` for each decode step of all iterations.

    ``prefill_s``: from the call of ``generate`` until the first token's logits are computed. ``decode_s``: from then
    until the last token's.
    """

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    per_token_s: list[float] = field(default_factory=list)


class WarmedShapes:
    """The shapes (batch, prompt tokens, new tokens) at which this process has generated before.

    On an H200 the first generation of a process lost 3 s, whatever the model's size: more than its 63 steps took.
    cuDNN's attention builds a plan for each length of the cache when a thread of a process first meets it.
    """

    def __init__(self) -> None:
        self._shapes: set[tuple[int, int, int]] = set()

    def tokens_of_warmup(self, protocol: Protocol, shape: tuple[int, int, int]) -> int:
        """How many tokens the next warm-up at ``shape`` generates."""
        new_tokens = shape[-1]
        if protocol.full_first_warmup and shape not in self._shapes:
            return new_tokens
        return min(new_tokens, protocol.warmup_tokens or new_tokens)

    def add(self, shape: tuple[int, int, int]) -> None:
        self._shapes.add(shape)


class _TokenMarks:
    """A logits processor that changes nothing and marks the moment at which each token's logits are computed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.marks = [clock.mark()]

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.marks.append(self._clock.mark())
        return scores


def time_generation(
    model: Any,
    prompts: torch.Tensor,
    *,
    new_tokens: int,
    protocol: Protocol,
    clock: Clock,
    warmed: WarmedShapes,
    during_warmup: AbstractContextManager[object] = _NOTHING,
    between_iterations: Callable[[], None] = lambda: None,
) -> GenerationTimes:
    """Time one round of greedy generation of exactly ``new_tokens`` tokens for ``prompts`` [batch, length].

    ``generate`` itself is timed, since it is what users run. For an encoder-decoder, the prefill is the encoder and the
    first token. For the number of iterations see ``Protocol``. ``warmed``: the shapes at which this process has
    generated; this one is added. ``during_warmup``: a context that is entered for the warm-up. ``between_iterations``
    is called before, between and after the timed iterations. Raises BenchmarkError if the model stops early.
    """
    times = GenerationTimes()

    def generated() -> None:
        steps_s = _steps_s(model, prompts, new_tokens, clock)
        times.prefill_s.append(steps_s[0])
        times.decode_s.append(sum(steps_s[1:]))
        times.per_token_s.extend(steps_s[1:])

    shape = (*prompts.shape, new_tokens)
    warmup_tokens = warmed.tokens_of_warmup(protocol, shape)
    with torch.inference_mode():
        _warm_up(lambda: _steps_s(model, prompts, warmup_tokens, clock), protocol, during_warmup)
        warmed.add(shape)
        between_iterations()
        for _ in range(protocol.prefill_iterations):
            times.prefill_s.extend(_steps_s(model, prompts, 1, clock))
        _repeat_timed(generated, protocol, between_iterations)
    return times


def _steps_s(model: Any, prompts: torch.Tensor, new_tokens: int, clock: Clock) -> list[float]:
    """Generate once. Returns the seconds until each token's logits."""
    from transformers import LogitsProcessorList

    clock.synchronize()
    with greedy(model, new_tokens):
        marks = _TokenMarks(clock)
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            logits_processor=LogitsProcessorList([marks]),
            generation_config=model.generation_config,
        )
    if len(marks.marks) <= new_tokens:
        raise BenchmarkError(f"generation stopped after {len(marks.marks) - 1} of {new_tokens} tokens")
    return clock.intervals_s(marks.marks[: new_tokens + 1])


def time_forward(
    model: Any,
    inputs: dict[str, torch.Tensor],
    *,
    protocol: Protocol,
    clock: Clock,
    during_warmup: AbstractContextManager[object] = _NOTHING,
    between_iterations: Callable[[], None] = lambda: None,
) -> list[float]:
    """Seconds of each forward pass over ``inputs`` in one round. Other arguments as for ``time_generation``."""
    times_s: list[float] = []

    def forward() -> list[float]:
        clock.synchronize()
        before = clock.mark()
        model(**inputs)
        return clock.intervals_s([before, clock.mark()])

    with torch.inference_mode():
        _warm_up(forward, protocol, during_warmup)
        between_iterations()
        for _ in range(protocol.prefill_iterations):
            times_s += forward()
        _repeat_timed(lambda: times_s.extend(forward()), protocol, between_iterations)
    return times_s


def _warm_up(once: Callable[[], object], protocol: Protocol, during_warmup: AbstractContextManager[object]) -> None:
    with during_warmup:
        for _ in range(protocol.warmup_iterations):
            once()


def _repeat_timed(once: Callable[[], None], protocol: Protocol, between_iterations: Callable[[], None]) -> None:
    """Repeat for one round. It never ends because times agree: that would choose a small spread."""

    def timed() -> None:
        once()
        between_iterations()

    repeat(
        timed,
        min_iterations=math.ceil(protocol.min_iterations / protocol.rounds),
        min_duration_s=protocol.min_duration_s / protocol.rounds,
    )


@contextmanager
def greedy(model: Any, new_tokens: int) -> Iterator[None]:
    """Replace the model's generation defaults (sampling, beams, penalties, an end token) by plain greedy decoding.

    Without an end token, every sequence has ``new_tokens`` tokens. The defaults are replaced rather than overridden,
    since ``generate`` fills every unset option from them.
    """
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=0,
        bos_token_id=before.bos_token_id,
        decoder_start_token_id=before.decoder_start_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = before
