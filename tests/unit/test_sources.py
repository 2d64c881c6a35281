"""Sources: names are checked, and no safetensors header, however hostile, does more than raise SourceCorrupt."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qbatch.core.domain import DType
from qbatch.core.errors import JobError, SourceCorrupt, SourceNotFound, StorageError, UnsafeSource, UsageError
from qbatch.core.sources import (
    INDEX_NAME,
    PICKLE_INDEX_NAME,
    PICKLE_NAME,
    SINGLE_NAME,
    Header,
    is_pickled,
    parse_source,
    pickle_files,
    read_config,
    read_header,
    source_dtype,
    weight_files,
)

deserialize: Callable[[bytes], Any] = safetensors.deserialize
ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
# The file is rewritten by every example, so that sharing one folder is no harm.
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / SINGLE_NAME


def corrupt(path: Path) -> str:
    with pytest.raises(SourceCorrupt) as caught:
        read_header(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


# names


@pytest.mark.parametrize(
    ("text", "location", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("org/model", "org/model", None),
        ("org/model@v1.0", "org/model", "v1.0"),
        ("org/model@refs/pr/1", "org/model", "refs/pr/1"),
    ],
)
def test_a_hub_id_is_read_with_its_revision(text: str, location: str, revision: str | None) -> None:
    source = parse_source(text)
    assert (source.location, source.revision, source.is_folder) == (location, revision, False)


def test_a_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    for text in ("llama", "./llama", str(tmp_path / "llama")):
        source = parse_source(text)
        assert (source.name, source.location, source.is_folder) == (text, str(tmp_path / "llama"), True)
    with pytest.raises(UsageError, match="no revisions"):
        parse_source("llama@v1")


def test_a_folder_need_not_exist_yet() -> None:
    assert parse_source("./not/there").is_folder
    assert parse_source("a/b/c").is_folder


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a b",
        "org/",
        "-x",
        "org/model@",
        "org/model@../x",
        "a..b",
        "a--b",
        "x" * 300,
        "m\0n",
        "~\0",
        "/\0",
        "~nobody-here/x",
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_source(text)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_source_or_a_usage_error(text: str) -> None:
    try:
        source = parse_source(text)
    except UsageError:
        return
    assert source.location


# headers


_HOSTILE = r"""
import re, sys
from pathlib import Path
from qbatch.core.errors import SourceCorrupt
from qbatch.core.sources import MAX_HEADER_BYTES, read_header

path = Path(sys.argv[1])
header = b"[" + b"[]," * (MAX_HEADER_BYTES // 3 - 2) + b"[]]"
path.write_bytes(len(header).to_bytes(8, "little") + header)
del header
try:
    read_header(path)
except SourceCorrupt as error:
    print(error)
# Not ru_maxrss, which begins with the peak of the process that started this one.
print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_the_longest_header_that_is_read_takes_bounded_memory(file: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _HOSTILE, str(file)], capture_output=True, text=True, timeout=120)
    said, peak_kib = done.stdout.splitlines()
    assert "not a JSON object" in said
    assert int(peak_kib) * 2**10 < 2**30


def test_a_header_tells_where_each_tensor_lies(file: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [2, 10]},
        "a": ENTRY,
        "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [10, 10]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [10, 14]},
    }
    found = read_header(write(file, header, bytes(14)))
    start = file.stat().st_size - 14
    assert found.metadata == {"format": "pt"}
    assert found.size == file.stat().st_size
    assert {t.name: (t.start - start, t.end - start, t.numel) for t in found.tensors} == {
        "a": (0, 2, 2),
        "b": (2, 10, 4),
        "none": (10, 10, 0),
        "scalar": (10, 14, 1),
    }


