"""torchao through the seam: its own files bit for bit, loaded through plain ``from_pretrained``, and counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from qbatch.core.domain import DeviceKind, DType, Method, Scheme
from qbatch.core.errors import Unsupported, UsageError
from qbatch.core.inspection import inspect_source
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.sources import parse_source, read_header
from qbatch.scheduler.job_grid import Grid
from qbatch.views.audit_text import unmarked_warnings
from qbatch.worker.measuring.speed.size import measure_size
from qbatch.worker.measuring.why.traffic import step_work
from qbatch.worker.models.load import load
from qbatch.worker.quantizing import Refused, Target, Written, write_checkpoints
from tests.schemes import with_options
from tests.tiny import make_causal, make_encoder, make_fused_qkv, make_seq2seq
from tests.torchao_reference import contents, reference
from tests.unit.measured_rows import result

DYNAMIC = Scheme(method=Method.TORCHAO_INT8_DYNAMIC, compute_dtype=DType.BFLOAT16)
INT8 = Scheme(method=Method.TORCHAO_INT8, compute_dtype=DType.BFLOAT16)
INT4 = Scheme(method=Method.TORCHAO_INT4, compute_dtype=DType.BFLOAT16)
BOTH = pytest.mark.parametrize("scheme", [DYNAMIC, INT8], ids=lambda scheme: scheme.method)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal(tmp_path_factory.mktemp("source") / "llama", dtype="bfloat16")


def written(source: Path, folder: Path, *schemes: Scheme, dtype: DType = DType.BFLOAT16) -> list[Written | Refused]:
    targets = [Target(scheme=scheme, folder=folder / str(number)) for number, scheme in enumerate(schemes)]
    for target in targets:
        target.folder.mkdir(parents=True)
    return list(write_checkpoints(source, targets, dtype=dtype, device="cpu", on_progress=lambda *_: None))


def sound(source: Path, folder: Path, scheme: Scheme, dtype: DType = DType.BFLOAT16) -> Written:
    (outcome,) = written(source, folder, scheme, dtype=dtype)
    assert isinstance(outcome, Written), outcome
    return outcome


def models(folder: Path) -> Iterator[Path]:
    yield make_causal(folder / "llama", dtype="bfloat16")
    yield make_causal(folder / "tied", dtype="float32", tie_word_embeddings=True)
    yield make_causal(folder / "sharded", "mistral", dtype="float16", max_shard_size="300KB")
    yield make_causal(folder / "mixture", "mixtral", dtype="bfloat16")
    yield make_causal(folder / "opt", "opt", dtype="bfloat16")
    yield make_gpt2_tagger(folder / "gpt2")
    yield make_encoder(folder / "bert", "classification")
    yield make_seq2seq(folder / "t5")


def make_gpt2_tagger(folder: Path) -> Path:
    """GPT-2 with a head for tokens: a linear layer of torch's own, in a model of transformers' Conv1D."""
    config = transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=64, n_positions=64, num_labels=8)
    torch.manual_seed(0)
    transformers.GPT2ForTokenClassification(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.slow
@BOTH
def test_the_files_are_torchaos_own_bit_for_bit(scheme: Scheme, tmp_path: Path) -> None:
    for source in models(tmp_path):
        for dtype in (DType.BFLOAT16, DType.FLOAT32):
            place = tmp_path / f"{source.name} {dtype}"
            ours = sound(source, place, scheme, dtype).target.folder
            theirs = reference(source, place / "reference", scheme, dtype)
            assert contents(ours) == contents(theirs), place.name


@BOTH
def test_shards_and_skipped_layers_are_torchaos_own_too(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    scheme = replace(scheme, max_shard_bytes=200_000, skip_modules=("down_proj",))
    ours = sound(source, tmp_path, scheme).target.folder
    skips = ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    theirs = reference(source, tmp_path / "reference", scheme, DType.BFLOAT16, skips)
    assert contents(ours) == contents(theirs)
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert "model.layers.1.mlp.down_proj.weight" in index["weight_map"], "the end of a name skips it, as everywhere"
    assert (ours / "model.safetensors.index.json").is_file()


@BOTH
def test_a_checkpoint_has_the_same_bytes_at_every_run(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    """safetensors leaves the order of its metadata to chance."""
    first, second = (sound(source, tmp_path / name, scheme) for name in "ab")
    assert first.files == second.files


@BOTH
def test_plain_from_pretrained_gives_the_bits_that_were_quantized(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        sound(source, tmp_path, scheme).target.folder, dtype=torch.bfloat16
    )
    again = load(reference(source, tmp_path / "reference", scheme, DType.BFLOAT16), dtype=DType.BFLOAT16, device="cpu")
    ids = torch.arange(24).view(1, -1)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, again.model(ids).logits)


@BOTH
def test_what_was_loaded_is_counted_by_what_it_holds(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    outcome = sound(source, tmp_path, scheme)
    folder = outcome.target.folder
    model = load(folder, dtype=DType.BFLOAT16, device="cpu").model
    size, base = measure_size(model), measure_size(load(source, dtype=DType.BFLOAT16, device="cpu").model)
    on_disk = sum(tensor.nbytes for tensor in read_header(folder / "model.safetensors").tensors)
    assert size.num_parameters == base.num_parameters == outcome.audit["num_parameters"]
    assert size.quantized_parameters == outcome.audit["quantized_parameters"] > 0
    assert size.weights_bytes == on_disk == outcome.audit["weights_bytes"]
    assert size.memory_footprint_bytes == size.weights_bytes - size.quant_state_bytes + size.buffer_bytes
    assert size.memory_footprint_bytes < model.get_memory_footprint(), "transformers takes its weights for 16-bit ones"
    embedding = model.get_input_embeddings().weight
    work = step_work(model, None, batch_size=1)
    assert work.weight_bytes == size.weights_bytes - embedding.nbytes
    assert work.flops == 2.0 * (size.num_parameters - embedding.numel())


@BOTH
def test_the_audit_says_how_far_off_the_weights_are(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    audit = sound(source, tmp_path, scheme).audit
    assert 0.001 < audit["relative_error_mean"] < 0.02, "8 bits a row"
    assert len(audit["relative_error_worst"]) == 14
    assert audit["not_finite"] == []
    assert {entry["reason"] for entry in audit["kept"]} == {"not a linear layer", "output layer or tied"}
    assert "int8_zero_scales" not in audit, "that is LLM.int8's"
    assert audit["whole_model_because"] == "torchao quantizes the layers of a model"


@BOTH
def test_a_model_of_layers_that_torchao_leaves_is_refused(scheme: Scheme, tmp_path: Path) -> None:
    """It converts torch's own linear layers only: the checkpoint would be the source under the method's name."""
    (outcome,) = written(make_causal(tmp_path / "gpt2", "gpt2", dtype="bfloat16"), tmp_path / "out", scheme)
    assert isinstance(outcome, Refused), outcome
    assert isinstance(outcome.error, Unsupported)
    assert str(outcome.error) == (
        f"{scheme.method} quantizes no layer of GPT2LMHeadModel; why each linear layer stays as it is: a Conv1D, which "
        "the method leaves as it is (8); output layer or tied (1)"
    )
    assert not list(outcome.target.folder.iterdir())


@BOTH
def test_only_layers_that_a_pattern_matches_were_asked_for(scheme: Scheme, tmp_path: Path) -> None:
    source = make_gpt2_tagger(tmp_path / "gpt2")
    audit = sound(source, tmp_path / "out", replace(scheme, skip_modules=("c_attn",))).audit
    left = "a Conv1D, which the method leaves as it is"
    assert {entry["name"]: entry["reason"] for entry in audit["kept"]} == {
        "transformer.h.*.attn.c_attn.weight": "skipped on request",
        "transformer.h.*.attn.c_proj.weight": left,
        "transformer.h.*.mlp.c_fc.weight": left,
        "transformer.h.*.mlp.c_proj.weight": left,
    }
    assert audit["quantized_parameters"] == 8 * 128
    counted = {name: audit[name] for name in ("num_parameters", "quantized_fraction")}
    row = ResultRow.from_json(result(2, scheme.method, bits=8, details={"audit": audit}, **counted))
    assert any("% of its parameters are stored in 8 bits" in warning for warning in unmarked_warnings(row))


def test_inspection_reads_what_it_is(source: Path, tmp_path: Path) -> None:
    folder = sound(source, tmp_path, DYNAMIC).target.folder
    seen, plain = (inspect_source(parse_source(str(place))) for place in (folder, source))
    assert seen["quantization"] == "torchao Int8DynamicActivationInt8WeightConfig"
    assert seen["num_parameters"] == plain["num_parameters"]


@BOTH
def test_what_would_not_load_again_is_refused(scheme: Scheme, tmp_path: Path) -> None:
    """torchao's own checkpoint of it does not load, nor transformers' quantization of weights cut from one tensor."""
    for source, reason in (
        (make_seq2seq(tmp_path / "bart", "bart"), "final_logits_bias, which belongs to no module"),
        (make_fused_qkv(tmp_path / "fused"), "transformers loses layers.0.self_attn.k_proj.weight while it quantizes"),
    ):
        (outcome,) = written(source, tmp_path / f"{source.name} out", scheme)
        assert isinstance(outcome, Refused)
        assert isinstance(outcome.error, Unsupported), outcome.error
        assert reason in str(outcome.error)


def test_int4_is_refused_on_a_cpu(source: Path, tmp_path: Path) -> None:
    (outcome,) = written(source, tmp_path, INT4)
    assert isinstance(outcome, Refused)
    assert isinstance(outcome.error, Unsupported)
    assert str(outcome.error) == "torchao-int4 does not work on cpu"
    with pytest.raises(UsageError, match="torchao-int4 does not work on cpu; use --device cuda"):
        Grid(methods=(Method.TORCHAO_INT4,), device=DeviceKind.CPU)


def test_int4_is_for_bfloat16_and_for_groups_that_its_kernel_knows() -> None:
    with pytest.raises(UsageError, match="torchao-int4 does not work with float16; use --dtype bfloat16"):
        Grid(methods=(Method.TORCHAO_INT4,), dtype=DType.FLOAT16)
    with pytest.raises(UsageError, match="32, 64, 128, 256, not 48"):
        Grid(methods=(Method.TORCHAO_INT4,), options={"group_size": 48}).schemes()
    with pytest.raises(UsageError, match="a group size applies only to torchao-int4"):
        Grid(methods=(Method.TORCHAO_INT8,), options={"group_size": 64})


@pytest.mark.parametrize(
    ("shape", "group_size", "parts"),
    [
        ((4096, 14336), 128, {"qdata": (512, 112, 32, 4), "scale_and_zero": (112, 4096, 2)}),
        ((100, 1056), 32, {"qdata": (13, 16, 32, 4), "scale_and_zero": (64, 104, 2)}),
    ],
)
def test_int4_is_planned_with_what_its_layout_fills_up(
    shape: tuple[int, int], group_size: int, parts: Mapping[str, tuple[int, ...]]
) -> None:
    from qbatch.worker.methods.implementations import weights_of

    scheme = with_options(INT4, group_size=group_size)
    packing = weights_of(scheme.description).packing(scheme)
    found = packing.part_shapes(*shape)
    assert {key: sizes for key, (_, sizes) in found.items()} == parts
    nbytes = sum(torch.Size(sizes).numel() * dtype.itemsize for dtype, sizes in found.values())
    assert scheme.description.loaded_bytes(*shape, scheme.options) == nbytes
    assert packing.why_skipped(100, 1000) is not None


def test_the_metadata_of_a_file_says_what_each_weight_is(source: Path, tmp_path: Path) -> None:
    path = sound(source, tmp_path, INT8).target.folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert list(metadata) or metadata
    assert json.loads(metadata["model.layers.0.mlp.up_proj.weight"])["_type"] == "Int8Tensor"
