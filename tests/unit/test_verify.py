"""A checkpoint that was changed or does not match its config is reported by name; an intact one has no problems."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qbatch.core.digest import digest_file, root_sha256
from qbatch.core.domain import DType, Method, Scheme
from qbatch.worker.checkpoints.publish import Origin, publish
from qbatch.worker.checkpoints.verify import verify
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from tests.schemes import with_options
from tests.tiny import make_causal, make_encoder, make_fused_qkv, make_llama4, make_overwritten, make_seq2seq

NF4 = Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16)
NF4_DOUBLE = with_options(NF4, double_quant=True)
FP4 = replace(NF4, method=Method.FP4)
INT8 = Scheme(method=Method.INT8, compute_dtype=DType.BFLOAT16)
UP = "model.layers.1.mlp.up_proj"
NORM = "model.norm.weight"
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"

Tensors = dict[str, torch.Tensor]


def published(
    source: Path, folder: Path, schemes: Mapping[str, Scheme], dtype: DType = DType.BFLOAT16
) -> dict[str, Path]:
    """Where each scheme's checkpoint of ``source`` is, published through the real writer."""
    targets = [Target(scheme=scheme, folder=folder / "staging" / name) for name, scheme in schemes.items()]
    for target in targets:
        target.folder.mkdir(parents=True)
    places: dict[str, Path] = {}
    for written in write_checkpoints(source, targets, dtype=dtype, device="cpu", on_progress=lambda *_: None):
        assert isinstance(written, Written), written
        name = written.target.folder.name
        origin = Origin(
            model="a/model",
            revision=None,
            fingerprint="f",
            scheme=written.target.scheme,
            dtype=dtype,
            device_kind="cpu",
            device_name="a CPU",
            versions={},
        )
        place = publish(
            written.target.folder,
            storage=folder,
            source=source,
            key=f"{len(places)}" * 64,
            origin=origin,
            files=written.files,
            audit=written.audit,
            quantize_s=written.quantize_s,
            confirm=lambda: None,
        )
        places[name] = folder / place.published.path
    return places


SCHEMES = {
    "nf4": NF4,
    "nf4-double": NF4_DOUBLE,
    "fp4": FP4,
    "int8": INT8,
    "skips": replace(NF4, skip_modules=("q_proj", "k_proj", "v_proj", "query", "attn")),
    "storage": with_options(NF4_DOUBLE, quant_storage="bfloat16"),
    "shards": replace(INT8, max_shard_bytes=100_000),
}
MODELS: dict[str, Callable[[Path, str], Path]] = {
    "llama": lambda folder, dtype: make_causal(folder, dtype=dtype),
    "tied-llama": lambda folder, dtype: make_causal(folder, dtype=dtype, tie_word_embeddings=True),
    "gpt2": lambda folder, dtype: make_causal(folder, "gpt2", dtype=dtype),
    "bloom": lambda folder, dtype: make_causal(folder, "bloom", dtype=dtype),
    "mixtral": lambda folder, dtype: make_causal(folder, "mixtral", dtype=dtype),
    "t5": lambda folder, dtype: make_seq2seq(folder, "t5", dtype=dtype),
    "bart": lambda folder, dtype: make_seq2seq(folder, "bart", dtype=dtype),
    "bert": lambda folder, dtype: make_encoder(folder, dtype=dtype),
    "bert-masked-lm": lambda folder, dtype: make_encoder(folder, "masked-lm", dtype=dtype),
    "built-whole": lambda folder, dtype: make_fused_qkv(folder, dtype=dtype),
    "overwritten": lambda folder, dtype: make_overwritten(folder, "youtu", dtype=dtype),
}


@pytest.mark.parametrize("model", MODELS)
def test_what_was_published_is_sound(model: str, tmp_path: Path) -> None:
    source = MODELS[model](tmp_path / "source", "bfloat16")
    found = {name: verify(folder) for name, folder in published(source, tmp_path, SCHEMES).items()}
    assert found == {name: [] for name in SCHEMES}


@pytest.mark.parametrize(("stored", "asked"), [("float32", DType.FLOAT16), ("bfloat16", DType.FLOAT32)])
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_every_dtype_is_sound(model: str, stored: str, asked: DType, tmp_path: Path) -> None:
    """T5 keeps some of its weights in float32 where all else is float16."""
    source = MODELS[model](tmp_path / "source", stored)
    schemes = {"nf4": replace(NF4, compute_dtype=asked), "int8": replace(INT8, compute_dtype=asked)}
    found = {name: verify(folder) for name, folder in published(source, tmp_path, schemes, asked).items()}
    assert found == {name: [] for name in schemes}


