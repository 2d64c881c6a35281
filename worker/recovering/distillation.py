"""Train an adapter such that the 4-bit model gives the outputs of its base: QLoRA, with the base as the teacher.

The factors begin as those that are weighted by what the layers read, so few steps are needed. What is minimised is the
mean KL divergence from the base to the model, at every token of windows of the text, in an order that the seed decides.
The optimizer is bitsandbytes' paged AdamW with a state of 8 bits; on a CPU there is no paged memory, and it keeps the
same state in the host's. After a kill the training goes on at the last step that was kept, with the same result.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qbatch.core.errors import BenchmarkError, Unsupported
from qbatch.core.measured.checkpoint_audit import AdapterTraining
from qbatch.core.recovery import STEP_WINDOWS
from qbatch.worker.files.training_state import KeptState, TrainingState
from qbatch.worker.measuring.tokens import text_ids
from qbatch.worker.models.adapted_model import adapter_parameters, with_adapter
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel, load
from qbatch.worker.recovering.adapter_files import as_stored, write_adapter
from qbatch.worker.recovering.low_rank_factors import LowRankFactors
from qbatch.worker.recovering.svd_recovery import RecoveryWork, recover_by_factors

# The rate falls linearly to zero.
_RATE = 1e-4
_LARGEST_NORM = 1.0
_KEPT_EVERY_S = 30.0
_MOST_TOKENS = 10_000_000


def recover_by_training(
    work: RecoveryWork,
    folder: Path,
    kept: KeptState,
    report: Callable[[str], None],
    *,
    kept_every_s: float = _KEPT_EVERY_S,
) -> dict[str, Any]:
    """Write the trained adapter to the existing ``folder``, and return what its manifest says of it. ``kept`` is where
    the training is kept while it lasts. Raises JobErrors as ``load`` does, Unsupported for a model that does not
    continue a text, and OSError."""
    state = kept.read()
    if state is None:
        recover_by_factors(work, folder, report)
    teacher = load(work.source, dtype=work.dtype, device=work.device, trusted=work.trusted)
    student = work.load()
    if student.kind is not ModelKind.CAUSAL_LM:
        raise Unsupported(
            f"{work.recovery.kind} trains models that continue a text, which {type(student.model).__name__} does not"
        )
    if state is not None:
        report(f"recovering, going on after step {state.steps}")
        _write(work, folder, student, state.factors)
    trained = _Training(work, teacher, student, with_adapter(student.model, folder, is_trainable=True))
    if state is not None:
        trained.go_on(state)
    begun, last_s = trained.steps, time.monotonic()
    while trained.steps < trained.wanted:
        loss = trained.step()
        if not math.isfinite(loss):
            raise BenchmarkError(f"the training of the adapter diverged at step {trained.steps}")
        if trained.steps == begun + 1 or trained.steps % max(1, trained.wanted // 20) == 0:
            report(f"recovering, step {trained.steps} of {trained.wanted}, KL {loss:.2e}")
        if time.monotonic() - last_s >= kept_every_s:
            kept.write(trained.state())
            last_s = time.monotonic()
    # What was left before the training says nothing of what is left after it.
    return {
        "recovered_layers": _write(work, folder, student, trained.factors),
        "training": AdapterTraining(
            steps=trained.wanted,
            resumed_after_step=begun or None,
            optimizer=trained.optimizer_name,
            first_kl=trained.first_loss,
            last_kl=trained.last_loss,
        ).to_json(),
    }


class _Training:
    """An adapter that is being trained: ``steps`` are done of those ``wanted``."""

    def __init__(self, work: RecoveryWork, teacher: LoadedModel, student: LoadedModel, model: Any) -> None:
        self._work = work
        self._teacher, self._model = teacher.model, model
        self._windows = _windows(student, work.text or "", work.recovery.window or 1)
        self._parameters = adapter_parameters(model)
        self._optimizer, self.optimizer_name = _optimizer([*self._parameters.values()], work.device)
        self.wanted = work.recovery.steps or 0
        self.steps = 0
        self.first_loss: float | None = None
        self.last_loss: float | None = None

    def step(self) -> float:
        """The mean KL of the step's windows, before it."""
        for group in self._optimizer.param_groups:
            group["lr"] = _RATE * (1 - self.steps / self.wanted)
        windows = self._chosen()
        loss = sum(self._backward(window, 1 / len(windows)) for window in windows)
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), _LARGEST_NORM)
        with warnings.catch_warnings():
            # The manifest says which optimizer it was.
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss
        return loss

    def _chosen(self) -> Sequence[torch.Tensor]:
        """The windows of the next step. They depend on its number alone, so that a training can go on."""
        # Not for secrets.
        order = random.Random(f"{self._work.recovery.seed} {self.steps}")  # noqa: S311
        return order.sample(self._windows, min(STEP_WINDOWS, len(self._windows)))

    def _backward(self, window: torch.Tensor, share: float) -> float:
        """Add the gradient of the window's mean KL, times ``share``, and return that product."""
        ids = window[None].to(self._work.device)
        with torch.no_grad():
            expected = self._teacher(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        found = self._model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        loss = torch.nn.functional.kl_div(found, expected, reduction="batchmean", log_target=True) * share
        torch.autograd.backward(loss)
        return float(loss.detach())

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        """A copy, by the names that they have in an adapter's file."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}

    def state(self) -> TrainingState:
        return TrainingState(
            steps=self.steps,
            first_kl=self.first_loss,
            last_kl=self.last_loss,
            factors=self.factors,
            optimizer=self._optimizer.state_dict(),
        )

    @torch.no_grad()
    def go_on(self, state: TrainingState) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(state.factors[name])
        self._optimizer.load_state_dict(state.optimizer)
        self.steps, self.first_loss, self.last_loss = state.steps, state.first_kl, state.last_kl


def _write(work: RecoveryWork, folder: Path, student: LoadedModel, factors: Mapping[str, torch.Tensor]) -> int:
    """Write the adapter with ``factors``, which have the names of its file. Returns the number of layers."""
    dtype = getattr(torch, work.dtype.value)
    layers = sorted({name.rpartition(".lora_")[0] for name in factors})
    by_layer = {
        layer.removeprefix("base_model.model."): as_stored(
            LowRankFactors(up=factors[f"{layer}.lora_B.weight"], down=factors[f"{layer}.lora_A.weight"]), dtype
        )
        for layer in layers
    }
    write_adapter(
        folder, by_layer, model=student.model, kind=student.kind, base=work.base.name, rank=work.recovery.rank
    )
    return len(by_layer)


def _windows(loaded: LoadedModel, text: str, window: int) -> list[torch.Tensor]:
    ids = text_ids(loaded, text, _MOST_TOKENS)
    whole = len(ids) // window
    if not whole:
        raise Unsupported(f"the recovery text has {len(ids)} tokens, and a window of the training has {window}")
    return [torch.tensor(ids[number * window : (number + 1) * window]) for number in range(whole)]


def _optimizer(parameters: Sequence[Any], device: str) -> tuple[Any, str]:
    """bitsandbytes' paged AdamW with a state of 8 bits, and what it is on this device."""
    import bitsandbytes as bnb

    optimizer = bnb.optim.PagedAdamW8bit(parameters, lr=_RATE, weight_decay=0.0)
    paged = device.startswith("cuda")
    return optimizer, "PagedAdamW8bit" if paged else "PagedAdamW8bit, not paged: a CPU has no such memory"
