"""Tasks of lm-evaluation-harness as a user names them: names of its registry, and YAML files with what they refer to.

A file is packed into one text that any worker can run: its includes merged, the data that it names beside it. It may
hold no code: of the harness's own keys, those that take a function, a module or a script are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from qbatch.core.byte_units import MIB
from qbatch.core.domain import TaskRef
from qbatch.core.errors import UnsafeSource, UsageError

MAX_BYTES = 16 * MIB

_NAME = re.compile(r"[\w.+()-]+")
_HUB_DATASET = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SUFFIXES = (".yaml", ".yml")

_KEYS = frozenset({
    "task", "task_alias", "tag", "dataset_path", "dataset_name", "dataset_kwargs", "training_split",
    "validation_split", "test_split", "fewshot_split", "fewshot_config", "num_fewshot", "doc_to_text",
    "doc_to_target", "doc_to_choice", "description", "target_delimiter", "fewshot_delimiter", "gen_prefix",
    "output_type", "generation_kwargs", "repeats", "filter_list", "metric_list", "unsafe_code",
    "should_decontaminate", "doc_to_decontamination_query", "metadata",
})  # fmt: skip
_FEWSHOT_KEYS = frozenset({
    "sampler", "split", "fewshot_indices", "samples", "doc_to_text", "doc_to_choice", "doc_to_target", "gen_prefix",
    "fewshot_delimiter", "target_delimiter",
})  # fmt: skip
# ``generate`` takes whatever else is given, a repository with its own code among it.
_GENERATION_KEYS = frozenset({
    "until", "do_sample", "temperature", "top_k", "top_p", "min_p", "num_beams", "repetition_penalty",
    "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens",
})  # fmt: skip
# Readers of plain text, with what may be said to them; others of ``datasets`` read pickles.
_READERS = {
    "json": frozenset({"data_files", "field"}),
    "csv": frozenset({"data_files", "delimiter", "column_names"}),
    "text": frozenset({"data_files"}),
}
_HUB_KEYS = frozenset({"revision"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFiles:
    """What ``--tasks`` named. ``texts`` are the packed files by their sha256."""

    refs: tuple[TaskRef, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTask:
    """A task's configuration, whose ``data_files`` are names in ``files``: name → content."""

    config: Mapping[str, Any]
    files: Mapping[str, str]


