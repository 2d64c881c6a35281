"""A benchmark as a whole: which figures each kind of model gets."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qbatch.core.domain import BASELINE, DType, Scheme
from qbatch.core.errors import BenchmarkError
from qbatch.core.measured.measurement import Measurement
from qbatch.worker.measuring import DEFAULT_EVAL_TEXT
from qbatch.worker.measuring.tokens import max_positions
from tests import tiny
from tests.benchmarking import benchmark
from tests.unit.benchmark_models import FP4, INT8, NF4, QUICK, TEXT, loaded_on_cpu, measured, quantized

SCHEMES = pytest.mark.parametrize("scheme", [BASELINE, NF4, FP4, INT8], ids=lambda scheme: scheme.method.value)
GENERATION = ("prefill_s_p50", "decode_tokens_per_s", "per_token_s_p50", "per_token_s_p99")
FORWARD = ("forward_s_p50", "forward_samples_per_s")


def stored(source: Path, scheme: Scheme) -> Path:
    """What is measured for ``scheme``: the source itself, or its checkpoint."""
    return source if scheme.is_baseline else quantized(source, source.with_name(scheme.method.value), scheme)


def figures(measurement: Measurement, names: tuple[str, ...]) -> list[float | None]:
    return [getattr(measurement, name) for name in names]


@SCHEMES
@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_a_causal_lm_gets_prefill_decode_and_perplexity(tmp_path: Path, arch: str, scheme: Scheme) -> None:
    measurement = measured(stored(tiny.make_causal(tmp_path / arch, arch), scheme), scheme)
    assert all(value is not None and value > 0 for value in figures(measurement, GENERATION))
    # Untrained weights predict little: about the size of the vocabulary.
    assert measurement.perplexity == pytest.approx(tiny.VOCAB_SIZE, rel=0.3)
    assert figures(measurement, FORWARD) == [None, None]
    assert measurement.max_allocated_bytes is None
    assert measurement.details.to_json()["stats"]["per_token"]["count"] == QUICK.new_tokens - 1
    # Llama's windows begin with BOS, which takes a place of the text's.
    stride = {"llama": 63, "bloom": 64}[arch]
    text = {"eval_window": 64, "eval_stride": stride, "eval_max_windows": 3}
    assert measurement.details.to_json()["shapes"] == {"batch_size": 1, "prompt_tokens": 16, "new_tokens": 4} | text


@SCHEMES
@pytest.mark.parametrize("head", [None, "masked-lm", "classification"])
def test_an_encoder_gets_its_forward(tmp_path: Path, head: str | None, scheme: Scheme) -> None:
    measurement = measured(stored(tiny.make_encoder(tmp_path / "bert", head), scheme), scheme)
    assert all(value is not None and value > 0 for value in figures(measurement, FORWARD))
    assert figures(measurement, (*GENERATION, "perplexity")) == [None] * 5


@pytest.mark.parametrize("arch", tiny.SEQ2SEQ_ARCHS)
def test_an_encoder_decoder_gets_prefill_and_decode(tmp_path: Path, arch: str) -> None:
    measurement = measured(tiny.make_seq2seq(tmp_path, arch))
    assert all(value is not None and value > 0 for value in figures(measurement, GENERATION))
    assert measurement.perplexity is None


@pytest.mark.parametrize("arch", tiny.CAUSAL_ARCHS)
def test_every_causal_architecture_is_measured(tmp_path: Path, arch: str) -> None:
    measurement = measured(tiny.make_causal(tmp_path, arch))
    assert measurement.details.to_json()["stats"]["decode"]["count"] == QUICK.min_iterations
    assert measurement.perplexity is not None


def test_a_measurement_survives_json(tmp_path: Path) -> None:
    measurement = measured(tiny.make_causal(tmp_path))
    assert Measurement.from_json(json.loads(json.dumps(measurement.to_json()))) == measurement


def test_the_details_name_protocol_versions_and_task(tmp_path: Path) -> None:
    details = measured(tiny.make_causal(tmp_path)).details.to_json()
    assert details["protocol"] == QUICK.to_json()
    assert details["protocol_hash"] == QUICK.hash
    assert details["task"] == "causal-lm"
    assert details["versions"]["torch"] == torch.__version__
    assert details["versions"]["bitsandbytes"]


def test_the_protocol_is_clipped_to_the_positions_of_the_model(tmp_path: Path) -> None:
    protocol = replace(QUICK, prompt_tokens=600, new_tokens=100, eval_window=4096, eval_stride=4096, eval_max_windows=1)
    measurement = measured(tiny.make_causal(tmp_path, "gpt2"), protocol=protocol)
    assert measurement.details.to_json()["shapes"] == {
        "batch_size": 1,
        "prompt_tokens": 412,
        "new_tokens": 100,
        "eval_window": tiny.MAX_TOKENS,
        "eval_stride": tiny.MAX_TOKENS,
        "eval_max_windows": 1,
    }
    assert measurement.details.to_json()["perplexity"]["tokens"] == tiny.MAX_TOKENS - 1


def test_an_encoder_s_input_is_clipped_to_its_positions(tmp_path: Path) -> None:
    measurement = measured(tiny.make_encoder(tmp_path), protocol=replace(QUICK, prompt_tokens=10_000))
    shape = {"batch_size": 1, "prompt_tokens": tiny.MAX_TOKENS, "new_tokens": 0}
    assert measurement.details.to_json()["shapes"].items() >= shape.items()


def test_positions_below_a_roberta_s_padding_index_are_not_counted() -> None:
    import transformers

    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32, max_position_embeddings=66
    )
    assert max_positions(transformers.RobertaModel(config)) == 64


def test_without_a_tokenizer_speed_is_measured_and_perplexity_is_not(tmp_path: Path) -> None:
    folder = tiny.make_causal(tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    measurement = measured(folder)
    assert measurement.decode_tokens_per_s is not None
    assert measurement.perplexity is None
    assert measurement.details.perplexity.reason == "it has no tokenizer"


def test_a_tokenizer_of_another_vocabulary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="embeds only 100"):
        measured(tiny.make_causal(tmp_path, vocab_size=100))


def test_a_text_of_one_token_has_no_perplexity(tmp_path: Path) -> None:
    measurement = measured(tiny.make_causal(tmp_path, "gpt2"), text="a")
    assert measurement.perplexity is None
    assert str(measurement.details.perplexity.reason).startswith("the evaluation text is too short")


def test_the_package_is_imported_without_torch() -> None:
    """The command line reads the default text from it."""
    code = "import sys, qbatch.worker.measuring; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_default_text_is_long_enough_for_the_default_protocol() -> None:
    assert 25_000 < DEFAULT_EVAL_TEXT.stat().st_size < 40_000


def test_steps_are_told_as_they_begin(tmp_path: Path) -> None:
    folder, steps = tiny.make_causal(tmp_path), list[str]()
    benchmark(
        loaded_on_cpu(folder),
        folder=folder,
        scheme=BASELINE.resolved(DType.BFLOAT16),
        dtype=DType.BFLOAT16,
        protocol=QUICK,
        eval_text=TEXT,
        on_step=steps.append,
    )
    assert steps == ["speed, round 1/1", "perplexity 1/3", "perplexity 2/3", "perplexity 3/3"]


def test_a_models_generation_defaults_change_nothing_and_are_restored(tmp_path: Path) -> None:
    """A model whose every token is its end token would stop at once, and beams would multiply the work."""
    folder = tiny.make_causal(tmp_path)
    loaded = loaded_on_cpu(folder)
    loaded.model.generation_config.eos_token_id = list(range(tiny.VOCAB_SIZE))
    loaded.model.generation_config.num_beams = 3
    before = loaded.model.generation_config
    measurement = benchmark(
        loaded,
        folder=folder,
        scheme=BASELINE.resolved(DType.BFLOAT16),
        dtype=DType.BFLOAT16,
        protocol=QUICK,
        eval_text=TEXT,
        on_step=lambda _step: None,
    )
    assert measurement.details.to_json()["stats"]["per_token"]["count"] == QUICK.new_tokens - 1
    assert loaded.model.generation_config is before
