"""Which tasks are accepted, from whom, and what makes two of them the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qbatch.core.domain import DeviceKind, Protocol, ProtocolOptions, TaskRef, content_hash
from qbatch.core.errors import UnsafeSource, UsageError
from qbatch.scheduler.lm_eval_files import MAX_BYTES, read_tasks, unpack
from tests.quiz import CONFIG, QUESTIONS, write_quiz

PROTOCOL = ProtocolOptions(eval_text_sha256="0" * 64).for_device(DeviceKind.CPU)
# Each would run code, or allow it. A key of CONFIG, its value, and a word of the refusal.
UNSAFE: dict[str, tuple[str, Any, str]] = {
    "its own word": ("unsafe_code", True, "unsafe_code"),
    "a class": ("class", "os.system", "class"),
    "a function for its data": ("custom_dataset", "os.getcwd", "custom_dataset"),
    "a function for its documents": ("process_docs", "os.getcwd", "process_docs"),
    "a function for its results": ("process_results", "os.getcwd", "process_results"),
    "a function for its examples": ("fewshot_config", {"process_docs": "os.getcwd"}, "process_docs"),
    "a prompt from a file": ("use_prompt", "evil.yaml:all", "use_prompt"),
    "generation by a repository": ("generation_kwargs", {"custom_generate": "evil/repo"}, "custom_generate"),
    "a metric of the hub": ("metric_list", [{"metric": "acc", "hf_evaluate": True}], "script"),
    "a metric's path": ("metric_list", [{"metric": "/tmp/evil.py"}], "script"),  # noqa: S108
    "a data set's own code": (
        "dataset_kwargs", {"trust_remote_code": True, "data_files": {"test": "quiz.jsonl"}}, "trust_remote_code"
    ),
    "pickles": ("dataset_path", "pandas", "pandas"),
    "a folder of the worker's": ("dataset_path", "../evil", "evil"),
    "another reader's options": (
        "dataset_kwargs", {"converters": {}, "data_files": {"test": "quiz.jsonl"}}, "converters"
    ),
}  # fmt: skip
unsafe = pytest.mark.parametrize(("key", "value", "word"), UNSAFE.values(), ids=UNSAFE.keys())


def test_names_and_files_are_told_apart(tmp_path: Path) -> None:
    path = write_quiz(tmp_path)
    read = read_tasks(["arc_easy", str(path), "arc_easy"])
    assert [(ref.name, ref.sha256 is None) for ref in read.refs] == [("arc_easy", True), ("quiz", False)]
    assert list(read.texts) == [read.refs[1].sha256]


@pytest.mark.parametrize("item", ["two words", "a|b", "../quiz", "quiz.yaml"])
def test_what_is_neither_is_refused(item: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"neither|cannot read"):
        read_tasks([item])


def test_a_file_carries_its_data(tmp_path: Path) -> None:
    (text,) = read_tasks([str(write_quiz(tmp_path))]).texts.values()
    packed = unpack(text)
    (content,) = packed.files.values()
    assert [json.loads(line) for line in content.splitlines()] == QUESTIONS
    assert packed.config["dataset_kwargs"]["data_files"] == {"test": list(packed.files)}
    assert str(tmp_path) not in text


@unsafe
def test_code_is_refused_at_submit(tmp_path: Path, key: str, value: Any, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        read_tasks([str(write_quiz(tmp_path, **{key: value}))])


@unsafe
def test_code_is_refused_where_it_would_run(key: str, value: Any, word: str) -> None:
    with pytest.raises(UnsafeSource, match=word):
        unpack(json.dumps({"config": CONFIG | {key: value}, "files": {}}))


@pytest.mark.parametrize("line", ["process_docs: !function utils.f", "x: !!python/object/apply:os.getcwd []"])
def test_tags_that_run_code_are_refused(tmp_path: Path, line: str) -> None:
    path = write_quiz(tmp_path)
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(UsageError, match=r"is code|not plain YAML"):
        read_tasks([str(path)])


def test_a_tag_in_an_include_is_refused_too(tmp_path: Path) -> None:
    path = write_quiz(tmp_path, include="base.yaml")
    (tmp_path / "base.yaml").write_text("doc_to_text: !function utils.f\n")
    with pytest.raises(UsageError, match=r"utils\.f is code"):
        read_tasks([str(path)])


def test_includes_are_merged_and_a_files_own_keys_win(tmp_path: Path) -> None:
    path = write_quiz(tmp_path, include="base.yaml")
    (tmp_path / "base.yaml").write_text("num_fewshot: 3\ntask: base\n")
    (text,) = read_tasks([str(path)]).texts.values()
    config = unpack(text).config
    assert (config["num_fewshot"], config["task"], "include" in config) == (3, "quiz", False)


def test_a_file_that_includes_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="includes itself"):
        read_tasks([str(write_quiz(tmp_path, include="quiz.yaml"))])


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2",
        "include: 5\n",
        "- a\n- b\n",
        "group: g\ntask: [a, b]\n",
        "task: t\ndataset_path: json\n",
        "a: 2024-01-01\n",
    ],
)
def test_a_file_that_describes_no_task_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"t\.yaml|cannot read .*5"):
        read_tasks([str(path)])


def test_missing_data_files_are_reported(tmp_path: Path) -> None:
    path = write_quiz(tmp_path)
    (tmp_path / "quiz.jsonl").unlink()
    with pytest.raises(UsageError, match=r"cannot read .*quiz\.jsonl"):
        read_tasks([str(path)])


def test_the_size_is_bounded(tmp_path: Path) -> None:
    path = write_quiz(tmp_path)
    (tmp_path / "quiz.jsonl").write_bytes(b"x" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="exceed 16 MiB in total"):
        read_tasks([str(path)])


def test_the_bound_is_for_all_files_together(tmp_path: Path) -> None:
    paths = [write_quiz(tmp_path / name, task=name) for name in ("a", "b")]
    for path in paths:
        path.with_name("quiz.jsonl").write_bytes(b"x" * (MAX_BYTES * 2 // 3))
    read_tasks([str(paths[0])])
    with pytest.raises(UsageError, match="exceed 16 MiB in total"):
        read_tasks([str(path) for path in paths])


@pytest.mark.slow
def test_aliases_do_not_multiply_without_end(tmp_path: Path) -> None:
    path = write_quiz(tmp_path)
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path.write_text(f"{path.read_text()}metadata:\n" + "".join(f"  {line}\n" for line in bomb))
    with pytest.raises(UsageError, match="exceed 16 MiB in total"):
        read_tasks([str(path)])


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [write_quiz(tmp_path / "a"), write_quiz(tmp_path / "b", num_fewshot=1)]
    with pytest.raises(UsageError, match="two tasks have the name 'quiz'"):
        read_tasks([str(path) for path in paths])


def hash_of(path: Path) -> str:
    (ref,) = read_tasks([str(path)]).refs
    assert ref.sha256 is not None
    return ref.sha256


def test_content_decides_a_files_identity(tmp_path: Path) -> None:
    here, there = write_quiz(tmp_path / "here"), write_quiz(tmp_path / "there")
    assert hash_of(here) == hash_of(there)
    data = there.with_name("quiz.jsonl")
    data.write_text(data.read_text().replace("number 7", "number 70"))
    assert hash_of(here) != hash_of(there)


def test_the_order_of_the_answers_is_part_of_it(tmp_path: Path) -> None:
    # lm-evaluation-harness takes the answers of a mapping in the order in which they stand.
    one = write_quiz(tmp_path / "a", doc_to_choice={"a": "salt", "b": "rain"})
    other = write_quiz(tmp_path / "b", doc_to_choice={"b": "rain", "a": "salt"})
    assert hash_of(one) != hash_of(other)


def test_another_set_of_tasks_is_another_protocol() -> None:
    tasks = (TaskRef(name="a"), TaskRef(name="b", sha256="1" * 64))
    protocols = [
        PROTOCOL,
        replace(PROTOCOL, tasks=tasks[:1]),
        replace(PROTOCOL, tasks=tasks),
        replace(PROTOCOL, tasks=(tasks[0], TaskRef(name="b", sha256="2" * 64))),
        replace(PROTOCOL, tasks=tasks, num_fewshot=0),
        replace(PROTOCOL, tasks=tasks, num_fewshot=5),
        replace(PROTOCOL, tasks=tasks, task_limit=10),
    ]
    assert len({protocol.hash for protocol in protocols}) == len(protocols)
    for protocol in protocols:
        assert Protocol.from_json(json.loads(json.dumps(protocol.to_json()))) == protocol


def test_a_protocol_stored_before_there_were_tasks_is_one_without() -> None:
    stored = {
        "batch_size": 1, "prompt_tokens": 64, "new_tokens": 16, "warmup_iterations": 1, "min_iterations": 3,
        "min_duration_s": 0.5, "eval_text_sha256": "0" * 64, "eval_window": 256, "eval_stride": 256,
        "eval_max_windows": 8,
    }  # fmt: skip
    protocol = Protocol.from_json(stored)
    assert protocol.tasks == ()
    assert protocol.hash == content_hash(stored)
    asked = {"eval_text_sha256": "0" * 64, "batch_size": None, "prompt_tokens": None, "new_tokens": None}
    assert ProtocolOptions.from_json(asked).tasks == ()


def test_a_limit_without_tasks_is_refused() -> None:
    with pytest.raises(UsageError, match="need --tasks"):
        ProtocolOptions(eval_text_sha256="0" * 64, task_limit=5)


def test_the_texts_to_send_are_the_evaluation_text_and_the_files() -> None:
    tasks = (TaskRef(name="a"), TaskRef(name="b", sha256="1" * 64))
    assert ProtocolOptions(eval_text_sha256="0" * 64, tasks=tasks).text_hashes == ("0" * 64, "1" * 64)
