"""A model that cannot be quantized is refused with a clear message, and other targets are not affected."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.errors import (
    CudaOom,
    DeviceError,
    DiskFull,
    HostOom,
    InternalError,
    JobError,
    QuantizationError,
    SourceCorrupt,
    SourceNotFound,
    StorageError,
    UnsafeSource,
    Unsupported,
)
from qbatch.worker.quantizing import Progress, Refused, Target, Written, write_checkpoints
from qbatch.worker.quantizing.faults import as_job_error
from tests.schemes import with_options
from tests.shrunk import make, shrunk_config
from tests.tiny import make_causal, make_fused_qkv, make_llama4, make_overwritten

NF4 = Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16)
INT8 = Scheme(method=Method.INT8, compute_dtype=DType.BFLOAT16)
BNB = (Method.NF4, Method.FP4, Method.INT8)
DOUBLE = with_options(NF4, double_quant=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_causal(tmp_path / "source", dtype="bfloat16")


def write(
    source: Path, folder: Path, *schemes: Scheme, on_progress: Progress = lambda *_: None
) -> list[Written | Refused]:
    targets = []
    for scheme in schemes:
        (folder / scheme.method.value).mkdir()
        targets.append(Target(scheme=scheme, folder=folder / scheme.method.value))
    return list(write_checkpoints(source, targets, dtype=DType.BFLOAT16, device="cpu", on_progress=on_progress))


def edit_tensors(source: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def edit_config(source: Path, **fields: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | fields))


def assert_all_refused(results: list[Written | Refused], kind: type[JobError], *words: str) -> None:
    assert results
    for result in results:
        assert isinstance(result, Refused), result
        assert type(result.error) is kind, result.error
        for word in words:
            assert word in str(result.error)
        assert "\n" not in str(result.error)
        assert not list(result.target.folder.iterdir())


def test_a_missing_key_is_named(source: Path, tmp_path: Path) -> None:
    edit_tensors(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert_all_refused(write(source, tmp_path, NF4, INT8), SourceCorrupt, "model.layers.1.mlp.up_proj.weight")


def test_a_missing_unquantized_key_is_named(source: Path, tmp_path: Path) -> None:
    edit_tensors(source, lambda tensors: tensors.pop("model.norm.weight"))
    assert_all_refused(write(source, tmp_path, NF4), SourceCorrupt, "model.norm.weight")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_wrong_shape_is_named(name: str, source: Path, tmp_path: Path) -> None:
    edit_tensors(source, lambda tensors: tensors.update({name: tensors[name][:64].clone()}))
    assert_all_refused(write(source, tmp_path, NF4, INT8), SourceCorrupt, name)


def test_a_truncated_file(source: Path, tmp_path: Path) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_all_refused(write(source, tmp_path, NF4, INT8), SourceCorrupt, "model.safetensors")


def test_a_header_that_lies(source: Path, tmp_path: Path) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes((2**40).to_bytes(8, "little") + weights.read_bytes()[8:])
    assert_all_refused(write(source, tmp_path, NF4), SourceCorrupt, "model.safetensors")


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", max_shard_size="100KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    assert_all_refused(write(source, tmp_path, NF4), SourceCorrupt, shard.name)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", max_shard_size="100KB")
    first, second = sorted(source.glob("*.safetensors"))[:2]
    twice = next(iter(load_file(first)))
    save_file(load_file(second) | {twice: load_file(first)[twice]}, second, metadata={"format": "pt"})
    assert_all_refused(write(source, tmp_path, NF4), SourceCorrupt, twice)


def test_pickles_alone(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert_all_refused(write(source, tmp_path, NF4, INT8), UnsafeSource, "pickles")


def test_no_config(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    assert_all_refused(write(source, tmp_path, NF4), SourceNotFound, "config.json")


def test_an_unknown_quantization_method(source: Path, tmp_path: Path) -> None:
    edit_config(source, quantization_config={"quant_method": "made-up"})
    assert_all_refused(write(source, tmp_path, NF4), Unsupported, "made-up")


def test_a_checkpoint_of_our_own(source: Path, tmp_path: Path) -> None:
    (first,) = write(source, tmp_path, NF4)
    assert isinstance(first, Written)
    (tmp_path / "again").mkdir()
    assert_all_refused(write(first.target.folder, tmp_path / "again", NF4), Unsupported, "bitsandbytes")


def test_quantized_tensors_that_no_config_speaks_of(source: Path, tmp_path: Path) -> None:
    edit_tensors(source, lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}))
    assert_all_refused(write(source, tmp_path, NF4), Unsupported, "weight_scale")


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32], ids=["float8", "int8", "uint8", "int32"]
)
def test_weights_that_are_codes(dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(source, lambda tensors: tensors.update({name: tensors[name].float().to(dtype)}))
    assert_all_refused(write(source, tmp_path, NF4, INT8), Unsupported, "already quantized", name)


@pytest.mark.parametrize("suffix", ["absmax", "quant_map"])
def test_quantization_states_that_no_config_speaks_of(suffix: str, source: Path, tmp_path: Path) -> None:
    name = f"model.layers.0.mlp.up_proj.weight.{suffix}"
    edit_tensors(source, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert_all_refused(write(source, tmp_path, NF4), Unsupported, "already quantized", name)


def test_a_part_of_a_model_that_is_quantized(source: Path, tmp_path: Path) -> None:
    edit_config(source, text_config={"quantization_config": {"quant_method": "gptq"}})
    edit_tensors(source, lambda tensors: tensors.update({"vision.proj.qweight": torch.ones(8, 8, dtype=torch.int32)}))
    assert_all_refused(write(source, tmp_path, NF4), Unsupported, "already quantized", "gptq")


def test_modules_that_transformers_would_replace_by_fused_ones(source: Path, tmp_path: Path) -> None:
    edit_config(source, fusion_config={"patch_embeddings": True})
    assert_all_refused(write(source, tmp_path, NF4), Unsupported, "fusion_config")


def test_a_key_that_a_model_built_whole_needs_is_named_before_it_is_built(tmp_path: Path) -> None:
    source = make_fused_qkv(tmp_path / "source", dtype="bfloat16")
    edit_tensors(source, lambda tensors: tensors.pop("encoder.layers.1.mlp.fc2.weight"))
    seen: list[int] = []
    (tmp_path / "out").mkdir()
    (refused,) = write_checkpoints(
        source,
        [Target(scheme=NF4, folder=tmp_path / "out")],
        dtype=DType.BFLOAT16,
        device="cpu",
        on_progress=lambda *_: seen.append(1),
    )
    assert_all_refused([refused], SourceCorrupt, "layers.1.mlp.down_proj.weight")
    assert not seen


def test_a_config_with_values_of_the_wrong_type(source: Path, tmp_path: Path) -> None:
    edit_config(source, hidden_size="wide")
    assert_all_refused(write(source, tmp_path, NF4), SourceCorrupt, "hidden_size")


@pytest.mark.parametrize("fields", [{"dtype": [1]}, {"num_attention_heads": 0}], ids=lambda fields: next(iter(fields)))
def test_a_config_that_transformers_stumbles_over(fields: dict[str, object], source: Path, tmp_path: Path) -> None:
    edit_config(source, **fields)
    assert_all_refused(write(source, tmp_path, NF4), SourceCorrupt, "config.json")


@pytest.mark.parametrize(
    "fields",
    [{"hidden_act": "made-up"}, {"pad_token_id": 10**6}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_config_that_transformers_cannot_build_is_no_defect_of_ours(
    fields: dict[str, object], source: Path, tmp_path: Path
) -> None:
    edit_config(source, **fields)
    assert_all_refused(write(source, tmp_path, NF4), Unsupported, "cannot build LlamaForCausalLM")


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", max_shard_size="100KB")
    (before,) = write(source, tmp_path, NF4)
    (source / "consolidated.safetensors").write_bytes(b"no header at all")
    (source / "model-00099-of-00099.safetensors").symlink_to("nowhere")
    (tmp_path / "again").mkdir()
    (after,) = write(source, tmp_path / "again", NF4)
    assert isinstance(before, Written)
    assert isinstance(after, Written)
    assert after.files == before.files


def test_an_architecture_that_transformers_lacks(source: Path, tmp_path: Path) -> None:
    edit_config(source, architectures=["NoSuchForMaskedLM"])
    assert_all_refused(write(source, tmp_path, NF4), Unsupported, "NoSuchForMaskedLM")


def test_experts_that_transformers_replaces_when_it_loads_them_quantized(tmp_path: Path) -> None:
    source = make_llama4(tmp_path / "source", dtype="bfloat16")
    assert_all_refused(write(source, tmp_path, NF4, INT8), Unsupported, "Llama4TextExperts")


def test_the_same_architecture_without_such_experts(tmp_path: Path) -> None:
    source = make_llama4(tmp_path / "source", experts=False, dtype="bfloat16")
    assert all(isinstance(result, Written) for result in write(source, tmp_path, NF4, INT8))


def test_a_model_type_that_transformers_lacks(source: Path, tmp_path: Path) -> None:
    edit_config(source, model_type="no-such-type")
    assert_all_refused(write(source, tmp_path, NF4), Unsupported, "no-such-type")


def test_a_model_that_brings_its_own_code(source: Path, tmp_path: Path) -> None:
    edit_config(source, model_type="its-own", auto_map={"AutoConfig": "configuration.Configuration"})
    (source / "configuration.py").write_text("raise SystemExit('its code ran')")
    assert_all_refused(write(source, tmp_path, NF4), UnsafeSource, "code of its own")


def test_one_targets_failure_leaves_the_other_alone(source: Path, tmp_path: Path) -> None:
    for name in ("taken", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "taken" / "model.safetensors").touch()
    targets = [Target(scheme=NF4, folder=tmp_path / "taken"), Target(scheme=INT8, folder=tmp_path / "good")]
    results = list(write_checkpoints(source, targets, dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None))
    by_target = {result.target: result for result in results}
    refused, written = (by_target[target] for target in targets)
    assert isinstance(refused, Refused)
    assert type(refused.error) is StorageError
    assert isinstance(written, Written)
    assert len(load_file(tmp_path / "good" / "model.safetensors")) > 20


def test_a_target_that_cannot_open_all_of_its_files_keeps_none_open(source: Path, tmp_path: Path) -> None:
    """What is deleted while it is open still takes its room, perhaps on the very storage that is full."""
    scheme = replace(NF4, max_shard_bytes=100_000)
    for name in ("whole", "taken"):
        (tmp_path / name).mkdir()
    (written,) = write(source, tmp_path / "whole", scheme)
    last = max(written.target.folder.glob("*.safetensors")).name
    taken = tmp_path / "taken"
    (taken / last).touch()
    (refused,) = write_checkpoints(
        source, [Target(scheme=scheme, folder=taken)], dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None
    )
    assert isinstance(refused, Refused)
    assert type(refused.error) is StorageError
    assert len(list(taken.iterdir())) > 2
    links = Path("/proc/self/fd").iterdir()
    assert not [link for link in links if link.is_symlink() and link.readlink().is_relative_to(taken)]


def test_a_target_that_outgrows_its_storage_fails_alone(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (520_000, before[1]))
    try:
        results = write(source, tmp_path, NF4, INT8, on_progress=lambda *now: seen.append(now))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    smaller, larger = sorted(results, key=lambda result: result.target.scheme.method is Method.INT8)
    assert isinstance(smaller, Written)
    assert sum(digest.size for digest in smaller.files) < 520_000
    assert isinstance(larger, Refused)
    assert type(larger.error) is StorageError
    read, wrote, total = seen[-1]
    assert read + wrote == total, "nothing of the target that failed is waited for"
    assert all(read + wrote <= total for read, wrote, total in seen)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFull),
        (OSError(errno.EIO, "Input/output error"), StorageError),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), HostOom),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), CudaOom),
        (RuntimeError("CUDA error: out of memory"), CudaOom),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), DeviceError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), CudaOom),
        (RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu!"), QuantizationError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), HostOom),
        (MemoryError(), HostOom),
        (RuntimeError("shape mismatch"), QuantizationError),
        (KeyError("x"), InternalError),
        (SourceCorrupt("as it is"), SourceCorrupt),
    ],
)
def test_errors_of_other_libraries_become_job_errors(error: Exception, kind: type[JobError]) -> None:
    translated = as_job_error(error)
    assert type(translated) is kind
    assert "\n" not in str(translated)


def test_a_generation_config_that_makes_no_sense_is_named(source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").write_text(json.dumps({"num_return_sequences": 3}))
    assert_all_refused(write(source, tmp_path, NF4, INT8), SourceCorrupt, "generation_config.json: ", "sequences")


@pytest.mark.parametrize("make", [make_causal, partial(make_overwritten, arch="youtu")], ids=["stream", "whole"])
def test_room_is_judged_before_anything_is_read(make: Callable[..., Path], tmp_path: Path) -> None:
    source = make(tmp_path / "model", dtype="bfloat16")
    read: list[int] = []
    (tmp_path / "nf4").mkdir()
    free = shutil.disk_usage(tmp_path).free
    target = Target(scheme=DOUBLE, folder=tmp_path / "nf4", beside_bytes=free)
    (refused,) = write_checkpoints(
        source, [target], dtype=DType.BFLOAT16, device="cpu", on_progress=lambda done, *_: read.append(done)
    )
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, DiskFull)
    assert refused.error.needed_bytes is not None
    assert refused.error.needed_bytes > free
    assert sum(read) == 0


def test_a_target_is_told_that_the_room_is_promised_to_another(source: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    beside = shutil.disk_usage(tmp_path).free * 2 // 3
    targets = [Target(scheme=NF4, folder=tmp_path / name, beside_bytes=beside) for name in ("first", "second")]
    refused, written = write_checkpoints(
        source, targets, dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None
    )
    assert isinstance(written, Written)
    assert isinstance(refused, Refused)
    assert refused.target is targets[1]
    assert isinstance(refused.error, DiskFull)


@pytest.mark.parametrize("made", [make_causal, make_fused_qkv], ids=["streamed", "whole"])
def test_skips_that_cover_every_layer_are_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    source = made(tmp_path / "everything", dtype="bfloat16")
    schemes = [Scheme(method=method, compute_dtype=DType.BFLOAT16) for method in BNB]
    results = write(source, tmp_path, *(replace(scheme, skip_modules=(".*layers",)) for scheme in schemes))
    assert [str(result.error).partition(" ")[0] for result in results if isinstance(result, Refused)] == [*BNB]
    assert_all_refused(results, Unsupported, "quantizes no layer of ", "stays as it is: skipped on request (")


def test_layers_of_a_class_that_the_method_leaves_are_refused(tmp_path: Path) -> None:
    """bitsandbytes replaces layers whose class is exactly torch's, which none of Falcon's is."""
    source = tmp_path / "falcon"
    make(transformers.FalconForCausalLM, shrunk_config("falcon")).to(torch.bfloat16).save_pretrained(source)
    results = write(source, tmp_path, NF4, INT8)
    said = (
        "no layer of FalconForCausalLM; why each linear layer stays as it is: a FalconLinear, which the method leaves"
    )
    assert_all_refused(results, Unsupported, said)


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    """Its backbone and its head are convolutions."""
    source = tmp_path / "upernet"
    make(transformers.UperNetForSemanticSegmentation, shrunk_config("upernet")).to(torch.bfloat16).save_pretrained(
        source
    )
    said = "bnb-nf4 quantizes no layer of UperNetForSemanticSegmentation; it has no linear layer"
    assert_all_refused(write(source, tmp_path, NF4), Unsupported, said)
