"""Run tasks of lm-evaluation-harness on the loaded model that all other figures are measured on.

The harness (github.com/EleutherAI/lm-evaluation-harness) is an optional extra and is imported only here. Tasks given by
name are code of that installed package. Tasks from files were packed by ``qbatch.scheduler.lm_eval_files`` and contain
no code.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qbatch.core.domain import Protocol, TaskRef, content_hash
from qbatch.core.errors import BenchmarkError, FetchError, UnsafeSource, WorkerLacks, one_line
from qbatch.core.measured.quality_figures import Score, TaskScores
from qbatch.core.measured.task_answers import TaskAnswers
from qbatch.scheduler.lm_eval_files import data_files, unpack
from qbatch.worker.measuring.quality.answered_questions import answered_questions, scores_of
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel, translated

_SEED = 1234
# The batch size affects the figures, since some methods look for outliers in a whole batch.
_BATCH_SIZE = 8
_BOOTSTRAP_DRAWS = 1000
# Each is a line in the job's log too.
_SAY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTasks:
    """``tasks``: the argument of lm-evaluation-harness's ``evaluate``; None, with a ``reason``, if none are run.

    ``hashes``: those of the tasks from files, by name.
    """

    tasks: Mapping[str, Any] | None = None
    hashes: Mapping[str, str]
    reason: str | None = None


def load_tasks(loaded: LoadedModel, protocol: Protocol, texts: Mapping[str, str]) -> LoadedTasks:
    """Load the protocol's tasks for ``loaded``. ``texts``: the packed tasks by their sha256.

    Called before anything is timed, so that errors are reported early and every row includes the harness's memory.
    Raises WorkerLacks if the harness is not installed or does not know a task, UnsafeSource if a task would run code
    from the hub, FetchError if the hub cannot be reached, and BenchmarkError if a task cannot be loaded.
    """
    if not protocol.tasks:
        return LoadedTasks(hashes={})
    if importlib.util.find_spec("lm_eval") is None:
        raise WorkerLacks("--tasks needs lm-evaluation-harness on the worker: pip install 'qbatch[eval]'")
    hashes = {ref.name: ref.sha256 for ref in protocol.tasks if ref.sha256 is not None}
    if loaded.kind not in (ModelKind.CAUSAL_LM, ModelKind.SEQ2SEQ) or loaded.tokenizer is None:
        return LoadedTasks(hashes=hashes, reason="tasks need a model that generates text and has a tokenizer")
    with _quiet_single_process(), tempfile.TemporaryDirectory() as folder:
        specs = [_spec(ref, texts, Path(folder)) for ref in protocol.tasks]
        manager = _manager(with_registry=len(hashes) < len(protocol.tasks))
        for spec in specs:
            _check(spec, manager.task_index)
        with _translated("cannot load the tasks"):
            tasks = manager.load(specs)
    for task in tasks["tasks"].values():
        # As the harness's own command does: a 0 in a task's configuration is not overridden.
        if protocol.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=protocol.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return LoadedTasks(tasks=tasks, hashes=hashes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRun:
    """``scores``: by task or group (see ``docs/measurements.md``). ``answers``: to each of their questions."""

    scores: Mapping[str, TaskScores]
    answers: Mapping[str, TaskAnswers]


def run_tasks(
    loaded_tasks: LoadedTasks,
    loaded: LoadedModel,
    protocol: Protocol,
    on_step: Callable[[str], None] = lambda step: None,  # noqa: ARG005
) -> TaskRun | None:
    """Run the tasks. None if there are none to run.

    ``on_step`` is told from time to time how many batches have run; how many there will be, the harness does not say.
    Deterministic: seeds and batch size are fixed, log-probabilities are in float32. Raises BenchmarkError,
    UnsafeSource.
    """
    if loaded_tasks.tasks is None:
        return None
    from lm_eval.evaluator import evaluate

    with _quiet_single_process(), _default_generation(loaded), _translated("cannot run the tasks"):
        _seed()
        for task in loaded_tasks.tasks["tasks"].values():
            task.set_fewshot_seed(seed=_SEED)
        evaluation = evaluate(
            lm=_counting(_language_model(loaded), on_step),
            task_dict=loaded_tasks.tasks,
            limit=protocol.task_limit,
            bootstrap_iters=_BOOTSTRAP_DRAWS,
            log_samples=True,
        )
    return TaskRun(
        scores={name: _task_scores(name, evaluation, loaded_tasks.hashes) for name in evaluation["results"]},
        answers=answered_questions(evaluation),
    )


def _spec(ref: TaskRef, texts: Mapping[str, str], folder: Path) -> str | dict[str, Any]:
    """The argument for the harness's manager: a name, or a configuration whose data files are written to ``folder``."""
    if ref.sha256 is None:
        return ref.name
    packed = unpack(texts[ref.sha256])
    config = copy.deepcopy(dict(packed.config))
    if not packed.files:
        return config
    home = folder / ref.sha256
    home.mkdir()
    # The names of the files are ours: names from the task's text could lead out of the folder.
    paths = {name: home / str(number) for number, name in enumerate(packed.files)}
    for name, path in paths.items():
        path.write_text(packed.files[name], encoding="utf-8")
    config["dataset_kwargs"] |= {
        "data_files": {split: [str(paths[name]) for name in names] for split, names in data_files(config).items()},
        "cache_dir": str(home / "cache"),
        # The folder is deleted before the tasks run.
        "keep_in_memory": True,
    }
    return config