def test_a_head_that_differs_from_what_it_could_be_tied_to_is_sound(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", tie_word_embeddings=True)
    change(source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}))
    (folder,) = published(source, tmp_path, {"nf4": NF4}).values()
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    assert verify(folder) == []


def test_experts_that_transformers_replaces_on_loading_are_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier qbatch wrote such checkpoints, which cannot be loaded."""
    source = make_llama4(tmp_path / "source", dtype="bfloat16")
    with monkeypatch.context() as unaware:
        unaware.setattr("transformers.quantizers.base.MODULES_TO_PATCH_FOR_QUANTIZATION", {})
        folders = published(source, tmp_path, {"nf4": NF4, "int8": INT8})
    for folder in folders.values():
        (line,) = verify(folder)
        assert "Llama4TextExperts" in line


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    source = make_causal(root / "source", dtype="bfloat16")
    kinds = {"nf4": NF4, "nf4-double": NF4_DOUBLE, "int8": INT8, "shards": replace(NF4, max_shard_bytes=100_000)}
    return published(source, root, kinds)


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a published checkpoint, to be damaged."""
    return lambda kind: Path(shutil.copytree(originals[kind], tmp_path / kind))


def change(folder: Path, edit: Callable[[Tensors], object], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def sign(folder: Path) -> None:
    """Make the manifest anew over the files as they are, so that it finds nothing."""
    path = folder / "qbatch.json"
    digests = [digest_file(folder / entry["name"]) for entry in json.loads(path.read_text())["files"]]
    edit_json(path, files=[asdict(digest) for digest in digests], root_sha256=root_sha256(digests))


def state_with(tensors: Tensors, **fields: Any) -> torch.Tensor:
    state = json.loads(bytes(tensors[STATE].tolist())) | fields
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def rename(tensors: Tensors, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


MISSING = [
    ("nf4", f"{UP}.weight"),
    ("nf4", f"{UP}.weight.absmax"),
    ("nf4", f"{UP}.weight.quant_map"),
    ("nf4", STATE),
    ("nf4", NORM),
    ("nf4", "model.embed_tokens.weight"),
    ("nf4-double", f"{UP}.weight.nested_absmax"),
    ("nf4-double", f"{UP}.weight.nested_quant_map"),
    ("int8", f"{UP}.weight"),
    ("int8", f"{UP}.SCB"),
    ("int8", f"{UP}.weight_format"),
]


@pytest.mark.parametrize(("kind", "name"), MISSING)
def test_a_missing_tensor_is_named(kind: str, name: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    change(folder, lambda tensors: tensors.pop(name))
    sign(folder)
    assert verify(folder) == [f"{name} is missing"]


@pytest.mark.parametrize(("kind", "name"), [("nf4", f"{UP}.weight.absmax"), ("int8", f"{UP}.SCB"), ("nf4", NORM)])
def test_a_renamed_tensor_is_missing_and_another_is_there(kind: str, name: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    change(folder, lambda tensors: rename(tensors, name, f"{name}_"))
    sign(folder)
    assert verify(folder) == [f"{name} is missing", f"{name}_ is not a tensor of the configured model"]


DIFFERENT: list[tuple[str, str, Callable[[torch.Tensor], torch.Tensor], str]] = [
    ("nf4", f"{UP}.weight", lambda t: t.view(-1), "is U8 [16384]; by the config it should be U8 [16384, 1]"),
    ("nf4", f"{UP}.weight", lambda t: t.view(torch.int8), "is I8 [16384, 1]; by the config it should be U8 [16384, 1]"),
    ("nf4", f"{UP}.weight.absmax", lambda t: t[1:].clone(), "is F32 [511]; by the config it should be F32 [512]"),
    ("nf4", f"{UP}.weight.absmax", lambda t: t.half(), "is F16 [512]; by the config it should be F32 [512]"),
    ("nf4-double", f"{UP}.weight.absmax", lambda t: t.float(), "is F32 [512]; by the config it should be U8 [512]"),
    ("nf4", NORM, lambda t: t.float(), "is F32 [128]; by the config it should be BF16 [128]"),
    ("nf4", NORM, lambda t: t.view(2, 64), "is BF16 [2, 64]; by the config it should be BF16 [128]"),
    (
        "int8",
        f"{UP}.weight",
        lambda t: t.t().contiguous(),
        "is I8 [128, 256]; by the config it should be I8 [256, 128]",
    ),
    ("int8", f"{UP}.weight", lambda t: t.bfloat16(), "is BF16 [256, 128]; by the config it should be I8 [256, 128]"),
    ("int8", f"{UP}.SCB", lambda t: t.half(), "is F16 [256]; by the config it should be F32 [256]"),
    ("int8", f"{UP}.weight_format", lambda t: t.int(), "is I32 []; by the config it should be U8 []"),
]


@pytest.mark.parametrize(("kind", "name", "edit", "says"), DIFFERENT)
def test_another_shape_or_dtype_is_named(
    kind: str, name: str, edit: Callable[[torch.Tensor], torch.Tensor], says: str, copy: Callable[[str], Path]
) -> None:
    folder = copy(kind)
    change(folder, lambda tensors: tensors.update({name: edit(tensors[name])}))
    sign(folder)
    assert verify(folder) == [f"{name} {says}"]


STATES = [
    ({"shape": [128, 256]}, "has shape [128, 256]; by the config it should be [256, 128]"),
    ({"dtype": "float16"}, "has dtype float16; by the config it should be bfloat16"),
    ({"quant_type": "fp4"}, "has quant_type fp4; by the config it should be nf4"),
    ({"blocksize": 128}, "has blocksize 128; by the config it should be 64"),
    ({"surprise": 1}, "has surprise 1; by the config it should be None"),
    ({"nested_offset": 0.5}, "has the unexpected nested_offset 0.5"),
]


@pytest.mark.parametrize(("fields", "says"), STATES)
def test_a_state_that_does_not_fit_its_weight_is_named(
    fields: dict[str, Any], says: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("nf4")
    change(folder, lambda tensors: tensors.update({STATE: state_with(tensors, **fields)}))
    sign(folder)
    assert verify(folder) == [f"{STATE} {says}"]


@pytest.mark.parametrize("offset", [None, "much", float("nan")])
def test_a_doubly_quantized_weight_without_its_offset_is_named(offset: object, copy: Callable[[str], Path]) -> None:
    folder = copy("nf4-double")
    change(folder, lambda tensors: tensors.update({STATE: state_with(tensors, nested_offset=offset)}))
    sign(folder)
    assert verify(folder) == [f"{STATE} has the unexpected nested_offset {offset}"]


@pytest.mark.parametrize("state", [b"\xff" * 8, b"[1]", b"[" * 60_000, b" " * 70_000])
def test_an_invalid_quantization_state_is_named(state: bytes, copy: Callable[[str], Path]) -> None:
    folder = copy("nf4")
    change(folder, lambda tensors: tensors.update({STATE: torch.tensor(list(state), dtype=torch.uint8)}))
    sign(folder)
    assert verify(folder) == [f"{STATE} does not contain a quantization state"]


def flip_a_bit(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip_a_bit, "model.safetensors has changed since it was published (still "),
        (truncate, "model.safetensors has changed since it was published (now "),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "qbatch.json").unlink(), "there is no valid qbatch.json"),
        (lambda folder: (folder / "extra.safetensors").touch(), "extra.safetensors is not in the manifest"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_the_manifest_finds_what_the_tensors_do_not_show(
    damage: Callable[[Path], object], says: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("nf4")
    damage(folder)
    (line,) = verify(folder)
    assert line.startswith(says)


def test_a_card_and_hidden_files_are_no_damage(copy: Callable[[str], Path]) -> None:
    folder = copy("nf4")
    (folder / "README.md").write_text("# a model card")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "upload.json").touch()
    assert verify(folder) == []


def test_files_that_are_truncated_under_a_manifest_of_their_own(copy: Callable[[str], Path]) -> None:
    folder = copy("nf4")
    truncate(folder)
    sign(folder)
    (line,) = verify(folder)
    assert "truncated" in line


INDEX = "model.safetensors.index.json"


def weight_map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def test_an_index_that_lies(copy: Callable[[str], Path]) -> None:
    folder = copy("shards")
    files = weight_map(folder)
    other = next(file for file in files.values() if file != files[NORM])
    rest = {name: file for name, file in files.items() if name != f"{UP}.weight.absmax"}
    edit_json(folder / INDEX, weight_map=rest | {NORM: other, "made.up": other})
    sign(folder)
    assert verify(folder) == [
        f"{INDEX} puts {NORM} into {other}",
        f"{INDEX} puts made.up into {other}",
        f"{INDEX} leaves out {UP}.weight.absmax",
    ]


def test_an_index_that_is_none_or_names_a_file_that_is_not_there(copy: Callable[[str], Path]) -> None:
    folder = copy("shards")
    files = weight_map(folder)
    edit_json(folder / INDEX, weight_map=files | {NORM: "gone.safetensors"})
    sign(folder)
    assert verify(folder) == [f"{INDEX} lists 'gone.safetensors', which is missing"]
    (folder / INDEX).write_text("{}")
    sign(folder)
    assert verify(folder) == [f"{INDEX} is not an index of weights"]


def test_a_tensor_in_two_files_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("shards")
    files = weight_map(folder)
    other = next(file for file in sorted(set(files.values())) if file != files[NORM])
    tensor = load_file(folder / files[NORM])[NORM]
    change(folder, lambda tensors: tensors.update({NORM: tensor}), other)
    sign(folder)
    first, second = sorted([files[NORM], other])
    assert f"{NORM} is in {first} and in {second}" in verify(folder)


def test_a_missing_tensor_of_many_files_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("shards")
    name = f"{UP}.weight.quant_map"
    files = weight_map(folder)
    change(folder, lambda tensors: tensors.pop(name), files.pop(name))
    edit_json(folder / INDEX, weight_map=files)
    sign(folder)
    assert verify(folder) == [f"{name} is missing"]


def quantization(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", quantization_config=config["quantization_config"] | fields)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: edit_json(folder / "config.json", quantization_config=None), "has no quantization_config"),
        (lambda folder: edit_json(folder / "config.json", quantization_config="nf4"), "cannot read config.json"),
        (lambda folder: edit_json(folder / "config.json", quantization_config={}), "has no quantization_config"),
        (lambda folder: quantization(folder, quant_method="made-up"), "has no quantization_config"),
        (lambda folder: quantization(folder, bnb_4bit_quant_type="nf5"), "unknown 4-bit type nf5"),
        (lambda folder: quantization(folder, bnb_4bit_quant_storage="made-up"), "describes no quantized model"),
        (lambda folder: edit_json(folder / "config.json", architectures=["Made"]), "no architecture Made"),
        (lambda folder: edit_json(folder / "config.json", hidden_size="wide"), "config.json"),
        (lambda folder: edit_json(folder / "config.json", dtype="float16"), "config.json has dtype float16"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_a_config_that_describes_nothing_is_one_line(
    damage: Callable[[Path], object], says: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("nf4")
    damage(folder)
    sign(folder)
    (line,) = verify(folder)
    assert says in line


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, f"{STATE.replace('nf4', 'fp4')} is missing"),
        ({"bnb_4bit_use_double_quant": True}, f"{UP}.weight.nested_absmax is missing"),
        (
            {"bnb_4bit_quant_storage": "bfloat16"},
            f"{UP}.weight is U8 [16384, 1]; by the config it should be BF16 [8192, 1]",
        ),
        (
            {"llm_int8_skip_modules": ["up_proj"]},
            f"{UP}.weight is U8 [16384, 1]; by the config it should be BF16 [256, 128]",
        ),
        ({"load_in_4bit": False, "load_in_8bit": True}, f"{UP}.SCB is missing"),
    ],
)
def test_a_config_of_another_scheme_is_named_tensor_by_tensor(
    fields: dict[str, Any], says: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("nf4")
    quantization(folder, **fields)
    sign(folder)
    assert says in verify(folder)


def test_a_tied_model_lacks_its_embedding_only_where_both_are_missing(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", tie_word_embeddings=True)
    (folder,) = published(source, tmp_path, {"int8": INT8}).values()
    change(folder, lambda tensors: rename(tensors, "model.embed_tokens.weight", "lm_head.weight"))
    sign(folder)
    assert verify(folder) == []
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    sign(folder)
    assert verify(folder) == ["lm_head.weight is missing", "model.embed_tokens.weight is missing"]


def test_an_expert_that_is_gone_or_misshapen_is_named_as_the_file_names_it(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", "mixtral", dtype="bfloat16")
    (folder,) = published(source, tmp_path, {"nf4": NF4}).values()
    experts = sorted(name for name in load_file(folder / "model.safetensors") if ".experts." in name)
    assert experts

    def damage(tensors: Tensors) -> None:
        del tensors[experts[0]]
        tensors[experts[1]] = tensors[experts[1]][1:].clone()

    change(folder, damage)
    sign(folder)
    lines = verify(folder)
    assert len(lines) == 2
    assert lines[0] == f"{experts[0]} is missing"
    assert lines[1].startswith(f"{experts[1]} is BF16")


def test_the_tensors_themselves_are_not_loaded(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fail)
    monkeypatch.setattr(torch.cuda, "is_available", fail)
    assert verify(originals["nf4"]) == []
