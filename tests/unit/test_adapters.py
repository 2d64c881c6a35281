"""Adapters that win back what quantizing took: as PEFT loads them, against the weights themselves, and by their KL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qbatch.core.adapter_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.errors import BenchmarkError, Unsupported
from qbatch.core.recovery import Recovery, RecoveryKind
from qbatch.worker.checkpoints.sidecars import copy_sidecars
from qbatch.worker.measuring.quality.divergence import divergence
from qbatch.worker.measuring.quality.replay import logits_of
from qbatch.worker.models.load import load
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from qbatch.worker.recovering.input_moments import input_moments
from qbatch.worker.recovering.svd_recovery import RecoveryWork, recover_by_factors
from qbatch.worker.recovering.weight_differences import WeightDifferences
from qbatch.worker.searching import DEFAULT_SEARCH_TEXT
from tests import tiny
from tests.unit.test_sensitivity import probes

pytestmark = pytest.mark.slow

TEXT = DEFAULT_SEARCH_TEXT.read_text(encoding="utf-8")
SVD = Recovery(kind=RecoveryKind.SVD, rank=8)
ACT = Recovery(kind=RecoveryKind.SVD_ACT, rank=8, text_sha256="0" * 64, window=64, windows=12)


def quantized(source: Path, folder: Path, dtype: DType = DType.FLOAT32, **options: Any) -> Path:
    folder.mkdir()
    target = Target(scheme=Scheme.of(Method.NF4, compute_dtype=dtype, **options), folder=folder, trusted=False)
    (written,) = write_checkpoints(source, [target], dtype=dtype, device="cpu", on_progress=lambda *_: None)
    assert isinstance(written, Written)
    copy_sidecars(source, folder)
    return folder


def recovered(
    source: Path, base: Path, folder: Path, recovery: Recovery, dtype: DType = DType.FLOAT32
) -> dict[str, Any]:
    folder.mkdir()
    work = RecoveryWork(
        source=source,
        base=base,
        recovery=recovery,
        dtype=dtype,
        device="cpu",
        text=None if recovery.text_sha256 is None else TEXT,
    )
    return recover_by_factors(work, folder, lambda _: None)


def factors_in(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def made(trained_source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained model and its checkpoint."""
    return trained_source, quantized(trained_source, tmp_path_factory.mktemp("made") / "nf4")


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
@pytest.mark.parametrize("make", [tiny.make_causal, lambda folder: tiny.make_causal(folder, "gpt2"), tiny.make_seq2seq])
def test_peft_computes_with_the_checkpoints_weights_and_the_product(
    tmp_path: Path, make: Callable[[Path], Path], dtype: DType
) -> None:
    source = make(tmp_path / "source")
    base = quantized(source, tmp_path / "base", dtype)
    recovered(source, base, tmp_path / "adapter", SVD, dtype)
    exact, plain = (load(folder, dtype=dtype, device="cpu").model for folder in (source, base))
    differences = WeightDifferences(exact, plain)
    adapted = load(base, dtype=dtype, device="cpu", adapter=tmp_path / "adapter").model
    factors = factors_in(tmp_path / "adapter")
    assert len(factors) == 2 * len(differences.layers)
    assert type(adapted) is type(plain)
    for name in differences.layers:
        layer = adapted.get_submodule(name)
        stored = [factors[f"base_model.model.{name}.lora_{letter}.weight"].float() for letter in "BA"]
        assert torch.equal(layer.get_delta_weight("default"), stored[0] @ stored[1])
        # The codes are the checkpoint's own.
        assert torch.equal(layer.base_layer.weight, plain.get_submodule(name).weight)
        # And what the product leaves is what a decomposition in float64 leaves, to the precision of the file.
        error = differences.of(name, torch.float64)
        values = torch.linalg.svdvals(error)
        left = torch.linalg.norm(error - (stored[0] @ stored[1]).double())
        expected = torch.linalg.norm(values[8:])
        assert float(left) == pytest.approx(float(expected), rel=1e-5 if dtype is DType.FLOAT32 else 1e-3)