@functools.cache
def _manager(*, with_registry: bool) -> Any:
    """The harness's manager, one per process. Its registry of 14,000 tasks, needed for tasks by name, takes 10 s."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils
    from lm_eval.tasks import TaskManager

    # Without a sandbox, a template can call any Python function, and templates of files are not trusted.
    sandbox = SandboxedEnvironment(loader=utils.env.loader, undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= utils.env.filters
    utils.env = sandbox
    return TaskManager(include_defaults=with_registry)


def _check(spec: str | dict[str, Any], index: Mapping[str, Any]) -> None:
    """Raise WorkerLacks for a name not in ``index``, UnsafeSource for a task that would run code from the hub."""
    if isinstance(spec, str) and spec not in index:
        raise WorkerLacks(f"lm-evaluation-harness {version('lm_eval')} has no task {spec!r}")
    name = spec if isinstance(spec, str) else spec["task"]
    for config in _configs([spec], index) if isinstance(spec, str) else [spec]:
        reason = _unsafe(config)
        if reason is not None:
            raise UnsafeSource(f"task {name!r} {reason}")


def _configs(members: Sequence[Any], index: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the configurations of ``members`` (names, or mappings of overrides), including the tasks of groups."""
    for member in members:
        own = member if isinstance(member, Mapping) else {"task": member}
        yield own
        below, name = own.get("task"), own.get("group") or own.get("task")
        entry = index.get(name) if isinstance(name, str) else None
        if entry is not None and entry.kind.name == "TAG":
            below = sorted(entry.tags)
        elif entry is not None:
            yield entry.cfg
            below = entry.cfg.get("task")
        if isinstance(below, list):
            yield from _configs(below, index)


def _unsafe(config: Mapping[str, Any]) -> str | None:
    if config.get("unsafe_code"):
        return "runs code that the model writes"
    if (config.get("dataset_kwargs") or {}).get("trust_remote_code"):
        return "uses a data set that comes with code"
    for metric in config.get("metric_list") or []:
        if metric.get("hf_evaluate") or not (config.get("process_results") or _is_known(metric["metric"])):
            return f"uses the metric {metric['metric']!r}, which is not part of the harness but a script from the hub"
    return None


def _is_known(metric: str) -> bool:
    """Whether it is a metric of the harness's registry, or a function of an installed task (named by its path)."""
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    return metric in metric_registry or metric.startswith("/")


def _language_model(loaded: LoadedModel) -> Any:
    """The harness's wrapper of ``loaded``, whose model and tokenizer stay unchanged."""
    from lm_eval.models.huggingface import HFLM

    model = loaded.model
    # HFLM would tie the head to the embedding if the config says so, even if the checkpoint has both.
    model.tie_weights = _do_nothing
    try:
        return HFLM(
            pretrained=model,
            # A copy, because HFLM adds a padding token.
            tokenizer=copy.deepcopy(loaded.tokenizer),
            backend="seq2seq" if loaded.kind is ModelKind.SEQ2SEQ else "causal",
            batch_size=_BATCH_SIZE,
            softmax_dtype="float32",
        )
    finally:
        del model.tie_weights


