"""How long a search or a training will take of which none has run yet: by the passes through the model that it makes,
and by how long a prefill took, which is a pass over a text too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qbatch.core.job_duration import Basis, JobWork, PastRun, TimeEstimate, estimate_at, known_parameters
from qbatch.core.recovery import STEP_WINDOWS, TEXT_WINDOW, Recovery
from qbatch.core.search.search_protocol import SearchProtocol

# What finding the mixtures takes for each group: half a pass to measure one, and a part of a backward pass.
_FRONTIER_PASSES = 1.5
# The model that teaches, the one that learns, and its backward pass, which takes as long as two.
_TRAINING_PASSES = 4.0


def search_tokens(protocol: SearchProtocol, groups: int) -> float:
    """How many tokens a search in a model of so many groups of layers reads, each as often as it is read."""
    passes = protocol.passes_allowed(groups) + _FRONTIER_PASSES * groups
    return passes * protocol.windows * protocol.window


def training_tokens(recovery: Recovery) -> float:
    """How many tokens the training of an adapter reads, each as often as it is read; 0 for one that is not trained."""
    return (recovery.steps or 0) * STEP_WINDOWS * (recovery.window or TEXT_WINDOW) * _TRAINING_PASSES


def estimate_passes(work: JobWork, tokens: float, runs: Sequence[PastRun]) -> TimeEstimate | None:
    """The seconds that passes over so many tokens will take on a device of the kind of ``work``. None if no prefill of
    a baseline was timed there. Prefills of short prompts take longer for each token than the windows of a text."""
    parameters = known_parameters(work, runs)
    timed = [
        replace(run, seconds=run.token_s)
        for run in runs
        if run.token_s is not None and run.work.device_kind is work.device_kind and run.work.parameters
    ]
    rate = None if parameters is None else estimate_at(parameters, timed, Basis.PREFILLS)
    return None if rate is None else replace(rate, seconds=rate.seconds * tokens)