@pytest.mark.parametrize(
    ("entries", "data", "said"),
    [
        ({"a": ENTRY}, b"x", "truncated"),
        ({"a": ENTRY}, b"xyz", "belong to no tensor"),
        ({"a": ENTRY, "b": ENTRY}, b"xy", "starts at"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [1, 3]}}, b"xyz", "starts at"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [3, 5]}}, b"vwxyz", "starts at"),
        ({"a": ENTRY | {"data_offsets": [2, 0]}}, b"xy", "offsets are wrong"),
        ({"a": ENTRY | {"data_offsets": [-2, 0]}}, b"xy", "malformed"),
        ({"a": ENTRY | {"data_offsets": [0, 1, 2]}}, b"xy", "malformed"),
        ({"a": ENTRY | {"data_offsets": [0, 2.0]}}, b"xy", "malformed"),
        ({"a": ENTRY | {"data_offsets": [False, 2]}}, b"xy", "malformed"),
        ({"a": ENTRY | {"data_offsets": None}}, b"xy", "malformed"),
        ({"a": ENTRY | {"shape": [3]}}, b"xy", "do not match"),
        ({"a": ENTRY | {"shape": "2"}}, b"xy", "malformed"),
        ({"a": ENTRY | {"shape": [2**63]}}, b"xy", "malformed"),
        ({"a": ENTRY | {"shape": [10**4299, 2]}}, b"xy", "malformed"),
        ({"a": ENTRY | {"data_offsets": [0, 10**4299]}}, b"xy", "malformed"),
        ({"a": ENTRY | {"dtype": "U3"}}, b"xy", "unknown dtype 'U3'"),
        ({"a": ENTRY | {"dtype": "Z" * 10_000}}, b"xy", "unknown dtype"),
        ({"a": ENTRY | {"dtype": ["U8"]}}, b"xy", "malformed dtype"),
        ({"a": ENTRY | {"dtype": None}}, b"xy", "malformed dtype"),
        ({"a": {"dtype": "U8", "shape": [2]}}, b"xy", "lacks a dtype"),
        ({"a": 5}, b"xy", "lacks a dtype"),
        ({"n" * 10_000: ENTRY | {"shape": [3]}}, b"xy", "do not match"),
        ({"two\nlines": ENTRY | {"shape": [3]}}, b"xy", "do not match"),
        ({"half\ud800": ENTRY}, b"xy", "Unicode"),
        ({"__metadata__": {"format": 1}}, b"", "__metadata__"),
        ({"__metadata__": ["pt"]}, b"", "__metadata__"),
        ({"__metadata__": []}, b"", "__metadata__"),
        (b'{"__metadata__": NaN}', b"", "not JSON"),
        ([ENTRY], b"xy", "not a JSON object"),
        (b"{" * 10, b"", "not JSON"),
        (b"\xff\xfe{\0}\0", b"", "not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", b"", "not JSON"),
        (b"", b"", "not JSON"),
    ],
)
def test_a_header_that_contradicts_its_file_is_corrupt(file: Path, entries: Any, data: bytes, said: str) -> None:
    assert said in corrupt(write(file, entries, data))


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_without_room_for_a_length_is_corrupt(file: Path, size: int) -> None:
    file.write_bytes(bytes(size))
    assert "is not a safetensors file" in corrupt(file)


