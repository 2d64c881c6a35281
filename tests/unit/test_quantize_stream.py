"""How the streaming writer behaves beside the bytes that it writes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
import transformers

from models_db.domain import DType, Method, Scheme
from tests.reference import load_quantized
from tests.tiny import make_causal
from worker.digest import digest_file
from worker.quantize import Target, Written, write_checkpoints

NF4 = Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16)
NF4_DOUBLE = Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16, double_quant=True)
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


def test_progress_rises_to_the_total(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    targets = targets_in(tmp_path, NF4_DOUBLE, INT8)
    list(
        write_checkpoints(
            source, targets, dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *now: seen.append(now)
        )
    )
    assert seen == sorted(seen)
    read, written, total = seen[-1]
    assert read + written == total
    weights = sum((target.folder / "model.safetensors").stat().st_size for target in targets)
    assert written == weights


def test_whoever_watches_can_stop_it(source: Path, tmp_path: Path) -> None:
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


def test_a_model_whose_converted_weights_are_quantized_is_built_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.NomicBertConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    source = tmp_path / "source"
    transformers.NomicBertModel(config).to(torch.bfloat16).save_pretrained(source)

    for result in write(source, targets_in(tmp_path, NF4, INT8)):
        assert result.writer == "whole"
        assert "q_proj" in result.audit["whole_model_because"]
        assert result.audit["quantized_fraction"] > 0.8
        reloaded = transformers.NomicBertModel.from_pretrained(result.target.folder).state_dict()
        expected = load_quantized(source, result.target.scheme, DType.BFLOAT16).state_dict()
        assert reloaded.keys() == expected.keys()
        assert all(torch.equal(reloaded[name], expected[name]) for name in expected)