def read_tasks(items: Sequence[str]) -> TaskFiles:
    """The tasks of ``items``: names, and paths of YAML files.

    Raises UsageError for a file that cannot be read, that could run code, or that has the name of another task, and
    where the files and their data are over MAX_BYTES together. A name is looked up where the task runs.
    """
    refs: list[TaskRef] = []
    texts: dict[str, str] = {}
    for item in dict.fromkeys(items):
        if not _is_path(item):
            if not _NAME.fullmatch(item):
                raise UsageError(f"{item!r} is neither a task's name nor the path of a .yaml file")
            refs.append(TaskRef(name=item))
            continue
        name, text = _pack(Path(item), room=MAX_BYTES - sum(map(len, texts.values())))
        digest = sha256(text.encode()).hexdigest()
        refs.append(TaskRef(name=name, sha256=digest))
        texts[digest] = text
    names = [ref.name for ref in refs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two tasks are called {name!r}")
    return TaskFiles(refs=tuple(refs), texts=texts)


def unpack(text: str) -> PackedTask:
    """What ``read_tasks`` packed. Raises UnsafeSource for a text that it would have refused."""
    packed = json.loads(text)
    task = PackedTask(config=packed["config"], files=packed["files"])
    refusal = _refusal(task.config)
    if refusal is not None:
        raise UnsafeSource(f"task {task.config.get('task')!r}: {refusal}")
    return task


def data_files(config: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
    """The files that a task reads, by split; none where its data are on the hub."""
    named = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    # A single file, or a list of them, is the training split for ``datasets``.
    by_split = named if isinstance(named, Mapping) else {"train": named}
    return {split: files if isinstance(files, list) else [files] for split, files in by_split.items()}


def _is_path(item: str) -> bool:
    return item.endswith(_SUFFIXES) or "/" in item


def _pack(path: Path, *, room: int) -> tuple[str, str]:
    """(the task's name, its text)."""
    config = _read_config(path, seen=())
    refusal = _refusal(config)
    if refusal is not None:
        raise UsageError(f"{path}: {refusal}")
    files: dict[str, str] = {}
    renamed: dict[str, list[str]] = {}
    for split, names in data_files(config).items():
        for name in names:
            key = str(len(files))
            files[key] = _read_file(path.parent / name, room)
            renamed.setdefault(split, []).append(key)
    if files:
        config["dataset_kwargs"] = config["dataset_kwargs"] | {"data_files": renamed}
    return config["task"], "".join(_encoded({"config": config, "files": files}, path, room))


def _encoded(value: Any, path: Path, room: int) -> Iterator[str]:
    # Piece by piece: a few aliases make a short YAML file that is endless in JSON. The order of keys is kept: that of
    # the answers is in it.
    size = 0
    try:
        for piece in json.JSONEncoder(separators=(",", ":")).iterencode(value):
            size += len(piece)
            if size > room:
                raise _too_large(path)
            yield piece
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}; quote what is meant as text") from error


def _too_large(path: Path) -> UsageError:
    return UsageError(f"{path}: the tasks' files and their data are over {MAX_BYTES // MIB} MiB together")


def _read_file(path: Path, room: int) -> str:
    if not path.is_file():
        raise UsageError(f"cannot read {path}: there is no such file")
    try:
        if path.stat().st_size > room:
            raise _too_large(path)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text") from error


def _read_config(path: Path, seen: Sequence[Path]) -> dict[str, Any]:
    """A YAML file with its includes merged into it; its own keys win."""
    import yaml

    if path.resolve() in seen:
        raise UsageError(f"{path} includes itself")
    try:
        config = yaml.load(_read_file(path, MAX_BYTES), Loader=_loader(path))  # noqa: S506  (derived from SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} does not describe a task")
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        merged |= _read_config(path.parent / str(include), [*seen, path.resolve()])
    return merged | config


def _loader(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Knows one tag more, to refuse it in words."""

    def refuse(_loader: Any, node: Any) -> None:
        raise UsageError(
            f"{path}: !function {node.value} is code, which a task's file may not bring; only the tasks that "
            "lm-evaluation-harness itself installs may use functions"
        )

    Loader.add_constructor("!function", refuse)
    return Loader


def _refusal(config: Mapping[str, Any]) -> str | None:
    """Why a task is not accepted from a file; None for one that is."""
    name = config.get("task")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return "a file describes one task, and names it: `task: my_task`"
    if config.get("unsafe_code"):
        return "it says of itself that it runs unsafe code"
    for where, value, known in (
        ("", config, _KEYS),
        ("fewshot_config: ", config.get("fewshot_config"), _FEWSHOT_KEYS),
        ("generation_kwargs: ", config.get("generation_kwargs"), _GENERATION_KEYS),
    ):
        if not isinstance(value or {}, Mapping):
            return f"{where}a mapping is expected"
        unknown = sorted(map(str, (value or {}).keys() - known))
        if unknown:
            return f"{where}{unknown[0]} is not accepted from a file"
    return _metric_refusal(config.get("metric_list") or []) or _data_refusal(config)


def _metric_refusal(metrics: Any) -> str | None:
    if not isinstance(metrics, list) or not all(isinstance(metric, Mapping) for metric in metrics):
        return "metric_list is a list of mappings"
    for metric in metrics:
        # What the harness does not know itself it looks for in the ``evaluate`` library: a script, by name or path.
        if metric.get("hf_evaluate") or not _NAME.fullmatch(str(metric.get("metric"))):
            return f"the metric {metric.get('metric')!r} would be a script"
    return None


def _data_refusal(config: Mapping[str, Any]) -> str | None:
    path, options = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if not isinstance(path, str) or not isinstance(options, Mapping):
        return "dataset_path names its data: json, csv or text with data_files, or a data set of the hub"
    if options.get("trust_remote_code"):
        return "trust_remote_code runs code of the hub"
    known = _READERS.get(path, _HUB_KEYS)
    unknown = sorted(map(str, options.keys() - known - {"trust_remote_code"}))
    if unknown:
        return f"dataset_kwargs: {unknown[0]} is not accepted for {path!r}"
    if path not in _READERS:
        return (
            None if _HUB_DATASET.fullmatch(path) else f"dataset_path {path!r} is neither json, csv, text nor a hub id"
        )
    files = data_files(config)
    if not files or not all(isinstance(f, str) for names in files.values() for f in names):
        return f"dataset_path {path!r} needs data_files: names of files, by split"
    return None