@pytest.mark.parametrize(
    "content", [b"\xff" * 500, b"PK\x03\x04" + bytes(500), b"<!DOCTYPE html><html></html>", b"GGUF"]
)
def test_a_file_of_another_kind_is_called_that_without_numbers(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert corrupt(file).startswith(f"{file.name} is not a safetensors file")


def test_every_truncation_of_a_good_file_is_corrupt(file: Path) -> None:
    whole = write(file, {"a": ENTRY}, b"xy").read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        corrupt(file)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"a":{"dtype":'])
def test_deep_nesting_is_corrupt_at_any_depth(file: Path, opening: bytes) -> None:
    """Around Python's own limit too, where reading it works and printing it might not."""
    for depth in (*range(900, 1010), 100_000):
        corrupt(
            write(file, opening + b"[" * depth + b"]" * depth + b"}" * opening.count(b"{") + b"]" * (opening == b"["))
        )


@pytest.mark.parametrize("length", [100, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_allocates_nothing(file: Path, length: int) -> None:
    write(file, b"{}", length=length)
    assert "is truncated" in corrupt(file)
    assert peak_bytes(file) < 2**20


def test_a_header_over_the_limit_is_not_read(file: Path) -> None:
    with write(file, b"{}", length=10**8 + 1).open("r+b") as sparse:
        sparse.truncate(2 * 10**8)
    assert peak_bytes(file) < 2**20


def test_enormous_shapes_are_not_multiplied_out(file: Path) -> None:
    """A million dimensions of 2**62 have a product of eight megabytes, and it takes minutes to get there."""
    entry = ENTRY | {"shape": [2**62] * 1_000_000}
    assert "do not match" in corrupt(write(file, {"a": entry}, b"xy"))


def peak_bytes(file: Path) -> int:
    tracemalloc.start()
    corrupt(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "U8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
sizes = st.integers(-1, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "BF16", "F32", "F4", "F6_E2M3", "C64", "I2"]) | json_values,
        "shape": st.lists(sizes, max_size=3) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    },
    optional={"other": json_values},
)
headers = st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), entries | json_values, max_size=4)


@given(content=st.binary(max_size=200))
@fuzz
def test_any_bytes_are_a_header_or_corrupt(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    read_or_corrupt(file)


@given(header=headers, data=st.binary(max_size=24), length=st.none() | st.integers(0, 2**64 - 1))
@fuzz
def test_any_json_is_a_header_or_corrupt(file: Path, header: Any, data: bytes, length: int | None) -> None:
    read_or_corrupt(write(file, header, data, length=length))


@given(shapes=st.lists(st.tuples(st.sampled_from(["U8", "F16", "F32"]), st.lists(st.integers(0, 3), max_size=3))))
@fuzz
def test_every_well_formed_header_is_read(file: Path, shapes: list[tuple[str, list[int]]]) -> None:
    header, end = {}, 0
    for number, (dtype, shape) in enumerate(shapes):
        size = {"U8": 1, "F16": 2, "F32": 4}[dtype]
        for dimension in shape:
            size *= dimension
        header[str(number)] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    found = read_header(write(file, header, bytes(end)))
    assert [(t.dtype, list(t.shape)) for t in found.tensors] == shapes
    assert sum(t.nbytes for t in found.tensors) == end


def read_or_corrupt(file: Path) -> None:
    """What we read, safetensors reads too; what it reads, we do."""
    try:
        found = read_header(file)
    except SourceCorrupt:
        with pytest.raises(safetensors.SafetensorError):
            deserialize(file.read_bytes())
        return
    theirs = dict(deserialize(file.read_bytes()))
    assert {t.name: (t.dtype, list(t.shape), t.nbytes) for t in found.tensors} == {
        name: (tensor["dtype"], tensor["shape"], len(tensor["data"])) for name, tensor in theirs.items()
    }


def test_a_file_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        read_header(tmp_path / "gone.safetensors")
    with pytest.raises(StorageError, match="too long"):
        weight_files(tmp_path / ("x" * 300))


# folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write_index(folder: Path, index: Any) -> None:
    (folder / INDEX_NAME).write_text(index if isinstance(index, str) else json.dumps(index))


def test_the_index_names_the_weight_files(folder: Path) -> None:
    for name in ("two.safetensors", "one.safetensors", "stray.safetensors"):
        write(folder / name, {"a": ENTRY}, b"xy")
    write_index(folder, {"weight_map": {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}})
    assert weight_files(folder) == (folder / "one.safetensors", folder / "two.safetensors")
    write(folder / SINGLE_NAME, {"a": ENTRY}, b"xy")
    assert weight_files(folder) == (folder / SINGLE_NAME,), "as transformers chooses"


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[" * 100_000,
        [],
        {},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": ["x.safetensors"]}},
        {"weight_map": {"a": "x.safetensors", "b": None}},
        {"weight_map": {"a": "../x.safetensors"}},
        {"weight_map": {"a": "/x.safetensors"}},
        {"weight_map": {"a": "x.bin"}},
        {"weight_map": {"a": "missing.safetensors"}},
        {"weight_map": {"a": "nul\0.safetensors"}},
        {"weight_map": {"a": "half\ud800.safetensors"}},
    ],
)
def test_a_broken_index_is_corrupt(folder: Path, index: Any) -> None:
    write(folder / "x.safetensors", {"a": ENTRY}, b"xy")
    write_index(folder, index)
    with pytest.raises(SourceCorrupt) as caught:
        weight_files(folder)
    assert "\n" not in str(caught.value)