def _counting(model: Any, on_step: Callable[[str], None]) -> Any:
    """The harness's ``model``, which tells ``on_step`` of its batches."""
    batches = _Batches(on_step)
    for name in ("_model_call", "_model_generate"):
        setattr(model, name, batches.counted(getattr(model, name)))
    return model


class _Batches:
    def __init__(self, on_step: Callable[[str], None]) -> None:
        self._on_step = on_step
        self._count = 0
        self._say_at = time.monotonic() + _SAY_S

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counting(*args: Any, **options: Any) -> Any:
            self._count += 1
            if time.monotonic() >= self._say_at:
                self._say_at = time.monotonic() + _SAY_S
                self._on_step(f"tasks, batch {self._count}")
            return call(*args, **options)

        return counting


def _do_nothing() -> None:
    return None


def _task_scores(name: str, evaluation: Mapping[str, Any], hashes: Mapping[str, str]) -> TaskScores:
    results, config = evaluation["results"][name], evaluation["configs"].get(name)
    scores = {
        score.label: Score(
            value=_number(score.value), error=_number(results.get(f"{score.metric}_stderr,{score.answer_filter}"))
        )
        for score in scores_of(results)
    }
    return TaskScores.of(
        scores,
        n_samples=results.get("sample_len"),
        num_fewshot=evaluation["n-shot"].get(name),
        version=_version(evaluation["versions"].get(name)),
        higher_is_better=evaluation["higher_is_better"].get(name),
        config_hash=hashes.get(name) or (None if config is None else _config_hash(config)),
        samples_hash=_samples_hash(evaluation["samples"].get(name, ())),
    )


def _number(value: Any) -> float | None:
    return None if value is None or value == "N/A" else float(value)


def _version(value: Any) -> str | None:
    # The harness uses "Yaml" for a task that states no version.
    return None if value in (None, "Yaml") else str(value)


def _config_hash(config: Mapping[str, Any]) -> str:
    """The hash of a configuration, including the source of its functions."""
    own = {key: value for key, value in config.items() if key != "metadata"}
    return content_hash(json.loads(json.dumps(own, default=_source)))


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):  # not a function, or one without a source file
        return str(getattr(value, "__qualname__", type(value).__qualname__))


def _samples_hash(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """The hash of the questions as asked. Equal hashes mean equal questions, even if the hub has changed since."""
    asked = [[sample[key] for key in ("doc_hash", "prompt_hash", "target_hash")] for sample in samples]
    return content_hash({"asked": asked}) if asked else None


@contextlib.contextmanager
def _translated(doing: str) -> Iterator[None]:
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from jinja2.exceptions import SecurityError

    with translated(BenchmarkError, doing):
        try:
            yield
        except SecurityError as error:
            raise UnsafeSource(f"a template of a task accesses more than its data: {error}") from error
        except ConnectionError as error:
            if HF_HUB_OFFLINE:
                raise
            raise FetchError(f"{doing}: {one_line(error)}") from error


@contextlib.contextmanager
def _quiet_single_process() -> Iterator[None]:
    """Keep the harness's output out of the job's log, and keep it from starting processes.

    Its bootstrap would start some, but a runner must not have child processes.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def _default_generation(loaded: LoadedModel) -> Iterator[None]:
    """Let the task decide how to generate, not the checkpoint's own sampling and penalties."""
    from transformers import GenerationConfig

    before = loaded.model.generation_config
    loaded.model.generation_config = GenerationConfig(
        bos_token_id=before.bos_token_id,
        eos_token_id=before.eos_token_id,
        pad_token_id=before.pad_token_id,
        decoder_start_token_id=before.decoder_start_token_id,
    )
    try:
        yield
    finally:
        loaded.model.generation_config = before


def _seed() -> None:
    import numpy
    import torch

    random.seed(_SEED)
    numpy.random.seed(_SEED)
    torch.manual_seed(_SEED)
