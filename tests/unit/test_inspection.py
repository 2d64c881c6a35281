"""What headers tell of a model: from a folder, and from a hub over HTTP."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from qbatch.core.domain import SourceRef
from qbatch.core.errors import FetchError, JobError, SourceCorrupt, SourceGated, SourceNotFound, UnsafeSource
from qbatch.core.inspection import inspect_source
from qbatch.core.sources import INDEX_NAME, SINGLE_NAME, parse_source
from qbatch.views.model_description import inspection_table
from tests.hub import Hub, serving
from tests.tiny import make_causal, make_encoder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal(tmp_path_factory.mktemp("source"), dtype="float16")


def folder_ref(folder: Path) -> SourceRef:
    return parse_source(str(folder))


def count_parameters(folder: Path) -> int:
    from transformers import AutoModelForCausalLM

    return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())


def write_tensors(folder: Path, tensors: dict[str, tuple[str, list[int], int]], config: object) -> Path:
    """A model whose tensors, by name, are (dtype, shape, bytes)."""
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / SINGLE_NAME).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_tells_what_transformers_counts(llama: Path) -> None:
    found = inspect_source(folder_ref(llama))
    parameters = count_parameters(llama)
    assert found["num_parameters"] == parameters
    assert found["dtypes"] == {"float16": {"parameters": parameters, "bytes": parameters * 2}}
    assert found["memory_bytes"] == parameters * 2
    assert found["memory_bytes_by_dtype"] == {"float32": parameters * 4, "bfloat16": parameters * 2}
    assert found["disk_bytes"] == (llama / SINGLE_NAME).stat().st_size
    assert (found["architecture"], found["model_type"], found["dtype"]) == ("LlamaForCausalLM", "llama", "float16")
    assert (found["quantization"], found["revision"], found["commit"]) == (None, None, None)


def test_shards_are_counted_together(tmp_path: Path) -> None:
    folder = make_causal(tmp_path, max_shard_size="400KB")
    found = inspect_source(folder_ref(folder))
    assert len(found["files"]) > 1
    assert found["num_parameters"] == count_parameters(folder)
    assert found["disk_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_integer_buffers_are_bytes_and_no_parameters(tmp_path: Path) -> None:
    tensors = {"weight": ("F32", [3], 12), "position_ids": ("I64", [2], 16)}
    found = inspect_source(folder_ref(write_tensors(tmp_path, tensors, {})))
    assert (found["num_parameters"], found["num_tensors"], found["memory_bytes"]) == (3, 2, 28)
    assert found["memory_bytes_by_dtype"] == {"float32": 28, "bfloat16": 22}
    assert (found["architecture"], found["model_type"]) == (None, None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"load_in_8bit": True}, "bitsandbytes 8 bits"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "bitsandbytes 4 bits (nf4, double quantization)",
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes 4 bits (fp4)"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # what bitsandbytes says of this CPU is not this test's affair
def test_packed_codes_count_as_the_parameters_that_they_stand_for(
    llama: Path, tmp_path: Path, settings: dict[str, object], named: str
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=BitsAndBytesConfig(**settings))
    model.save_pretrained(tmp_path)
    found = inspect_source(folder_ref(tmp_path))
    assert found["quantization"] == named
    assert found["num_parameters"] == count_parameters(llama)
    assert found["memory_bytes"] < inspect_source(folder_ref(llama))["memory_bytes"]
    assert found["memory_bytes_by_dtype"] is None


def test_another_quantization_is_named_and_not_counted(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    found = inspect_source(folder_ref(write_tensors(tmp_path, {"x.qweight": ("I32", [2], 8)}, config)))
    assert (found["quantization"], found["num_parameters"], found["memory_bytes"]) == ("gptq", None, 8)
    assert "–" in inspection_table(found)


@pytest.mark.parametrize(
    "config",
    [{"quantization_config": "nf4"}, [], {"quantization_config": ["nf4"]}],
)
def test_a_config_that_makes_no_sense_is_corrupt(tmp_path: Path, config: object) -> None:
    with pytest.raises(SourceCorrupt):
        inspect_source(folder_ref(write_tensors(tmp_path, {}, config)))


def test_a_config_of_other_types_than_expected_is_survived(tmp_path: Path) -> None:
    folder = write_tensors(tmp_path, {}, {"architectures": "Llama", "model_type": 7})
    found = inspect_source(folder_ref(folder))
    assert (found["architecture"], found["model_type"], found["dtype"]) == (None, "7", None)
    assert "0 file" not in inspection_table(found)


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        inspect_source(folder_ref(tmp_path / "gone"))


def test_a_hub_that_is_switched_off_is_said_to_be() -> None:
    with pytest.raises(SourceNotFound, match="HF_HUB_OFFLINE"):
        inspect_source(parse_source("org/model"))


# over HTTP


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as served:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
        huggingface_hub.close_session()
        yield served
        huggingface_hub.close_session()


def test_the_hub_tells_what_the_folder_does(hub: Hub, llama: Path) -> None:
    commit = hub.publish("org/llama", llama)
    from_hub = inspect_source(parse_source("org/llama"))
    from_folder = inspect_source(folder_ref(llama))
    assert from_hub == from_folder | {"model": "org/llama", "commit": commit}
    at_commit = inspect_source(parse_source(f"org/llama@{commit}"))
    assert (at_commit["revision"], at_commit["commit"]) == (commit, commit)
    assert commit in inspection_table(at_commit)


def test_a_sharded_model_on_the_hub_is_counted_whole(hub: Hub, tmp_path: Path) -> None:
    folder = make_causal(tmp_path, max_shard_size="400KB")
    hub.publish("org/sharded", folder)
    found = inspect_source(parse_source("org/sharded"))
    assert len(found["files"]) > 1
    assert found["num_parameters"] == inspect_source(folder_ref(folder))["num_parameters"]


def test_a_stale_index_beside_the_single_file_is_left_alone(hub: Hub, llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    (folder / INDEX_NAME).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    hub.publish("org/rewritten", folder)
    found = inspect_source(parse_source("org/rewritten"))
    assert found["num_parameters"] == inspect_source(folder_ref(folder))["num_parameters"]


def test_a_revision_that_does_not_exist_is_named(hub: Hub, llama: Path) -> None:
    hub.publish("org/llama", llama)
    with pytest.raises(SourceNotFound, match=r"v9\.9"):
        inspect_source(parse_source("org/llama@v9.9"))


def test_a_model_that_does_not_exist_is_not_found(hub: Hub) -> None:
    with pytest.raises(SourceNotFound, match="no such model on the hub"):
        inspect_source(parse_source("org/nobody-made-this"))


def test_a_gated_model_is_gated(hub: Hub, llama: Path) -> None:
    hub.publish("org/gated", llama, gated=True)
    with pytest.raises(SourceGated, match="token"):
        inspect_source(parse_source("org/gated"))


@pytest.mark.parametrize(
    ("files", "error"),
    [
        (("config.json", "pytorch_model.bin"), UnsafeSource),
        (("config.json",), SourceNotFound),
        ((SINGLE_NAME,), SourceNotFound),
    ],
)
def test_a_repository_without_what_is_needed_says_so(
    hub: Hub, tmp_path: Path, files: tuple[str, ...], error: type[JobError]
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    hub.publish("org/odd", tmp_path)
    with pytest.raises(error):
        inspect_source(parse_source("org/odd"))


def test_an_index_that_names_a_missing_file_is_corrupt(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    hub.publish("org/odd", tmp_path)
    with pytest.raises(SourceCorrupt, match=r"gone\.safetensors"):
        inspect_source(parse_source("org/odd"))


@pytest.mark.parametrize(
    "content",
    [
        b"short",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 8) + b'{"a": 5}',
        struct.pack("<Q", 2) + b"[]",
        *(
            struct.pack("<Q", len(raw)) + raw + b"xy"
            for raw in (
                b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 9000]}}',
                b'{"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 2]}}',
                b'{"a": {"dtype": "U8", "shape": 2, "data_offsets": 2}}',
                b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": []}}',
                b'{"a": {"dtype": "U8", "shape": [2]}}',
            )
        ),
    ],
)
def test_a_broken_header_on_the_hub_is_corrupt(hub: Hub, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / SINGLE_NAME).write_bytes(content)
    hub.publish("org/broken", tmp_path)
    with pytest.raises(SourceCorrupt) as caught:
        inspect_source(parse_source("org/broken"))
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_down_can_be_asked_again(hub: Hub, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish("org/llama", llama)
    hub.unavailable = 1
    with pytest.raises(FetchError, match="503"):
        inspect_source(parse_source("org/llama"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match="cannot be reached"):
        inspect_source(parse_source("org/llama"))


# for people


def test_the_table_gives_the_recipes_figures_in_mib(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path, "classification", dtype="float32")
    found = inspect_source(folder_ref(folder)) | {"num_parameters": 1722408960, "memory_bytes": 6889635840}
    text = inspection_table(found)
    assert "1,722,408,960 (1.72 B)" in text
    assert "6,570.47 MiB (6,889,635,840 bytes)" in text
    assert "BertForSequenceClassification" in text
    assert "1 file\n" in text + "\n"
