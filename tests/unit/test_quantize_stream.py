"""The streaming writer apart from the bytes that it writes: progress, memory, failures, cancellation."""

from __future__ import annotations

import os
import shutil
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qbatch.core.digest import digest_file
from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.errors import StorageError, Unsupported
from qbatch.worker.quantizing import Refused, Target, Written, write_checkpoints
from qbatch.worker.quantizing.streaming.workspace_pool import WorkspacePool
from tests.plain_reference import load_quantized
from tests.tiny import make_causal, make_fused_qkv

NF4 = Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16)
NF4_DOUBLE = Scheme.of(Method.NF4, compute_dtype=DType.BFLOAT16, double_quant=True)
INT8 = Scheme(method=Method.INT8, compute_dtype=DType.BFLOAT16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_causal(tmp_path / "source", dtype="bfloat16")


def targets_in(folder: Path, *schemes: Scheme) -> list[Target]:
    targets = [Target(scheme=scheme, folder=folder / str(number)) for number, scheme in enumerate(schemes)]
    for target in targets:
        target.folder.mkdir()
    return targets


def write(source: Path, targets: list[Target]) -> list[Written]:
    results = list(write_checkpoints(source, targets, dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None))
    assert all(isinstance(result, Written) for result in results), results
    return [result for result in results if isinstance(result, Written)]


def test_the_checksums_are_those_of_the_files(source: Path, tmp_path: Path) -> None:
    for result in write(source, targets_in(tmp_path, NF4, NF4_DOUBLE, INT8)):
        on_disk = sorted((digest_file(path) for path in result.target.folder.iterdir()), key=lambda one: one.name)
        assert list(result.files) == on_disk


def test_files_have_the_mode_of_the_umask(source: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        (result,) = write(source, targets_in(tmp_path, NF4))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in result.target.folder.iterdir()} == {0o640}


@pytest.mark.parametrize("schemes", [(NF4, INT8), (NF4_DOUBLE, INT8)], ids=["single", "double"])
def test_every_tensor_is_read_once_and_progress_rises_to_the_total(
    source: Path, tmp_path: Path, schemes: tuple[Scheme, ...]
) -> None:
    targets = targets_in(tmp_path, *schemes)
    seen = progress(source, targets)
    assert seen == sorted(seen)
    read, written, total = seen[-1]
    tensors = load_file(source / "model.safetensors")
    # Double quantization reads what it quantizes once more: its means come first.
    twice = [name for name in tensors if "_proj" in name] if NF4_DOUBLE in schemes else []
    assert read == sum(tensor.nbytes for tensor in tensors.values()) + sum(tensors[name].nbytes for name in twice)
    assert written == sum((target.folder / "model.safetensors").stat().st_size for target in targets)
    assert read + written == total
    assert all(now == seen[-1] for now in seen if now[0] + now[1] == now[2]), "it was done before the end"


def test_of_a_tied_pair_that_is_stored_twice_each_value_is_compared_once(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    targets = targets_in(tmp_path, NF4, INT8)
    seen = progress(source, targets)
    table = tensors["lm_head.weight"].nbytes
    assert seen[-1][0] == sum(tensor.nbytes for tensor in tensors.values()) + table
    assert all(now == seen[-1] for now in seen if now[0] + now[1] == now[2])


def test_progress_is_reported_a_few_times_per_second() -> None:
    told: list[None] = []
    assert WorkspacePool("cpu").run([lambda _workspace: time.sleep(2)], lambda: told.append(None)) is None
    assert len(told) >= 4


def progress(source: Path, targets: list[Target]) -> list[tuple[int, int, int]]:
    seen: list[tuple[int, int, int]] = []
    for _ in write_checkpoints(
        source, targets, dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *now: seen.append(now)
    ):
        pass
    return seen


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    source = make_causal(
        tmp_path / "wide",
        dtype="bfloat16",
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=8,
        num_hidden_layers=6,
    )
    targets = targets_in(tmp_path, NF4_DOUBLE, INT8)
    write(source, targets)
    for target in targets:
        shutil.rmtree(target.folder)
        target.folder.mkdir()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    write(source, targets)
    grown = resident_bytes("VmHWM") - before
    source_bytes = (source / "model.safetensors").stat().st_size
    assert source_bytes > 180e6
    assert grown < source_bytes / 4


def resident_bytes(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def test_the_progress_callback_can_stop_the_writer(source: Path, tmp_path: Path) -> None:
    class CancelledError(Exception):
        pass

    def cancel(*_: int) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        list(
            write_checkpoints(source, targets_in(tmp_path, NF4), dtype=DType.BFLOAT16, device="cpu", on_progress=cancel)
        )


def test_nothing_is_printed_or_logged(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    capfd.readouterr()
    write(source, targets_in(tmp_path, NF4, INT8))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_bundle_gives_what_each_would_give_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "together").mkdir()
    together = write(source, targets_in(tmp_path / "together", NF4, NF4_DOUBLE, INT8))
    for number, scheme in enumerate((NF4, NF4_DOUBLE, INT8)):
        (tmp_path / f"alone-{number}").mkdir()
        (alone,) = write(source, targets_in(tmp_path / f"alone-{number}", scheme))
        assert alone.files == together[number].files


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    return make_fused_qkv(tmp_path / "fused", dtype="bfloat16")


def test_a_model_whose_converted_weights_are_quantized_is_built_whole(fused: Path, tmp_path: Path) -> None:
    source = fused
    for result in write(source, targets_in(tmp_path, NF4, NF4_DOUBLE, INT8)):
        assert result.writer == "whole"
        assert "q_proj" in result.audit["whole_model_because"]
        assert result.audit["quantized_fraction"] > 0.8
        reloaded = transformers.NomicBertModel.from_pretrained(result.target.folder).state_dict()
        expected = load_quantized(source, result.target.scheme, DType.BFLOAT16).state_dict()
        assert reloaded.keys() == expected.keys()
        assert all(torch.equal(reloaded[name], expected[name]) for name in expected)


def test_a_whole_models_checksums_are_those_of_its_files(fused: Path, tmp_path: Path) -> None:
    schemes = (replace(NF4, max_shard_bytes=100_000), INT8)
    for result in write(fused, targets_in(tmp_path, *schemes)):
        on_disk = sorted((digest_file(path) for path in result.target.folder.iterdir()), key=lambda one: one.name)
        assert list(result.files) == on_disk


def test_a_whole_models_progress_rises_to_the_total(fused: Path, tmp_path: Path) -> None:
    """Once for each target the source is read, and once more for the errors; embeddings and norms have none."""
    targets = targets_in(tmp_path, NF4, INT8)
    seen = progress(fused, targets)
    assert seen == sorted(seen)
    assert all(read + written <= total for read, written, total in seen)
    read, written, total = seen[-1]
    assert read + written == total
    assert written == sum((target.folder / "model.safetensors").stat().st_size for target in targets)
    source_bytes = (fused / "model.safetensors").stat().st_size
    assert 3 * source_bytes < read < 4 * source_bytes


def test_a_whole_model_can_be_stopped_while_it_is_read(fused: Path, tmp_path: Path) -> None:
    class CancelledError(Exception):
        pass

    def cancel(*_: int) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        list(
            write_checkpoints(fused, targets_in(tmp_path, NF4), dtype=DType.BFLOAT16, device="cpu", on_progress=cancel)
        )


def test_a_whole_models_failure_leaves_the_next_target_alone(fused: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    targets = targets_in(tmp_path, NF4, INT8)
    targets[0].folder.rmdir()
    targets[0].folder.write_text("no folder")
    refused, written = write_checkpoints(
        fused, targets, dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *now: seen.append(now)
    )
    assert isinstance(refused, Refused)
    assert type(refused.error) is StorageError
    assert isinstance(written, Written)
    read, wrote, total = seen[-1]
    assert read + wrote == total


def test_skipping_one_of_several_weights_fused_in_the_source_is_refused(fused: Path, tmp_path: Path) -> None:
    """transformers would leave all of them as they are, and load none of them."""
    some, all_ = ("q_proj",), ("q_proj", "k_proj", "v_proj")
    targets = targets_in(tmp_path, replace(NF4, skip_modules=some), replace(NF4, skip_modules=all_))
    by_target = {
        result.target.folder: result
        for result in write_checkpoints(fused, targets, dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None)
    }
    refused, written = (by_target[target.folder] for target in targets)
    assert isinstance(refused, Refused)
    assert type(refused.error) is Unsupported
    assert "k_proj" in str(refused.error)
    assert isinstance(written, Written)
    assert written.writer == "stream"