file_names = st.sampled_from(
    ["x.safetensors", "x.bin", "../x.safetensors", "/x.bin", "", ".", "..", "nul\0.bin", "half\ud800.bin", "gone.bin"]
)
indexes = st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=3), file_names | json_values)})


@given(index=indexes | json_values)
@fuzz
def test_whatever_an_index_says_it_names_files_of_its_folder_or_is_corrupt(tmp_path: Path, index: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    for path in (folder / "config.json", folder / "x.safetensors", folder / "x.bin", tmp_path / "x.safetensors"):
        path.write_text("{}")
    for name, files_of in ((INDEX_NAME, weight_files), (PICKLE_INDEX_NAME, pickle_files)):
        (folder / name).write_text(json.dumps(index))
        with suppress(SourceCorrupt):
            suffix = "bin" if name == PICKLE_INDEX_NAME else "safetensors"
            assert set(files_of(folder)) == {folder / f"x.{suffix}"}


@pytest.mark.parametrize(
    ("files", "pickled"),
    [
        ((), False),
        ((PICKLE_NAME,), True),
        ((PICKLE_INDEX_NAME,), True),
        ((PICKLE_NAME, SINGLE_NAME), False),
        ((PICKLE_INDEX_NAME, INDEX_NAME), False),
        (("model.pt",), False),
    ],
)
def test_a_model_is_pickled_where_it_has_no_safetensors(tmp_path: Path, files: tuple[str, ...], pickled: bool) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert is_pickled(tmp_path) is pickled
    assert not is_pickled(tmp_path / "gone")


@pytest.mark.parametrize("config", ["", "{", "[]", "[" * 100_000, "\ufffe"])
def test_a_config_that_is_no_object_is_corrupt(folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(SourceCorrupt):
        read_config(folder)


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ((), SourceNotFound),
        ((SINGLE_NAME,), SourceNotFound),
        (("config.json",), SourceNotFound),
        (("config.json", "pytorch_model.bin"), UnsafeSource),
        (("config.json", "pytorch_model-00001-of-00002.bin"), UnsafeSource),
        (("config.json", "consolidated.00.pth"), UnsafeSource),
        (("config.json", "model.pt"), UnsafeSource),
        (("config.json", "last.ckpt"), UnsafeSource),
        (("config.json", "weights.pkl"), UnsafeSource),
    ],
)
def test_a_folder_without_what_is_needed_says_so(tmp_path: Path, files: tuple[str, ...], error: type[JobError]) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(error):
        weight_files(tmp_path)


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        weight_files(tmp_path / "gone")
    with pytest.raises(SourceNotFound):
        read_config(tmp_path / "gone")


def test_the_dtype_is_that_of_most_floating_point_bytes(file: Path) -> None:
    def entry(dtype: str, start: int, end: int) -> dict[str, Any]:
        width = {"F32": 4, "BF16": 2, "I64": 8}[dtype]
        return {"dtype": dtype, "shape": [(end - start) // width], "data_offsets": [start, end]}

    mixed = {"a": entry("F32", 0, 8), "b": entry("BF16", 8, 20), "c": entry("I64", 20, 84)}
    assert source_dtype((read_header(write(file, mixed, bytes(84))),)) is DType.BFLOAT16
    nothing: tuple[Header, ...] = ()
    assert source_dtype(nothing) is DType.FLOAT32
