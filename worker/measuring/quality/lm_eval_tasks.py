"""Tasks of lm-evaluation-harness, asked of the model as it was loaded for every other figure.

The harness (github.com/EleutherAI/lm-evaluation-harness) is an optional extra and is imported here alone. Its tasks by
name are code of an installed package; those of a file were packed by ``qbatch.scheduler.lm_eval_files`` and hold none.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qbatch.core.domain import Protocol, TaskRef, content_hash
from qbatch.core.errors import BenchmarkError, FetchError, UnsafeSource, Unsupported, one_line
from qbatch.core.measured.quality_figures import Score, TaskScores
from qbatch.scheduler.lm_eval_files import data_files, unpack
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel, translated

_SEED = 1234
# Part of what the numbers mean: a method may look at a whole batch at once.
_BATCH_SIZE = 8
_BOOTSTRAP_DRAWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTasks:
    """``tasks`` is what lm-evaluation-harness's ``evaluate`` takes; None with the ``reason`` why none are run.
    ``hashes`` are those of the tasks that came from files."""

    tasks: Mapping[str, Any] | None = None
    hashes: Mapping[str, str]
    reason: str | None = None


def load_tasks(loaded: LoadedModel, protocol: Protocol, texts: Mapping[str, str]) -> LoadedTasks:
    """The protocol's tasks, ready to be asked of ``loaded``; ``texts`` are the packed ones by their sha256.

    Called before anything is timed: what cannot run is said at once, and the harness's memory is in every row alike.
    Raises Unsupported without the harness or for a name that it does not know, UnsafeSource for a task that would
    run code of the hub, FetchError where the hub does not answer, BenchmarkError where a task cannot be loaded.
    """
    if not protocol.tasks:
        return LoadedTasks(hashes={})
    if importlib.util.find_spec("lm_eval") is None:
        raise Unsupported("--tasks needs lm-evaluation-harness on the worker: pip install 'qbatch[eval]'")
    hashes = {ref.name: ref.sha256 for ref in protocol.tasks if ref.sha256 is not None}
    if loaded.task not in (ModelKind.CAUSAL_LM, ModelKind.SEQ2SEQ) or loaded.tokenizer is None:
        return LoadedTasks(hashes=hashes, reason="tasks are asked of models that continue a text, with their tokenizer")
    with _undisturbed(), tempfile.TemporaryDirectory() as folder:
        specs = [_spec(ref, texts, Path(folder)) for ref in protocol.tasks]
        manager = _manager(with_registry=len(hashes) < len(protocol.tasks))
        for spec in specs:
            _check(spec, manager.task_index)
        with _translated("cannot load the tasks"):
            tasks = manager.load(specs)
    for task in tasks["tasks"].values():
        # As the harness's own command does it: 0 in a task's own configuration stands.
        if protocol.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=protocol.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    return LoadedTasks(tasks=tasks, hashes=hashes)


def run_tasks(loaded_tasks: LoadedTasks, loaded: LoadedModel, protocol: Protocol) -> dict[str, TaskScores] | None:
    """Task or group → its figures (``docs/measurements.md`` says which); None where there are none to run.

    Deterministic: seeds and batch size are fixed, log-probabilities are float32. Raises BenchmarkError, UnsafeSource.
    """
    if loaded_tasks.tasks is None:
        return None
    from lm_eval.evaluator import evaluate

    with _undisturbed(), _own_defaults_aside(loaded), _translated("cannot run the tasks"):
        _seed()
        found = evaluate(
            lm=_language_model(loaded),
            task_dict=loaded_tasks.tasks,
            limit=protocol.task_limit,
            bootstrap_iters=_BOOTSTRAP_DRAWS,
            log_samples=True,
        )
    return {name: _figures(name, found, loaded_tasks.hashes) for name in found["results"]}


def _spec(ref: TaskRef, texts: Mapping[str, str], folder: Path) -> str | dict[str, Any]:
    """What the harness's manager loads: a name, or a configuration whose data are files in ``folder``."""
    if ref.sha256 is None:
        return ref.name
    packed = unpack(texts[ref.sha256])
    config = copy.deepcopy(dict(packed.config))
    if not packed.files:
        return config
    home = folder / ref.sha256
    home.mkdir()
    # Named by us: what the text calls its files leads nowhere.
    paths = {name: home / str(number) for number, name in enumerate(packed.files)}
    for name, path in paths.items():
        path.write_text(packed.files[name], encoding="utf-8")
    config["dataset_kwargs"] |= {
        "data_files": {split: [str(paths[name]) for name in names] for split, names in data_files(config).items()},
        "cache_dir": str(home / "cache"),
        # The folder is gone when the questions are asked.
        "keep_in_memory": True,
    }
    return config


