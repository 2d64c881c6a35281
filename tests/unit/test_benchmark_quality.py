"""Quality against the base: every statistic beside a computation in NumPy and float64, written independently."""

from __future__ import annotations

import hashlib
import math
import os
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qbatch.core.domain import BASELINE, DType, Protocol, Scheme
from qbatch.core.errors import BenchmarkError, StorageError
from qbatch.core.measured.quality_figures import Quality
from qbatch.core.statistics.clusters import clustered_error
from qbatch.core.stored_json import as_json
from qbatch.worker.measuring.quality import replay
from qbatch.worker.measuring.quality.divergence import divergence, summarize_divergence
from qbatch.worker.measuring.quality.floor import arithmetic_floor
from qbatch.worker.measuring.quality.probes import probes_of
from qbatch.worker.measuring.quality.reference import (
    Reference,
    compare,
    open_reference,
    prepare_reference,
    reference_name,
)
from qbatch.worker.measuring.quality.replay import head_sha256
from qbatch.worker.measuring.quality.similarity import compare_embeddings
from qbatch.worker.measuring.versions import versions
from qbatch.worker.models.load import LoadedModel
from tests import tiny
from tests.benchmarking import benchmark
from tests.unit.benchmark_models import INT8, NF4, QUICK, TEXT, loaded_on_cpu, make_capped, measured, quantized

