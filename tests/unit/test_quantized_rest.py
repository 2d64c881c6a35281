"""A loader that quantizes what a checkpoint leaves at 16 bits is found out, though rounding changes more than that."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.measured.loader_judgement import LoaderJudgement, LoaderVerdict
from qbatch.worker.checkpoints.trying.comparison_with_floor import TOP, compare
from qbatch.worker.checkpoints.trying.prediction_reference import PROMPTS, PredictionReference, make_reference
from qbatch.worker.checkpoints.trying.probe import top_logprobs
from qbatch.worker.checkpoints.trying.quantized_rest import QuantizedRest, quantized_rest
from qbatch.worker.checkpoints.trying.tried_loaders import try_loaders
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from tests.tiny import make_causal, make_encoder, make_tokenizer

NF4 = Scheme(method=Method.NF4)
ROUNDING = 0.01


def noise(size: float = ROUNDING) -> tuple[torch.Tensor, ...]:
    return tuple(size * torch.randn(200, 64) for _ in PROMPTS)


def sums(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(each + more for each, more in zip(one, other, strict=True))


def reference(change: float) -> PredictionReference:
    """Rounding changes each logit by ROUNDING or a little more, and quantizing the rest by ``change``, on average."""
    torch.manual_seed(0)
    exact = tuple(3 * torch.randn(200, 64) for _ in PROMPTS)
    return PredictionReference(
        tokens=((1,),) * 3,
        exact=exact,
        roundings=(sums(exact, noise()), sums(exact, noise(1.1 * ROUNDING))),
        is_logits=True,
        further=sums(exact, noise(change)),
        left=("q_proj",),
    )


def answer(logits: tuple[torch.Tensor, ...]) -> Mapping[str, Any]:
    return {"logprobs": [top_logprobs(each, TOP) for each in logits]}


def rest_of(own: PredictionReference, logits: tuple[torch.Tensor, ...]) -> QuantizedRest:
    found = quantized_rest(own, answer(logits))
    assert found is not None
    return found


def test_what_changes_less_than_rounding_is_found() -> None:
    """The mean distance alone does not tell it: it passes."""
    own = reference(0.3 * ROUNDING)
    quantizes, leaves = sums(own.further, noise()), sums(own.exact, noise())
    assert compare(own, answer(quantizes)).is_same
    assert rest_of(own, quantizes).share == pytest.approx(1, abs=0.2)
    assert rest_of(own, quantizes).is_quantized
    assert rest_of(own, leaves).share == pytest.approx(0, abs=0.2)
    assert rest_of(own, leaves).is_told
    assert not rest_of(own, leaves).is_quantized


@pytest.mark.parametrize("change", [0.0, ROUNDING / 100])
def test_what_rounding_hides_cannot_be_told(change: float) -> None:
    own = reference(change)
    for logits in (own.further, own.exact, own.roundings[0]):
        found = rest_of(own, logits)
        assert not found.is_told
        assert not found.is_quantized
        assert "cannot be told on this model" in str(found)


def test_a_checkpoint_that_leaves_nothing_has_no_rest() -> None:
    assert quantized_rest(replace(reference(ROUNDING), further=(), left=()), {}) is None


def write(source: Path, folder: Path, scheme: Scheme) -> Path:
    folder.mkdir()
    target = Target(scheme=scheme.resolved(DType.BFLOAT16), folder=folder)
    (outcome,) = write_checkpoints(source, [target], dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None)
    assert isinstance(outcome, Written)
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("arch", "scheme", "left"),
    [
        ("llama", NF4, ()),
        ("llama", replace(NF4, skip_modules=(".*self_attn",)), ("k_proj", "o_proj", "q_proj", "v_proj")),
        ("llama", Scheme(method=Method.INT8, skip_modules=("q_proj",)), ()),
        ("gpt2", NF4, ()),
        ("mixtral", NF4, ("down_proj", "gate_up_proj")),
    ],
)
def test_the_rest_is_what_an_engine_would_quantize(
    arch: str, scheme: Scheme, left: tuple[str, ...], tmp_path: Path
) -> None:
    """No embedding, head or router is. Beside int8 codes nothing is quantized while it is loaded."""
    found = make_reference(write(make_causal(tmp_path / "source", arch, dtype="bfloat16"), tmp_path / "out", scheme))
    assert found.left == left
    assert len(found.further) == (len(PROMPTS) if left else 0)


def test_vectors_have_no_rest(tmp_path: Path) -> None:
    scheme = replace(NF4, skip_modules=("query",))
    folder = write(make_encoder(tmp_path / "source", dtype="bfloat16"), tmp_path / "out", scheme)
    assert make_reference(folder).left == ()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that looks like vLLM, and quantizes each q_proj unless the environment has KEEPS."""
    place = tmp_path / "packages"
    (place / "vllm-1.0.dist-info").mkdir(parents=True)
    (place / "vllm-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 1.0\n")
    (place / "vllm.py").write_text(
        textwrap.dedent(
            """
            import os
            from types import SimpleNamespace

            import torch
            import transformers
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit


            def SamplingParams(**options):
                return options


            class LLM:
                def __init__(self, model, **options):
                    self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
                    for name, module in self.model.named_modules():
                        if name.endswith("q_proj") and "KEEPS" not in os.environ:
                            state = quantize_4bit(module.weight.data, compress_statistics=True, quant_type="nf4")
                            module.weight.data = dequantize_4bit(*state)

                def generate(self, prompts, sampling):
                    with torch.inference_mode():
                        return [self.predicted(prompt["prompt_token_ids"]) for prompt in prompts]

                def predicted(self, tokens):
                    values, found = self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1).topk(20)
                    steps = [
                        {token: SimpleNamespace(logprob=value) for token, value in zip(*step)}
                        for step in zip(found.tolist(), values.tolist())
                    ]
                    return SimpleNamespace(prompt_logprobs=[None, *steps[:-1]])
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(place))


def tried(source: Path, folder: Path) -> LoaderJudgement:
    return try_loaders(write(source, folder, replace(NF4, skip_modules=("q_proj",))), ("vllm",))["vllm"]


@pytest.mark.slow
@pytest.mark.usefixtures("engine")
def test_an_engine_that_quantizes_the_rest_loads_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    found = tried(source, tmp_path / "out")
    assert found.verdict == LoaderVerdict.DIFFERS, found
    assert "it quantizes q_proj, left at 16 bits" in str(found.reasons)
    monkeypatch.setenv("KEEPS", "1")
    found = tried(source, tmp_path / "other")
    assert found.verdict == LoaderVerdict.LOADS, found
    assert "it leaves q_proj at 16 bits" in str(found.reasons)


@pytest.mark.slow
@pytest.mark.usefixtures("engine")
def test_an_engine_is_not_judged_where_quantizing_changes_nothing(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    weights = load_file(source / "model.safetensors")
    powers = {name: torch.full_like(each, 0.25) for name, each in weights.items() if "q_proj" in name}
    save_file(weights | powers, source / "model.safetensors", {"format": "pt"})
    found = tried(source, tmp_path / "out")
    assert found.verdict == LoaderVerdict.UNKNOWN, found
    assert "cannot be told on this model" in str(found.reasons)
    assert found.advice