@functools.cache
def _manager(*, with_registry: bool) -> Any:
    """The harness's manager. Its registry of 14,000 tasks takes 10 s to read: once a process, and only for a name."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils
    from lm_eval.tasks import TaskManager

    # A template can reach any function of Python otherwise, and a file's templates are its author's.
    sandbox = SandboxedEnvironment(loader=utils.env.loader, undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= utils.env.filters
    utils.env = sandbox
    return TaskManager(include_defaults=with_registry)


def _check(spec: str | dict[str, Any], index: Mapping[str, Any]) -> None:
    """Raises Unsupported for a name that is not in ``index``, UnsafeSource for what would run code of the hub."""
    if isinstance(spec, str) and spec not in index:
        raise Unsupported(f"lm-evaluation-harness {version('lm_eval')} has no task {spec!r}")
    name = spec if isinstance(spec, str) else spec["task"]
    for config in _configs([spec], index) if isinstance(spec, str) else [spec]:
        reason = _unsafe(config)
        if reason is not None:
            raise UnsafeSource(f"task {name!r} {reason}")


def _configs(members: Sequence[Any], index: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configurations of ``members`` (names, or mappings with what they override), down to the tasks of groups."""
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
        return "runs what the model writes"
    if (config.get("dataset_kwargs") or {}).get("trust_remote_code"):
        return "has a data set that comes with code"
    for metric in config.get("metric_list") or []:
        if metric.get("hf_evaluate") or not (config.get("process_results") or _is_known(metric["metric"])):
            return f"has the metric {metric['metric']!r}, which is not the harness's own: a script of the hub"
    return None


def _is_known(metric: str) -> bool:
    """A metric of the harness's registry, or a function of an installed task, which the index names by its path."""
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    return metric in metric_registry or metric.startswith("/")


def _language_model(loaded: LoadedModel) -> Any:
    """The harness's view of ``loaded``, which stays as it is."""
    from lm_eval.models.huggingface import HFLM

    model = loaded.model
    # It ties the head to the embedding wherever the config says so, also where the checkpoint has two.
    model.tie_weights = _nothing
    try:
        return HFLM(
            pretrained=model,
            # It gives the tokenizer a padding token.
            tokenizer=copy.deepcopy(loaded.tokenizer),
            backend="seq2seq" if loaded.task is ModelKind.SEQ2SEQ else "causal",
            batch_size=_BATCH_SIZE,
            softmax_dtype="float32",
        )
    finally:
        del model.tie_weights


def _nothing() -> None:
    return None


def _figures(name: str, found: Mapping[str, Any], hashes: Mapping[str, str]) -> TaskScores:
    results, config = found["results"][name], found["configs"].get(name)
    scores: dict[str, Score] = {}
    for key, value in results.items():
        metric, comma, how = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            # "none" is the harness's word for answers taken as they are.
            label = metric if how == "none" else key
            scores[label] = Score(value=_number(value), error=_number(results.get(f"{metric}_stderr,{how}")))
    return TaskScores.of(
        scores,
        n_samples=results.get("sample_len"),
        num_fewshot=found["n-shot"].get(name),
        version=_version(found["versions"].get(name)),
        higher_is_better=found["higher_is_better"].get(name),
        config_hash=hashes.get(name) or (None if config is None else _config_hash(config)),
        samples_hash=_samples_hash(found["samples"].get(name, ())),
    )


def _number(value: Any) -> float | None:
    return None if value is None or value == "N/A" else float(value)


def _version(value: Any) -> str | None:
    # "Yaml" is the harness's word for a task that states none.
    return None if value in (None, "Yaml") else str(value)


def _config_hash(config: Mapping[str, Any]) -> str:
    """Of a configuration with its functions' source."""
    own = {key: value for key, value in config.items() if key != "metadata"}
    return content_hash(json.loads(json.dumps(own, default=_source)))


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):  # no function, or one without a file
        return str(getattr(value, "__qualname__", type(value).__qualname__))


def _samples_hash(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """Of what was asked: two rows with the same one answered the same questions, whatever the hub holds today."""
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
            raise UnsafeSource(f"a task's template reaches for more than its data: {error}") from error
        except ConnectionError as error:
            if HF_HUB_OFFLINE:
                raise
            raise FetchError(f"{doing}: {one_line(error)}") from error


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """The harness's progress and remarks kept out of the job's log, and its processes out of the runner.

    A runner may have no children of its own; the bootstrap would start some.
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
def _own_defaults_aside(loaded: LoadedModel) -> Iterator[None]:
    """A task's own words decide how is generated, not the checkpoint's sampling and penalties."""
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
