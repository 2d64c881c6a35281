"""Tasks of lm-evaluation-harness as a user gives them: names in its registry, or YAML files with the data they need.

A file is packed into one text that any worker can run: the YAML with its includes merged, and the data files. It must
not contain code: keys of the harness that accept a function, a module or a script are refused.
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
# ``generate`` accepts many other keys, among them a repository whose code it would run.
_GENERATION_KEYS = frozenset({
    "until", "do_sample", "temperature", "top_k", "top_p", "min_p", "num_beams", "repetition_penalty",
    "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens",
})  # fmt: skip
# The readers of plain text in ``datasets``, with the options allowed for each; other readers load pickles.
_READERS = {
    "json": frozenset({"data_files", "field"}),
    "csv": frozenset({"data_files", "delimiter", "column_names"}),
    "text": frozenset({"data_files"}),
}
_HUB_KEYS = frozenset({"revision"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFiles:
    """The tasks given with ``--tasks``. ``texts`` maps the sha256 of each packed file to its text."""

    refs: tuple[TaskRef, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTask:
    """A task's configuration, and its data ``files`` by name. Its ``data_files`` refer to those names."""

    config: Mapping[str, Any]
    files: Mapping[str, str]


def read_tasks(items: Sequence[str]) -> TaskFiles:
    """Read the tasks ``items``, each a name or the path of a YAML file. A name is looked up when the task runs.

    Raises UsageError if a file cannot be read, could run code, or has the name of another task, or if the files and
    their data exceed MAX_BYTES in total.
    """
    refs: list[TaskRef] = []
    texts: dict[str, str] = {}
    for item in dict.fromkeys(items):
        if not _is_path(item):
            if not _NAME.fullmatch(item):
                raise UsageError(f"{item!r} is neither the name of a task nor the path of a .yaml file")
            refs.append(TaskRef(name=item))
            continue
        name, text = _pack(Path(item), room=MAX_BYTES - sum(map(len, texts.values())))
        digest = sha256(text.encode()).hexdigest()
        refs.append(TaskRef(name=name, sha256=digest))
        texts[digest] = text
    names = [ref.name for ref in refs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two tasks have the name {name!r}")
    return TaskFiles(refs=tuple(refs), texts=texts)


def unpack(text: str) -> PackedTask:
    """Read a task that ``read_tasks`` has packed. Raises UnsafeSource for a text that it would have refused."""
    packed = json.loads(text)
    task = PackedTask(config=packed["config"], files=packed["files"])
    refusal = _refusal(task.config)
    if refusal is not None:
        raise UnsafeSource(f"task {task.config.get('task')!r}: {refusal}")
    return task


def data_files(config: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
    """The files that a task reads, by split; empty if its data are on the hub."""
    listed = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    # ``datasets`` treats a single file or a list of files as the training split.
    by_split = listed if isinstance(listed, Mapping) else {"train": listed}
    return {split: files if isinstance(files, list) else [files] for split, files in by_split.items()}


def _is_path(item: str) -> bool:
    return item.endswith(_SUFFIXES) or "/" in item


def _pack(path: Path, *, room: int) -> tuple[str, str]:
    """Pack a task into at most ``room`` characters. Returns its name and its text."""
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
    # Encoded piece by piece, because a short YAML file with aliases can become enormous in JSON. Keys keep their order,
    # which decides the order of the answers.
    size = 0
    try:
        for piece in json.JSONEncoder(separators=(",", ":")).iterencode(value):
            size += len(piece)
            if size > room:
                raise _too_large(path)
            yield piece
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}; put quotes around values that are meant as text") from error


def _too_large(path: Path) -> UsageError:
    return UsageError(f"{path}: the task files and their data exceed {MAX_BYTES // MIB} MiB in total")


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
    """Read a YAML file and merge its includes into it. Its own keys take precedence."""
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
        """A safe loader that refuses the tag ``!function`` with a clear message."""

    def refuse(_loader: Any, node: Any) -> None:
        raise UsageError(
            f"{path}: !function {node.value} is code, which a task file must not contain; only the tasks installed "
            "with lm-evaluation-harness itself may use functions"
        )

    Loader.add_constructor("!function", refuse)
    return Loader


def _refusal(config: Mapping[str, Any]) -> str | None:
    """Why a task is not accepted from a file; None if it is accepted."""
    name = config.get("task")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return "the file must name its task, as in `task: my_task`"
    if config.get("unsafe_code"):
        return "unsafe_code is set, and a task from a file must not run code"
    for where, value, known in (
        ("", config, _KEYS),
        ("fewshot_config: ", config.get("fewshot_config"), _FEWSHOT_KEYS),
        ("generation_kwargs: ", config.get("generation_kwargs"), _GENERATION_KEYS),
    ):
        if not isinstance(value or {}, Mapping):
            return f"{where}this must be a mapping"
        unknown = sorted(map(str, (value or {}).keys() - known))
        if unknown:
            return f"{where}{unknown[0]} is not accepted in a file"
    return _metric_refusal(config.get("metric_list") or []) or _data_refusal(config)


def _metric_refusal(metrics: Any) -> str | None:
    if not isinstance(metrics, list) or not all(isinstance(metric, Mapping) for metric in metrics):
        return "metric_list must be a list of mappings"
    for metric in metrics:
        # The harness loads a metric that it does not know from the ``evaluate`` library: a script, by name or path.
        if metric.get("hf_evaluate") or not _NAME.fullmatch(str(metric.get("metric"))):
            return f"the metric {metric.get('metric')!r} would be loaded from a script, which is not accepted"
    return None


def _data_refusal(config: Mapping[str, Any]) -> str | None:
    path, options = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if not isinstance(path, str) or not isinstance(options, Mapping):
        return "dataset_path must be json, csv or text, with data_files, or a data set on the hub"
    if options.get("trust_remote_code"):
        return "trust_remote_code would run code from the hub, which is not accepted"
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
        return f"dataset_path {path!r} needs data_files with file names by split"
    return None
