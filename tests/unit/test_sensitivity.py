"""Sensitivities against finite differences, brute force with bitsandbytes itself, and statistics in NumPy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qbatch.core.domain import DeviceKind, DType, Method, Protocol, ProtocolOptions, Scheme
from qbatch.core.errors import Unsupported
from qbatch.core.search.search_protocol import SearchProtocol
from qbatch.core.search.sensitivity import Estimate, Sensitivity
from qbatch.worker.measuring.quality.divergence import divergence
from qbatch.worker.measuring.quality.probes import Probe, probes_of
from qbatch.worker.measuring.quality.replay import logits_of
from qbatch.worker.measuring.stats import rank_correlation
from qbatch.worker.methods.bnb_weights import WEIGHTS
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel, load
from qbatch.worker.quantizing.planning.skeleton import quantized_linears
from qbatch.worker.searching import DEFAULT_SEARCH_TEXT
from qbatch.worker.searching.backward_memory import backward_bytes
from qbatch.worker.searching.derivative_screen import window_slopes
from qbatch.worker.searching.layer_groups import model_layers
from qbatch.worker.searching.mixed_model import MixedModel
from qbatch.worker.searching.opened_search import OpenedSearch, opened_search
from qbatch.worker.searching.rounded_weight import rounded_weight
from qbatch.worker.searching.sensitivity_search import measure_sensitivity
from tests import tiny
from tests.plain_reference import load_quantized
from tests.schemes import with_options
from tests.shrunk import make, shrunk_config

pytestmark = pytest.mark.slow

NF4 = Scheme(method=Method.NF4, compute_dtype=DType.FLOAT32)
TEXT = DEFAULT_SEARCH_TEXT.read_text(encoding="utf-8")
EVERYTHING = SearchProtocol(text_sha256="0" * 64, least_passes=1e6)


SHORT = [Probe(ids=tuple(range(start, start + 24))) for start in (10, 40)]


def shrunk(model_type: str, cls: str, **fields: Any) -> LoadedModel:
    model = make(getattr(transformers, cls), shrunk_config(model_type, dtype="float32", **fields)).eval()
    return LoadedModel(model=model, tokenizer=None, kind=ModelKind.CAUSAL_LM, load_model_s=0.0, device="cpu")


def windows(count: int, tokens: int) -> Protocol:
    options = ProtocolOptions(eval_text_sha256="0" * 64)
    return replace(options.for_device(DeviceKind.CPU), eval_window=tokens, eval_stride=tokens, eval_max_windows=count)


def loaded(folder: Path, dtype: DType = DType.FLOAT32) -> LoadedModel:
    return load(folder, dtype=dtype, device="cpu")


def probes(model: LoadedModel, count: int = 3, tokens: int = 48) -> list[Probe]:
    return probes_of(model, windows(count, tokens), TEXT)[:count]


def mean(figure: Estimate | None) -> float:
    assert figure is not None
    return figure.mean


def error(figure: Estimate | None) -> float:
    assert figure is not None
    assert figure.standard_error is not None
    return figure.standard_error


def made(folder: Path, arch: str) -> Path:
    if arch in tiny.SEQ2SEQ_ARCHS:
        # Where a ReLU bends, a finite difference is not the derivative.
        smooth = {"feed_forward_proj": "gated-gelu"} if arch == "t5" else {}
        return tiny.make_seq2seq(folder, arch, **smooth)
    return tiny.make_encoder(folder, "masked-lm") if arch == "bert" else tiny.make_causal(folder, arch)


@pytest.fixture(scope="module")
def searched(trained_source: Path) -> Iterator[tuple[OpenedSearch, Sensitivity]]:
    """Every group of the trained model is measured, whether or not its place is open."""
    model = loaded(trained_source)
    with opened_search(model, probes(model, 6, 128), NF4) as search:
        yield search, measure_sensitivity(search, EVERYTHING, memory_bytes=0)


@pytest.fixture(scope="module")
def screened(trained_source: Path) -> Sensitivity:
    model = loaded(trained_source)
    with opened_search(model, probes(model, 6, 128), NF4) as search:
        return measure_sensitivity(search, EVERYTHING)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "bloom", "t5", "bert"])
def test_the_derivative_is_that_of_finite_differences(tmp_path: Path, arch: str) -> None:
    model = loaded(made(tmp_path, arch))
    probe = probes(model, 1)[0]
    packing = WEIGHTS.packing(NF4)
    names = quantized_linears(type(model.model), model.model.config)
    layers = model_layers(model.model, names, probe, "cpu", packing)
    if arch != "mixtral":  # the kernel of its experts does not take float64
        model.model.double()
    exact = logits_of(model.model, probe, "cpu")
    mixed = MixedModel(model.model, layers.groups, packing, copies="cpu")
    mixed.keep(frozenset())
    found = window_slopes(mixed, probe, "cpu", exact).slopes
    for group in layers.groups[::2]:
        slope = sum(found[name] for name in group.modules)
        assert slope == pytest.approx(finite_difference(mixed, group.modules, probe, exact), rel=1e-3)
    assert not any(parameter.grad is not None for parameter in model.model.parameters())


def finite_difference(mixed: MixedModel, names: Sequence[str], probe: Probe, exact: torch.Tensor) -> float:
    step = 1e-2  # norms compute in float32, which a much smaller one would show
    start = {name: mixed.linears()[name].weight.data for name in names}
    changes = {name: mixed.change(name) for name in names}
    values = []
    for factor in (step, -step, 0.0):
        for name in names:
            mixed.linears()[name].weight.data = start[name] + factor * changes[name]
        values.append(float(divergence(exact, logits_of(mixed.model, probe, "cpu")).kl.sum()))
    return (values[0] - values[1]) / (2 * step)


def numpy_kl(exact: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    def log_softmax(each: torch.Tensor) -> np.ndarray:
        shifted = np.asarray(each, dtype=np.float64) - np.asarray(each, dtype=np.float64).max(1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))

    p, q = log_softmax(exact), log_softmax(logits)
    return np.asarray((np.exp(p) * (p - q)).sum(1))


def numpy_estimate(sums: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """The mean over all rows and its error by the linearised variance of a ratio, the plain way."""
    count, mean = len(sums), sums.sum() / rows.sum()
    return float(mean), float(np.sqrt(count / (count - 1) * ((sums - rows * mean) ** 2).sum()) / rows.sum())


def brute_force(source: Path, skips: list[str], given: Sequence[Probe]) -> list[torch.Tensor]:
    model = load_quantized(source, NF4, DType.FLOAT32, skips=["lm_head", *skips]).eval()
    for module in model.modules():
        # The packed kernel computes in bfloat16.
        module.support_avx512bf16_for_cpu = False
    return [logits_of(model, probe, "cpu") for probe in given]


def test_sensitivities_are_those_of_brute_force(
    trained_source: Path, searched: tuple[OpenedSearch, Sensitivity]
) -> None:
    search, sensitivity = searched
    model = loaded(trained_source)
    exact = [logits_of(model.model, probe, "cpu") for probe in search.probes]
    rows = np.array([len(each) for each in exact])

    def kl(skips: Sequence[str]) -> np.ndarray:
        quantized = brute_force(trained_source, list(skips), search.probes)
        return np.array([numpy_kl(*pair).sum() for pair in zip(exact, quantized, strict=True)])

    everything = kl(())
    assert (sensitivity.kl.mean, sensitivity.kl.standard_error) == pytest.approx(
        numpy_estimate(everything, rows), rel=1e-3
    )
    for each in sensitivity.groups[::3]:
        assert each.measured is not None
        expected = numpy_estimate(everything - kl(each.group.modules), rows)
        assert (each.measured.mean, each.measured.standard_error) == pytest.approx(expected, rel=5e-3, abs=2e-6)


def test_one_backward_pass_ranks_like_measuring_every_group(
    searched: tuple[OpenedSearch, Sensitivity], screened: Sensitivity
) -> None:
    measured = {each.group.name: each for each in searched[1].groups}
    predicted = [each.group.per_byte(mean(each.derivative)) for each in screened.groups]
    truth = [each.group.per_byte(mean(measured[each.group.name].measured)) for each in screened.groups]
    assert rank_correlation(predicted, truth) > 0.8
    assert len(predicted) == 16


def test_what_was_measured_after_screening_is_paired_and_reported(screened: Sensitivity) -> None:
    compared = [each for each in screened.groups if each.measured is not None]
    assert screened.compared_groups == len(compared) == sum(each.is_open for each in screened.groups)
    assert screened.rank_correlation == pytest.approx(
        rank_correlation(
            [each.group.per_byte(mean(each.derivative)) for each in compared],
            [each.group.per_byte(mean(each.measured)) for each in compared],
        )
    )
    # Of two models on the same windows the difference is known far better than either.
    assert max(error(each.measured) for each in compared) < error(screened.kl)
    gains = [*map(screened.gain_per_byte, screened.groups)]
    assert gains == sorted(gains, reverse=True)


def test_without_room_for_a_backward_pass_every_group_is_measured(
    searched: tuple[OpenedSearch, Sensitivity],
) -> None:
    _, sensitivity = searched
    assert sensitivity.why_no_derivative is not None
    assert sensitivity.why_no_derivative.startswith("a backward pass over 128 tokens is predicted to take ")
    assert all(each.derivative is None and each.measured is not None for each in sensitivity.groups)
    assert sensitivity.rank_correlation is None


def test_measuring_stops_at_the_passes_that_are_allowed(trained_source: Path) -> None:
    model = loaded(trained_source)
    with opened_search(model, probes(model), NF4) as search:
        sensitivity = measure_sensitivity(search, replace(EVERYTHING, least_passes=5.5, passes_per_group=0.0))
    assert 4.75 < sensitivity.forward_passes <= 5.5
    unmeasured = [each for each in sensitivity.groups if each.is_open and each.measured is None]
    assert unmeasured
    assert sensitivity.slope_scale is not None
    assert sensitivity.gain(unmeasured[0]) == mean(unmeasured[0].derivative) * sensitivity.slope_scale


def test_sensitivities_survive_json(screened: Sensitivity, searched: tuple[OpenedSearch, Sensitivity]) -> None:
    for sensitivity in (screened, searched[1]):
        assert Sensitivity.from_json(json.loads(json.dumps(sensitivity.to_json()))) == sensitivity


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom", "gpt_neox", "opt", "t5", "bart", "bert"])
def test_a_pass_that_skips_the_blocks_before_a_group_gives_the_same(tmp_path: Path, arch: str) -> None:
    model = loaded(made(tmp_path, arch))
    with opened_search(model, probes(model, 2, 32), NF4) as search:
        name = max(search.groups, key=lambda group: search.layers.start[group])
        assert search.cost(name) < 1
        quantized = search.measure(frozenset(), keep_outputs=True)
        beside = search.measure({name}, beside=quantized, changed=name, keep_outputs=True)
        assert beside.kl_sums == search.measure({name}, keep_outputs=False).kl_sums
        first = next(iter(search.groups))
        both = search.measure({name, first}, beside=beside, changed=first, keep_outputs=False)
        assert both.kl_sums == search.measure({name, first}, keep_outputs=False).kl_sums


def test_blocks_that_hand_on_more_than_their_output_run_in_every_pass() -> None:
    """The last two of these read the keys of an earlier one, which raised a KeyError where that was skipped."""
    sizes = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [256] * 4}
    kinds = {"layer_types": ["full_attention"] * 4, "activation_sparsity_pattern": [0.0] * 4}
    model = shrunk("gemma3n_text", "Gemma3nForCausalLM", **sizes, **kinds)
    with opened_search(model, SHORT, NF4) as search:
        name = max(search.groups, key=lambda group: list(search.groups).index(group))
        assert search.cost(name) == 1
        quantized = search.measure(frozenset(), keep_outputs=True)
        beside = search.measure({name}, beside=quantized, changed=name, keep_outputs=True)
        assert beside.kl_sums == search.measure({name}, keep_outputs=False).kl_sums


def test_a_state_that_a_block_leaves_in_the_model_is_noticed() -> None:
    model = shrunk("llama", "LlamaForCausalLM")
    first, last = model.model.model.layers

    def remember(_module: Any, _args: Any, output: torch.Tensor) -> None:
        model.model.kept_state = output.mean()

    first.mlp.register_forward_hook(remember)
    last.register_forward_hook(lambda _module, _args, output: output + model.model.kept_state)
    with opened_search(model, SHORT, NF4) as search:
        assert search.layers.blocks == ()


def test_layers_that_run_without_gradients_have_no_slope() -> None:
    """Those that choose which keys are attended to, in DeepSeek V3.2; a hook on what they give ended the search."""
    model = shrunk("deepseek_v32", "DeepseekV32ForCausalLM")
    with opened_search(model, SHORT, NF4) as search:
        sensitivity = measure_sensitivity(search, EVERYTHING)
    indexers = [each for each in sensitivity.groups if "indexer" in each.group.name]
    assert indexers
    assert sensitivity.why_no_derivative is None
    for each in indexers:
        assert mean(each.derivative) == 0
        assert each.measured is not None


def test_the_model_has_its_own_weights_again_after_a_search(tmp_path: Path) -> None:
    model = loaded(tiny.make_causal(tmp_path, dtype="bfloat16"), DType.BFLOAT16)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    with opened_search(model, probes(model), NF4) as search:
        search.measure(frozenset(), keep_outputs=False)
        changed = model.model.state_dict()["model.layers.0.mlp.down_proj.weight"]
        assert not torch.equal(changed, before["model.layers.0.mlp.down_proj.weight"].float())
    assert all(torch.equal(tensor, before[name].float()) for name, tensor in model.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.model.parameters())


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_rounded_weight_is_what_bitsandbytes_computes_with(tmp_path: Path, double_quant: bool) -> None:
    import bitsandbytes as bnb

    scheme = with_options(NF4, double_quant=double_quant)
    source = tiny.make_causal(tmp_path, "gpt2")
    quantized = load_quantized(source, scheme, DType.FLOAT32)
    model = loaded(source)
    with opened_search(model, probes(model), scheme) as search:
        search.mixed.keep(frozenset())
        for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
            weight = quantized.get_submodule(name).weight
            restored = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.allclose(model.model.get_submodule(name).weight.data, restored.t(), rtol=1e-6, atol=0)


def test_weight_errors_are_those_of_numpy(tmp_path: Path) -> None:
    model = loaded(tiny.make_causal(tmp_path))
    with opened_search(model, probes(model), NF4) as search:
        name = "model.layers.0.self_attn.q_proj+k_proj+v_proj"
        errors = search.mixed.errors[name]
        modules = search.groups[name].modules
        exact = [np.asarray(model.model.get_submodule(each).weight.detach(), dtype=np.float64) for each in modules]
        search.mixed.keep(frozenset())
        rounded = [np.asarray(model.model.get_submodule(each).weight.detach(), dtype=np.float64) for each in modules]

    def relative(others: Sequence[np.ndarray]) -> float:
        squares = sum(((one - other) ** 2).sum() for one, other in zip(exact, others, strict=True))
        return math.sqrt(squares / sum((one**2).sum() for one in exact))

    def evenly(weight: np.ndarray, bits: int) -> np.ndarray:
        levels = np.linspace(weight.min(), weight.max(), 2**bits)
        return np.asarray(levels[np.abs(weight[..., None] - levels).argmin(-1)])

    assert errors.quantized == pytest.approx(relative(rounded), rel=1e-5)
    assert errors.min_max_4_bits == pytest.approx(relative([evenly(each, 4) for each in exact]), rel=1e-4)
    assert errors.min_max_8_bits == pytest.approx(relative([evenly(each, 8) for each in exact]), rel=1e-4)
    assert errors.min_max_8_bits < errors.quantized < errors.min_max_4_bits


def test_a_weight_of_one_value_loses_nothing_by_evenly_spaced_levels() -> None:
    errors = rounded_weight(torch.full((4, 64), 0.3), WEIGHTS.packing(NF4)).errors
    assert errors.min_max_4_bits == errors.min_max_8_bits == 0


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_large_weight_is_rounded_like_a_small_one(double_quant: bool) -> None:
    import bitsandbytes as bnb

    weight = torch.randn(700, 1000, generator=torch.Generator().manual_seed(2))
    rounded = rounded_weight(weight, WEIGHTS.packing(with_options(NF4, double_quant=double_quant)))
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    assert torch.allclose(rounded.values, bnb.functional.dequantize_4bit(codes, state), rtol=1e-6, atol=0)
    assert rounded.errors.values == pytest.approx(float(weight.double().square().sum()), rel=1e-4)


def test_the_predicted_memory_of_a_backward_pass_grows_with_the_window(tmp_path: Path) -> None:
    model = loaded(tiny.make_causal(tmp_path))
    with opened_search(model, probes(model, 1, 400), NF4) as search:
        search.mixed.keep(frozenset())
        long, short = search.probes[0], replace(search.probes[0], ids=search.probes[0].ids[:100], rows=None)
        needed, less = (backward_bytes(search.mixed, probe, "cpu") for probe in (long, short))
        assert 3 < needed / less < 10
        assert needed > kept_bytes(search.mixed, long)


def kept_bytes(mixed: MixedModel, probe: Probe) -> int:
    """What a whole pass really keeps."""
    storages: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.data_ptr() for parameter in mixed.model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = mixed.model(**probe.inputs(mixed.model, "cpu")).logits
        return sum(storage.nbytes() for storage in storages.values()) if logits.requires_grad else 0


def test_a_rank_correlation_is_that_of_scipy_with_ties() -> None:
    generator = np.random.default_rng(5)
    first, second = (generator.integers(0, 6, 40).astype(float).tolist() for _ in range(2))
    assert rank_correlation(first, second) == pytest.approx(spearman(first, second), abs=1e-12)
    assert rank_correlation([1.0, 2.0, 3.0], [2.0, 4.0, 9.0]) == pytest.approx(1.0)
    assert math.isnan(rank_correlation([1.0, 1.0], [1.0, 2.0]))
    assert math.isnan(rank_correlation([1.0, math.nan], [1.0, 2.0]))


def spearman(first: list[float], second: list[float]) -> float:
    def ranks(values: list[float]) -> np.ndarray:
        array = np.array(values)
        return np.array([(array < value).sum() + ((array == value).sum() + 1) / 2 for value in array])

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def test_what_cannot_be_searched_is_said(tmp_path: Path) -> None:
    encoder = loaded(tiny.make_encoder(tmp_path / "bert"))
    with pytest.raises(Unsupported, match="BertModel predicts nothing"), opened_search(encoder, [], NF4):
        pass
    causal = loaded(tiny.make_causal(tmp_path / "llama"))
    given: Any = probes(causal)
    with (
        pytest.raises(Unsupported, match="nothing but weights, not for bnb-int8"),
        opened_search(causal, given, Scheme(method=Method.INT8, compute_dtype=DType.FLOAT32)),
    ):
        pass
    with (
        pytest.raises(Unsupported, match="quantizes no layer of LlamaForCausalLM"),
        opened_search(causal, given, replace(NF4, skip_modules=("model.*",))),
    ):
        pass