HEADS = [None, "masked-lm", "classification"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def numpy_figures(base: np.ndarray, other: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Those of ``numpy_statistics`` without their errors, of windows of any length."""
    with np.errstate(all="ignore"):
        found = numpy_statistics(base, other, targets, windows=1)
    return {name: value for name, value in found.items() if not name.endswith("_se")}


def numpy_statistics(base: np.ndarray, other: np.ndarray, targets: np.ndarray, windows: int) -> dict[str, float]:
    """llama.cpp's figures from full logits [rows, vocabulary] of equally long windows, the plain way."""
    p, q = log_softmax(base), log_softmax(other)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    places = np.arange(len(targets))
    ratio = p[places, targets] - q[places, targets]
    delta = np.exp(q[places, targets]) - np.exp(p[places, targets])
    agrees = base.argmax(axis=1) == other.argmax(axis=1)
    base_ppl, ppl = np.exp(-p[places, targets].mean()), np.exp(-q[places, targets].mean())
    rms = np.sqrt((delta**2).mean())

    def error(rows: np.ndarray) -> float:
        """Equal clusters: the error of the mean of the windows' means."""
        means = rows.reshape(windows, -1).mean(axis=1)
        return float(means.std(ddof=1) / math.sqrt(windows)) if windows > 1 else math.nan

    return {
        "kl_mean": kl.mean(),
        "kl_mean_se": error(kl),
        "kl_median": np.median(kl),
        "kl_p90": np.percentile(kl, 90),
        "kl_p95": np.percentile(kl, 95),
        "kl_p99": np.percentile(kl, 99),
        "kl_max": kl.max(),
        "ln_ppl_ratio": ratio.mean(),
        "ln_ppl_ratio_se": error(ratio),
        "base_perplexity": base_ppl,
        "base_perplexity_se": base_ppl * error(p[places, targets]),
        "perplexity": ppl,
        "perplexity_se": ppl * error(q[places, targets]),
        "top1_agreement": agrees.mean(),
        "top1_agreement_se": error(agrees),
        "rms_delta_p": rms,
        "rms_delta_p_se": error(delta**2) / (2 * rms),
    }


def quantized_and_reference(
    source: Path, scheme: Scheme, dtype: DType = DType.BFLOAT16
) -> tuple[LoadedModel, Reference]:
    base = loaded_on_cpu(source, dtype)
    reference = prepare_reference(base, QUICK, TEXT, source.with_name("references") / source.name)
    assert reference is not None
    return loaded_on_cpu(quantized(source, source.with_name("quantized"), scheme), dtype), reference


def figures_of(model: LoadedModel, reference: Reference, protocol: Protocol, text: str) -> dict[str, Any]:
    """As they are stored."""
    return compare(model, reference, protocol, text).to_json()


@pytest.mark.parametrize("noise", [1.0, 0.0151], ids=["large", "a KL of 1e-4"])
def test_every_statistic_is_that_of_a_float64_computation(noise: float) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(6 * 20, 3000, generator=generator) * 3
    other = base + noise * torch.randn(base.shape, generator=generator)
    targets = torch.randint(3000, (120,), generator=generator)
    windows = [divergence(base[i : i + 20], other[i : i + 20], targets[i : i + 20].tolist()) for i in range(0, 120, 20)]
    summary = summarize_divergence(windows).to_json()
    expected = numpy_statistics(base.numpy(), other.numpy(), targets.numpy(), windows=6)
    assert {name: summary[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    if noise < 1:
        assert summary["kl_mean"] == pytest.approx(1e-4, rel=0.1)


def test_where_the_base_is_sure_and_where_it_guesses_is_told_apart() -> None:
    """Rows of every confidence; the errors are those of a mean over unequal clusters, computed with NumPy."""
    generator = torch.Generator().manual_seed(2)
    sharpness = torch.linspace(0.0, 20.0, 200)[torch.randperm(200, generator=generator), None]
    base = torch.randn(200, 50, generator=generator) * sharpness
    other = base + 0.3 * torch.randn(base.shape, generator=generator)
    summary = summarize_divergence([divergence(base[i : i + 20], other[i : i + 20]) for i in range(0, 200, 20)])
    p, q = log_softmax(base.numpy()), log_softmax(other.numpy())
    kl, confidence = (np.exp(p) * (p - q)).sum(axis=1), np.exp(p).max(axis=1)
    assert summary.window_rows == (20,) * 10
    assert summary.window_kl == pytest.approx(kl.reshape(10, 20).sum(axis=1), rel=1e-9)
    buckets = summary.kl_by_confidence or ()
    assert [(bucket.above, bucket.below) for bucket in buckets] == [
        (0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 0.9), (0.9, 0.99), (0.99, 1.0)
    ]  # fmt: skip
    assert sum(bucket.rows for bucket in buckets) == 200
    for bucket in buckets:
        within = (confidence >= bucket.above) & ((confidence < bucket.below) | (bucket.below == 1))
        assert bucket.rows == within.sum() > 5
        mean = kl[within].mean()
        assert bucket.kl_mean == pytest.approx(mean, rel=1e-9)
        residuals = [(kl - mean)[i : i + 20][within[i : i + 20]] for i in range(0, 200, 20)]
        sums = np.array([each.sum() for each in residuals if len(each)])
        expected = math.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / within.sum()
        assert bucket.kl_mean_se == pytest.approx(expected, rel=1e-9)


def test_a_base_that_is_never_unsure_has_buckets_without_rows() -> None:
    base = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    *empty, sure = summarize_divergence([divergence(base, base)]).kl_by_confidence or ()
    assert [(bucket.rows, bucket.kl_mean) for bucket in empty] == [(0, None)] * 5
    assert (sure.rows, sure.kl_mean, sure.kl_mean_se) == (2, 0.0, None)


@pytest.mark.parametrize("scheme", [NF4, INT8], ids=["nf4", "int8"])
@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_figures_from_a_stored_reference_are_those_from_full_logits(tmp_path: Path, arch: str, scheme: Scheme) -> None:
    """Within a hundredth of a per cent, though the reference holds hidden states, a fraction of the bytes."""
    source = tiny.make_causal(tmp_path / arch, arch)
    model, reference = quantized_and_reference(source, scheme)
    figures = figures_of(model, reference, QUICK, TEXT)
    base = loaded_on_cpu(source)
    probes = probes_of(base, QUICK, TEXT)
    logits = [
        np.concatenate([full_logits(loaded, probe.ids)[list(probe.rows or ())] for probe in probes])
        for loaded in (base, model)
    ]
    targets = np.concatenate([probe.targets for probe in probes])
    expected = numpy_statistics(*logits, targets, windows=len(probes))
    assert reference.form == "hidden"
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def full_logits(loaded: LoadedModel, ids: tuple[int, ...]) -> np.ndarray:
    logits: np.ndarray = loaded.model(torch.tensor([ids])).logits[0].double().numpy()
    return logits


@pytest.mark.parametrize("arch", tiny.CAUSAL_ARCHS)
def test_hidden_states_replay_to_the_base_s_very_bits(tmp_path: Path, arch: str) -> None:
    base = loaded_on_cpu(tiny.make_causal(tmp_path / arch, arch))
    reference = prepare_reference(base, QUICK, TEXT, tmp_path / "reference")
    assert reference is not None
    assert reference.form == "hidden"
    assert figures_of(base, reference, QUICK, TEXT)["kl_max"] == 0


def test_a_model_that_caps_its_logits_has_them_stored_instead(tmp_path: Path) -> None:
    base = loaded_on_cpu(make_capped(tmp_path / "gemma2"))
    reference = prepare_reference(base, QUICK, TEXT, tmp_path / "reference")
    assert reference is not None
    assert reference.form == "logits"
    assert reference.probes == QUICK.eval_max_windows
    assert figures_of(base, reference, QUICK, TEXT)["kl_max"] == 0


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_int8_is_nearer_the_base_than_nf4_and_both_are_above_the_floor(tmp_path: Path, arch: str) -> None:
    source = tiny.make_causal(tmp_path / arch, arch)
    four, reference = quantized_and_reference(source, NF4)
    eight = loaded_on_cpu(quantized(source, tmp_path / "int8", INT8))
    kl = [figures_of(model, reference, QUICK, TEXT)["kl_mean"] for model in (eight, four)]
    assert reference.floor is not None
    assert 0 < reference.floor.kl_mean < kl[0] < kl[1]


@pytest.mark.parametrize("head", HEADS)
def test_encoders_are_compared_each_in_its_own_way(tmp_path: Path, head: str | None) -> None:
    model, reference = quantized_and_reference(tiny.make_encoder(tmp_path / "bert", head), NF4)
    figures = figures_of(model, reference, QUICK, TEXT)
    if head is None:
        assert 0.9 < figures["cosine_min"] <= figures["cosine_mean"] < 1
        assert 0.9 < figures["rank_correlation"] < 1
    else:
        assert 0 < figures["kl_mean"] < 0.01
        assert 0 < figures["top1_agreement"] <= 1
    assert ("ln_ppl_ratio" in figures) == (head == "masked-lm")


@torch.inference_mode()
def test_a_masked_model_is_scored_on_the_tokens_that_were_masked(tmp_path: Path) -> None:
    source = tiny.make_encoder(tmp_path / "bert", "masked-lm")
    model, reference = quantized_and_reference(source, NF4)
    base, tokenizer = loaded_on_cpu(source), model.tokenizer
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    first, *_, last = tokenizer("a")["input_ids"]
    length = min(64, QUICK.eval_window) - 2
    p, q, targets = [], [], []
    for begin in range(0, min(len(ids), 64 * length), length):
        piece = ids[begin : begin + length]
        places = list(range(3 if len(piece) > 3 else 0, len(piece), 7))
        covered = [tokenizer.mask_token_id if n in places else token for n, token in enumerate(piece)]
        asked = torch.tensor([[first, *covered, last]])
        for rows, one in ((p, base), (q, model)):
            rows.append(one.model(input_ids=asked).logits[0, [n + 1 for n in places]].float().numpy())
        targets += [piece[n] for n in places]
    expected = numpy_figures(np.concatenate(p), np.concatenate(q), np.array(targets))
    figures = figures_of(model, reference, QUICK, TEXT)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def bert(folder: Path, class_name: str, **config: object) -> Path:
    tiny.make_tokenizer(folder, prefix_bos=True, suffix_eos=True)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = transformers.BertConfig(vocab_size=tiny.VOCAB_SIZE, pad_token_id=tiny.PAD, **shape, **config)
    getattr(transformers, class_name)(fields).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("head", ["QuestionAnswering", "NextSentencePrediction", "MultipleChoice"])
def test_under_any_head_it_is_the_body_s_states_that_are_compared(tmp_path: Path, head: str) -> None:
    source = bert(tmp_path / "bert", f"BertFor{head}")
    model, reference = quantized_and_reference(source, NF4)
    stored = load_file(reference.folder / "0000.safetensors")["base"]
    body = loaded_on_cpu(source).model.bert
    ids = torch.tensor([probes_of(model, QUICK, TEXT)[0].ids])
    assert torch.equal(stored, body(ids).last_hidden_state[0].float().mean(0))
    assert 0.9 < figures_of(model, reference, QUICK, TEXT)["rank_correlation"] < 1
    assert measured(source, protocol=replace(QUICK, batch_size=2)).forward_s_p50 is not None


@torch.inference_mode()
def test_a_classifier_of_tokens_is_compared_at_each_token_of_the_text(tmp_path: Path) -> None:
    source = bert(tmp_path / "bert", "BertForTokenClassification", num_labels=3, initializer_range=0.3)
    model, reference = quantized_and_reference(source, NF4)
    base, special = loaded_on_cpu(source), {tiny.BOS, tiny.EOS}
    asked = [torch.tensor([probe.ids]) for probe in probes_of(model, QUICK, TEXT)]
    inner = [[n for n, token in enumerate(ids[0].tolist()) if token not in special] for ids in asked]
    assert all(len(places) == ids.shape[1] - 2 for places, ids in zip(inner, asked, strict=True))
    p, q = (
        torch.cat([one.model(ids).logits[0, places].double() for ids, places in zip(asked, inner, strict=True)])
        for one in (base, model)
    )
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    figures = figures_of(model, reference, QUICK, TEXT)
    assert figures["rows"] == len(kl)
    assert figures["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-6)
    assert figures["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0.5 < figures["top1_agreement"] < 1


@torch.inference_mode()
def test_labels_that_do_not_exclude_each_other_are_compared_one_by_one(tmp_path: Path) -> None:
    source = bert(
        tmp_path / "bert",
        "BertForSequenceClassification",
        num_labels=5,
        problem_type="multi_label_classification",
        initializer_range=0.3,
    )
    model, reference = quantized_and_reference(source, NF4)
    base = loaded_on_cpu(source)
    asked = [torch.tensor([probe.ids]) for probe in probes_of(model, QUICK, TEXT)]
    p, q = (
        np.concatenate([1 / (1 + np.exp(-one.model(ids).logits[0].double().numpy())) for ids in asked])
        for one in (base, model)
    )
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    figures = figures_of(model, reference, QUICK, TEXT)
    assert figures["rows"] == len(kl) == 5 * len(asked)
    assert figures["kl_mean"] == pytest.approx(kl.mean(), rel=1e-6)
    assert figures["kl_max"] == pytest.approx(kl.max(), rel=1e-6)
    assert figures["top1_agreement"] == pytest.approx(((p >= 0.5) == (q >= 0.5)).mean())


def test_a_single_number_is_no_distribution_to_compare(tmp_path: Path) -> None:
    """A reranker's score: its softmax is 1 for every model, and a KL of 0 would call any of them perfect."""
    model, reference = quantized_and_reference(
        bert(tmp_path / "bert", "BertForSequenceClassification", num_labels=1), NF4
    )
    with pytest.raises(BenchmarkError, match="a single number"):
        figures_of(model, reference, QUICK, TEXT)


def test_what_goes_wrong_while_comparing_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other figures of the row stand."""
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    reference = prepare_reference(base, QUICK, TEXT, tmp_path / "reference")
    monkeypatch.setattr("qbatch.worker.measuring.quality.reference.divergence", lambda *_: [][0])
    found = measured(tmp_path / "llama", reference=reference)
    assert found.details.quality == Quality(reason="cannot compare with the base: IndexError: list index out of range")
    assert found.perplexity is not None


@pytest.mark.parametrize("kind", ["causal", "masked-lm", "encoder"])
@pytest.mark.parametrize("broken", ["the model", "the baseline"])
def test_outputs_that_are_nan_agree_with_nothing(tmp_path: Path, kind: str, broken: str) -> None:
    """Of a model with finite weights, too: an activation may overflow."""
    classes = {"masked-lm": "BertForMaskedLM", "encoder": "BertModel"}
    folder = tmp_path / kind
    source = bert(folder, classes[kind]) if kind in classes else tiny.make_causal(folder)
    base, other = loaded_on_cpu(source), loaded_on_cpu(source)
    with torch.no_grad():
        modules = (base if broken == "the baseline" else other).model.modules()
        next(module for module in modules if "Norm" in type(module).__name__).weight.fill_(math.nan)
    reference = prepare_reference(base, QUICK, TEXT, tmp_path / "reference")
    assert reference is not None
    said = "the outputs of its baseline are NaN" if broken == "the baseline" else "^its outputs are NaN or infinite"
    with pytest.raises(BenchmarkError, match=said):
        compare(other, reference, QUICK, TEXT)


@pytest.mark.parametrize("arch", tiny.SEQ2SEQ_ARCHS)
def test_an_encoder_decoder_is_compared_on_the_second_half_of_each_window(tmp_path: Path, arch: str) -> None:
    model, reference = quantized_and_reference(tiny.make_seq2seq(tmp_path / arch, arch), NF4)
    figures = figures_of(model, reference, QUICK, TEXT)
    assert figures["rows"] == sum(figures["window_tokens"]) == sum(len(p.labels) for p in probes_of(model, QUICK, TEXT))
    assert figures["kl_mean"] > 0


@torch.inference_mode()
def test_an_encoder_decoder_is_scored_on_what_follows_its_first_half(tmp_path: Path) -> None:
    source = tiny.make_seq2seq(tmp_path / "t5", "t5")
    model, reference = quantized_and_reference(source, NF4)
    base, tokenizer = loaded_on_cpu(source), model.tokenizer
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    *_, last = tokenizer("a")["input_ids"]
    assert tokenizer("a")["input_ids"] == [*tokenizer("a", add_special_tokens=False)["input_ids"], last]
    length = QUICK.eval_window - 1
    p, q, targets = [], [], []
    for begin in range(0, min(len(ids), QUICK.eval_max_windows * length), length):
        piece = ids[begin : begin + length]
        read, said = piece[: len(piece) // 2], piece[len(piece) // 2 :]
        if not read:
            continue
        before = torch.tensor([[base.model.config.decoder_start_token_id, *said[:-1]]])
        for rows, one in ((p, base), (q, model)):
            output = one.model(input_ids=torch.tensor([[*read, last]]), decoder_input_ids=before)
            rows.append(output.logits[0].float().numpy())
        targets += said
    expected = numpy_figures(np.concatenate(p), np.concatenate(q), np.array(targets))
    figures = figures_of(model, reference, QUICK, TEXT)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_a_reference_adds_the_comparison_and_leaves_the_perplexity(tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path / "llama")
    _, reference = quantized_and_reference(source, NF4)
    measurements = [measured(tmp_path / "quantized", NF4, reference=given) for given in (None, reference)]
    assert measurements[0].details.to_json()["quality"] is None
    quality = measurements[1].details.to_json()["quality"]
    assert quality["kl_mean"] > 0
    assert quality["base_perplexity"] != quality["perplexity"]
    assert measurements[1].perplexity == pytest.approx(measurements[0].perplexity, rel=1e-6)
    errors = [measurement.details.to_json()["perplexity"]["perplexity_se"] for measurement in measurements]
    assert errors == [pytest.approx(quality["perplexity_se"], rel=1e-4)] * 2


def test_a_prepared_reference_is_adopted_and_never_written_twice(tmp_path: Path) -> None:
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    first = prepare_reference(base, QUICK, TEXT, tmp_path / "references" / "a")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "references" / "a").glob("*.safetensors")}
    assert prepare_reference(base, QUICK, TEXT, tmp_path / "references" / "a") == first
    assert open_reference(tmp_path / "references" / "a") == first
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert [path.name for path in (tmp_path / "references").iterdir()] == ["a"]


def test_all_of_each_stored_output_is_on_its_way_to_the_disk_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that little is left for the sync to wait for."""
    sent: list[int] = []

    def start(descriptor: int, start: int, nbytes: int) -> None:
        assert (start, nbytes) == (0, os.fstat(descriptor).st_size)
        sent.append(nbytes)

    monkeypatch.setattr("qbatch.worker.measuring.quality.reference.start_writeback", start)
    reference = prepare_reference(
        loaded_on_cpu(tiny.make_causal(tmp_path / "llama")), QUICK, TEXT, tmp_path / "reference"
    )
    assert reference is not None
    assert len(sent) == reference.probes
    assert min(sent) > 0


def test_the_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    before = os.umask(0o022)
    try:
        prepare_reference(base, QUICK, TEXT, tmp_path / "reference")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "reference").iterdir()} == {0o644}


def test_a_reference_too_large_for_the_bound_holds_fewer_windows(tmp_path: Path) -> None:
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    reference = prepare_reference(base, QUICK, TEXT, tmp_path / "reference", max_bytes=40_000)
    assert reference is not None
    assert reference.probes == 2
    assert sum(path.stat().st_size for path in reference.folder.glob("*.safetensors")) <= 40_000
    assert figures_of(base, reference, QUICK, TEXT)["windows"] == 2


def test_the_least_recently_used_references_make_room_but_not_those_in_use(tmp_path: Path) -> None:
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    root = tmp_path / "references"
    for hours_ago, name in ((3, "oldest"), (2, "older"), (0, "in-use")):
        prepare_reference(base, QUICK, TEXT, root / name)
        used = time.time() - hours_ago * 3600
        os.utime(root / name / "reference.json", (used, used))
    one = sum(path.stat().st_size for path in (root / "oldest").iterdir())
    prepare_reference(base, QUICK, TEXT, root / "new", max_bytes=3 * one)
    assert {path.name for path in root.iterdir()} == {"older", "in-use", "new"}
    prepare_reference(base, QUICK, TEXT, root / "newest", max_bytes=2 * one)
    assert {path.name for path in root.iterdir()} == {"in-use", "new", "newest"}


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flipped(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 0x80]))


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def rewritten(text: str) -> Callable[[Path], None]:
    return lambda path: (path.write_text(text), None)[1]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("reference.json", emptied),
        ("reference.json", zeroed),
        ("reference.json", cut),
        ("reference.json", rewritten("null")),
        ("reference.json", rewritten('{"form": "hidden"}')),
        ("reference.json", Path.unlink),
        ("0001.safetensors", emptied),
        ("0001.safetensors", zeroed),
        ("0001.safetensors", cut),
        ("0001.safetensors", flipped),
        ("0001.safetensors", Path.unlink),
    ],
)
def test_a_damaged_reference_is_none_and_is_made_anew(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """As a power cut may leave it."""
    base, root = loaded_on_cpu(tiny.make_causal(tmp_path / "llama")), tmp_path / "references"
    whole = prepare_reference(base, QUICK, TEXT, root / "a")
    damage(root / "a" / name)
    assert open_reference(root / "a") is None
    assert list(root.iterdir()) == []
    assert prepare_reference(base, QUICK, TEXT, root / "a") == whole
    assert whole is not None
    assert figures_of(base, whole, QUICK, TEXT)["kl_max"] == 0


def test_a_probe_damaged_while_it_is_used_leaves_its_reason(tmp_path: Path) -> None:
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    reference = prepare_reference(base, QUICK, TEXT, tmp_path / "reference")
    assert reference is not None
    cut(tmp_path / "reference" / "0001.safetensors")
    with pytest.raises(BenchmarkError, match="damaged"):
        figures_of(base, reference, QUICK, TEXT)


def test_a_reference_is_on_the_disk_before_it_is_in_its_place(tmp_path: Path, disk_order: list[str]) -> None:
    base, root = loaded_on_cpu(tiny.make_causal(tmp_path / "llama")), tmp_path / "references"
    disk_order.clear()
    prepare_reference(base, QUICK, TEXT, root / "a", staging=root / "staged")
    files = {path.name for path in (root / "a").iterdir()}
    assert len(files) == 1 + QUICK.eval_max_windows
    assert set(disk_order[: len(files)]) == files
    assert disk_order[len(files) :] == ["staged", "rename", "references"]


def test_what_a_killed_runner_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    base, root = loaded_on_cpu(tiny.make_causal(tmp_path / "llama")), tmp_path / "references"
    for name, hours_ago in ((".a.0123abcd", 2), (".b.0123abcd", 0), (".snapshot", 2)):
        (root / name).mkdir(parents=True)
        (root / name / "0000.safetensors").write_bytes(b"half of it")
        used = time.time() - hours_ago * 3600
        os.utime(root / name, (used, used))
    prepare_reference(base, QUICK, TEXT, root / "a")
    assert {path.name for path in root.iterdir()} == {".b.0123abcd", ".snapshot", "a"}


def test_another_text_is_not_compared(tmp_path: Path) -> None:
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    reference = prepare_reference(base, QUICK, TEXT, tmp_path / "reference")
    assert reference is not None
    with pytest.raises(BenchmarkError, match="other tokens"):
        figures_of(base, reference, QUICK, TEXT[100:])


def test_a_head_is_hashed_in_pieces_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash that stored references have: of its chunks' hashes, whatever the pieces are."""
    monkeypatch.setattr(replay, "CHUNK_BYTES", 100)
    head = torch.nn.Linear(8, 21, bias=False, dtype=torch.bfloat16)
    values = head.weight.detach().view(torch.uint8).numpy().tobytes()
    expected = hashlib.sha256(b"weight torch.bfloat16 (21, 8)")
    for begin in range(0, len(values), 100):
        expected.update(hashlib.sha256(values[begin : begin + 100]).digest())
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    for piece_bytes in (100, 64, 7):
        monkeypatch.setattr(replay, "_PIECE_BYTES", piece_bytes)
        assert head_sha256(model) == expected.hexdigest()


def test_another_output_head_is_not_replayed_through(tmp_path: Path) -> None:
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    reference = prepare_reference(base, QUICK, TEXT, tmp_path / "reference")
    assert reference is not None
    with torch.no_grad():
        base.model.lm_head.weight[0, 0] += 1
    with pytest.raises(BenchmarkError, match="output head"):
        figures_of(base, reference, QUICK, TEXT)


def test_what_cannot_be_compared_leaves_its_reason_and_other_figures(tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path / "llama")
    base = loaded_on_cpu(source)
    reference = prepare_reference(base, QUICK, TEXT, tmp_path / "reference")
    measurement = benchmark(
        base,
        folder=source,
        scheme=BASELINE.resolved(DType.BFLOAT16),
        dtype=DType.BFLOAT16,
        protocol=QUICK,
        eval_text=TEXT[100:],
        on_step=lambda _step: None,
        reference=reference,
    )
    assert "other tokens" in measurement.details.to_json()["quality"]["reason"]
    assert measurement.perplexity is not None


def test_a_reference_s_name_depends_on_all_that_decides_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"fingerprint": "f", "dtype": DType.BFLOAT16, "device_name": "d", "protocol": QUICK}
    others = [
        {"fingerprint": "g"},
        {"dtype": DType.FLOAT16},
        {"device_name": "e"},
        {"protocol": replace(QUICK, eval_window=32)},
        {"protocol": replace(QUICK, eval_stride=32)},
        {"protocol": replace(QUICK, eval_max_windows=2)},
        {"protocol": replace(QUICK, eval_text_sha256="1" * 64)},
    ]
    names = [reference_name(**(same | other)) for other in others]
    assert len({reference_name(**same), *names}) == 1 + len(others)
    for library in ("torch", "transformers"):
        with monkeypatch.context() as patched:
            patched.setattr(
                "qbatch.worker.measuring.quality.reference.versions", lambda name=library: versions() | {name: "9.9"}
            )
            assert reference_name(**same) != names[0]
            names.append(reference_name(**same))
    assert len({reference_name(**same), *names}) == 3 + len(others)
    shaped = replace(QUICK, batch_size=9, prompt_tokens=9, new_tokens=9, min_iterations=9, rounds=9, why=True)
    assert reference_name(**same | {"protocol": shaped}) == reference_name(**same), "one serves every shape"