def test_the_moments_are_those_of_what_the_layers_read(made: tuple[Path, Path]) -> None:
    loaded = load(made[1], dtype=DType.FLOAT32, device="cpu")
    given = probes(loaded)
    layers = {name: module for name, module in loaded.model.named_modules() if name.endswith(("q_proj", "k_proj"))}
    read: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, args: read[name].append(args[0].double().flatten(0, -2))

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]
    for probe in given:
        logits_of(loaded.model, probe, "cpu")
    for hook in hooks:
        hook.remove()
    for most_bytes in (1, 2**30):  # a layer at a time, and all at once
        found: dict[str, Any] = {}
        for part in input_moments(loaded.model, layers, given, "cpu", most_bytes=most_bytes):
            found |= part
        assert found.keys() == layers.keys()
        for name, parts in read.items():
            rows = torch.cat(parts)
            torch.testing.assert_close(found[name], rows.T @ rows / len(rows))


def test_the_divergence_falls_and_weighted_factors_are_at_least_as_good(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, base = made
    exact = load(source, dtype=DType.FLOAT32, device="cpu")
    given = probes(exact, 6, 64)
    expected = [logits_of(exact.model, probe, "cpu") for probe in given]

    def kl(adapter: Path | None) -> float:
        loaded = load(base, dtype=DType.FLOAT32, device="cpu", adapter=adapter)
        pairs = zip(expected, given, strict=True)
        return sum(
            float(divergence(logits, logits_of(loaded.model, probe, "cpu"), probe.targets).kl.sum())
            for logits, probe in pairs
        )

    for name, recovery in (("svd", SVD), ("act", ACT)):
        recovered(source, base, tmp_path / name, recovery)
    plain, svd, weighted = kl(None), kl(tmp_path / "svd"), kl(tmp_path / "act")
    assert weighted < svd < plain
    assert weighted < 0.7 * plain


def test_an_adapter_is_the_same_whenever_it_is_made(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, base = made

    def digests(folder: Path) -> list[str]:
        recovered(source, base, folder, ACT)
        return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]

    before = sorted((path.name, path.read_bytes()) for path in base.iterdir())
    assert digests(tmp_path / "one") == digests(tmp_path / "other")
    assert sorted((path.name, path.read_bytes()) for path in base.iterdir()) == before


def test_the_audit_says_what_is_left(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, base = made
    plain = recovered(source, base, tmp_path / "svd", SVD)
    weighted = recovered(source, base, tmp_path / "act", ACT)
    assert plain.keys() == {"recovered_layers", "weight_error_left"}
    assert plain["recovered_layers"] == weighted["recovered_layers"]
    assert 0 < plain["weight_error_left"] < weighted["weight_error_left"] < 1
    assert 0 < weighted["output_error_left"] < 1


def test_layers_are_named_by_their_last_part_only_where_that_is_exact(tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path / "source")
    base = quantized(source, tmp_path / "base")
    recovered(source, base, tmp_path / "all", SVD)
    config = json.loads((tmp_path / "all" / ADAPTER_CONFIG).read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    part = quantized(source, tmp_path / "part", skip_modules=("model.layers.0",))
    recovered(source, part, tmp_path / "some", SVD)
    config = json.loads((tmp_path / "some" / ADAPTER_CONFIG).read_text())
    assert r"model\.layers\.1\.self_attn\.q_proj" in config["target_modules"]
    adapted = load(part, dtype=DType.FLOAT32, device="cpu", adapter=tmp_path / "some").model
    assert not hasattr(adapted.model.layers[0].self_attn.q_proj, "lora_A")
    assert hasattr(adapted.model.layers[1].self_attn.q_proj, "lora_A")


def test_an_adapter_of_other_layers_is_refused(tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path / "source")
    base = quantized(source, tmp_path / "base")
    recovered(source, base, tmp_path / "adapter", SVD)
    other = quantized(tiny.make_causal(tmp_path / "deeper", num_hidden_layers=3), tmp_path / "other")
    with pytest.raises(BenchmarkError, match="PEFT finds other layers of LlamaForCausalLM for adapter than it has"):
        load(other, dtype=DType.FLOAT32, device="cpu", adapter=tmp_path / "adapter")


def test_a_model_that_reads_no_text_has_no_weighted_factors(tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink(missing_ok=True)
    base = quantized(source, tmp_path / "base")
    with pytest.raises(Unsupported, match="svd-act reads a text, which LlamaForCausalLM cannot"):
        recovered(source, base, tmp_path / "adapter", ACT)