def test_without_a_tokenizer_there_is_nothing_to_compare(tmp_path: Path) -> None:
    folder = tiny.make_causal(tmp_path / "llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert prepare_reference(loaded_on_cpu(folder), QUICK, TEXT, tmp_path / "reference") is None
    assert not (tmp_path / "reference").exists()


def test_the_floor_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    floor = arithmetic_floor(base, probes_of(base, QUICK, TEXT))
    assert floor is not None
    assert floor.windows == 2
    for name, tensor in base.model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("head", HEADS)
def test_an_encoders_floor_is_in_its_own_figures_and_nf4_is_above_it(tmp_path: Path, head: str | None) -> None:
    model, reference = quantized_and_reference(tiny.make_encoder(tmp_path / "bert", head), NF4)
    figures, floor = figures_of(model, reference, QUICK, TEXT), reference.floor
    assert floor is not None
    if head is None:
        assert floor.pieces == 16
        assert figures["rank_correlation"] < floor.rank_correlation < 1
        assert figures["cosine_mean"] < floor.cosine_mean < 1
    else:
        assert floor.windows == 16
        assert 0 < floor.kl_mean < figures["kl_mean"]


def test_a_float32_model_has_no_floor(tmp_path: Path) -> None:
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"), DType.FLOAT32)
    assert arithmetic_floor(base, probes_of(base, QUICK, TEXT)) is None


@pytest.mark.parametrize("free", [0.9, 2.0])
def test_on_a_cpu_the_floor_wants_room_for_the_float32_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float
) -> None:
    """The kernel would kill the runner, and its job be charged for that."""
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    copy_bytes = sum(4 * parameter.numel() for parameter in base.model.parameters())
    available = int(free * (copy_bytes + (1 << 29)))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    assert (arithmetic_floor(base, probes_of(base, QUICK, TEXT)) is not None) == (free > 1)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), MemoryError()],
    ids=["torch", "python"],
)
def test_where_memory_runs_out_the_reference_is_written_without_a_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    base, original = loaded_on_cpu(tiny.make_causal(tmp_path / "llama")), torch.Tensor.float

    def widened(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (tiny.VOCAB_SIZE, 128):
            raise error
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "float", widened)
    reference = prepare_reference(base, QUICK, TEXT, tmp_path / "reference")
    assert reference is not None
    assert reference.floor is None
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


def test_of_equal_logits_the_lowest_index_is_the_prediction() -> None:
    base = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    assert divergence(base, torch.tensor([[1.0, 5.0, 4.0, 0.0]])).agrees.tolist() == [1.0]
    assert divergence(base, torch.tensor([[1.0, 4.0, 5.0, 0.0]])).agrees.tolist() == [0.0]


def test_a_token_impossible_to_the_base_adds_nothing() -> None:
    base = torch.tensor([[0.0, 0.0, -math.inf]])
    assert divergence(base, base).kl.tolist() == [0.0]
    assert divergence(base, torch.zeros(1, 3)).kl.tolist() == pytest.approx([math.log(1.5)])


def test_rows_of_one_window_are_not_taken_for_independent() -> None:
    """Each value four times over in its own window: the error is that of four values, not of sixteen."""
    values = [1.0, 2.0, 4.0, 9.0]
    sums, counts = [4 * value for value in values], [4] * 4
    assert clustered_error(sums, counts) == pytest.approx(np.std(values, ddof=1) / 2)
    assert clustered_error(sums[:1], counts[:1]) is None


def test_the_error_is_the_scatter_of_the_mean_of_unequal_windows() -> None:
    generator = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(1000):
        counts = generator.integers(1, 40, size=40)
        sums = [float((generator.normal() + generator.normal(size=count)).sum()) for count in counts]
        means.append(sum(sums) / counts.sum())
        errors.append(clustered_error(sums, counts.tolist()))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_a_percentile_s_error_is_that_of_a_bootstrap_over_windows() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(20 * 30, 50, generator=generator)
    # Windows of their own difficulty: rows drawn one by one would scatter less.
    noise = torch.linspace(0.1, 1.0, 20).repeat_interleave(30)[:, None]
    other = base + noise * torch.randn(base.shape, generator=generator)
    windows = [divergence(base[i : i + 30], other[i : i + 30]) for i in range(0, 600, 30)]
    summary = summarize_divergence(windows).to_json()
    kl, numpy_generator = torch.stack([window.kl for window in windows]).numpy(), np.random.default_rng(0)
    drawn = kl[numpy_generator.integers(20, size=(4000, 20))].reshape(4000, -1)
    for name, percent in (("median", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        expected = np.percentile(drawn, percent, axis=1).std() * math.sqrt(20 / 19)
        assert summary[f"kl_{name}_se"] == pytest.approx(expected, rel=0.2)


def test_embeddings_are_centred_before_they_are_compared() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(10, 32, generator=generator)
    unrelated = torch.randn(10, 32, generator=generator)
    offset = torch.full((32,), 100.0)
    same = compare_embeddings(base + offset, base - offset).to_json()
    assert same["cosine_mean"] == pytest.approx(1)
    assert same["rank_correlation"] == pytest.approx(1)
    assert abs(compare_embeddings(base + offset, unrelated + offset).to_json()["cosine_mean"]) < 0.3


def test_cosines_and_their_rank_correlation_are_those_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    base, other = torch.randn(8, 4, generator=generator), torch.randn(8, 4, generator=generator)

    def unit(vectors: torch.Tensor) -> np.ndarray:
        centred = vectors.double().numpy() - vectors.double().numpy().mean(axis=0)
        return np.asarray(centred / np.linalg.norm(centred, axis=1, keepdims=True))

    def pair_ranks(vectors: torch.Tensor) -> np.ndarray:
        return np.argsort(np.argsort((unit(vectors) @ unit(vectors).T)[np.triu_indices(8, 1)]))

    cosines = (unit(base) * unit(other)).sum(axis=1)
    assert compare_embeddings(base, other).to_json() == pytest.approx(
        {
            "pieces": 8,
            "cosine_mean": cosines.mean(),
            "cosine_min": cosines.min(),
            "rank_correlation": np.corrcoef(pair_ranks(base), pair_ranks(other))[0, 1],
        }
    )


def test_two_pieces_of_text_are_too_few_for_similarities() -> None:
    found = compare_embeddings(torch.eye(4)[:2], torch.eye(4)[:2]).to_json()
    assert found == {"pieces": 2, "reason": "similarities need at least three pieces of text"}


def test_json_gets_none_for_what_is_no_number() -> None:
    assert as_json({"a": math.nan, "b": [1.0, -math.inf], "c": {"d": 2}, "e": None}) == {
        "a": None,
        "b": [1.0, None],
        "c": {"d": 2},
        "e": None,
    }


def test_masked_positions_are_the_same_every_time_and_hold_the_mask(tmp_path: Path) -> None:
    loaded = loaded_on_cpu(tiny.make_encoder(tmp_path / "bert", "masked-lm"))
    probes = probes_of(loaded, QUICK, TEXT)
    assert probes == probes_of(loaded, replace(QUICK, batch_size=2), TEXT)
    for probe in probes:
        assert all(probe.ids[row] == tiny.MASK for row in probe.rows or ())
        assert sum(token == tiny.MASK for token in probe.ids) == len(probe.targets) > 0
        assert probe.ids[0] == tiny.BOS
        assert probe.ids[-1] == tiny.EOS


def test_a_reference_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    (tmp_path / "references").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="references"):
        prepare_reference(base, QUICK, TEXT, tmp_path / "references" / "a")
