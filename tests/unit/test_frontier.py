"""The frontier: every point is a measurement of its own, its bytes are those of its checkpoint, and it beats chance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from benchmarks.mixtures import compare, first_and_last, random_mixtures
from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.search.frontier import Frontier
from qbatch.core.search.search_protocol import SearchProtocol
from qbatch.worker.measuring import DEFAULT_EVAL_TEXT
from qbatch.worker.measuring.unloaded_size import count_unloaded
from qbatch.worker.models.load import LoadedModel, load
from qbatch.worker.quantizing.planning.skeleton import build_skeleton, skip_list_of_source
from qbatch.worker.searching import DEFAULT_SEARCH_TEXT
from qbatch.worker.searching.chosen_scheme import with_skip_lists
from qbatch.worker.searching.frontier_search import find_frontier, same_kl_as_earlier
from qbatch.worker.searching.opened_search import OpenedSearch, opened_search
from qbatch.worker.searching.search_probes import search_probes
from qbatch.worker.searching.sensitivity_search import measure_sensitivity
from tests import tiny
from tests.plain_reference import save_reference

pytestmark = pytest.mark.slow

NF4 = Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16)
PROTOCOL = SearchProtocol(text_sha256="0" * 64, window=128, windows=6)


def opened(source: Path, text: Path = DEFAULT_SEARCH_TEXT) -> tuple[LoadedModel, OpenedSearch]:
    loaded = load(source, dtype=DType.BFLOAT16, device="cpu")
    probes = search_probes(loaded, PROTOCOL, text.read_text(encoding="utf-8"))
    return loaded, opened_search(loaded, probes, NF4).__enter__()


@pytest.fixture(scope="module")
def searched(trained_source: Path) -> tuple[OpenedSearch, Frontier]:
    _, search = opened(trained_source)
    return search, find_frontier(search, measure_sensitivity(search, PROTOCOL), PROTOCOL)


def test_the_frontier_goes_from_everything_quantized_to_16_bits(searched: tuple[OpenedSearch, Frontier]) -> None:
    search, frontier = searched
    assert [len(point.added) for point in frontier.points] == [0] + [1] * 16
    assert {name for point in frontier.points for name in point.added} == search.groups.keys()
    sizes = [point.weights_bytes for point in frontier.points]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == search.bytes_at_16_bits
    # Summed differences would leave nine hundredths of the KL here.
    assert frontier.points[-1].kl.mean == 0


def test_each_point_is_what_measuring_its_mixture_gives(searched: tuple[OpenedSearch, Frontier]) -> None:
    search, frontier = searched
    kept: set[str] = set()
    before = None
    for point in frontier.points[:6]:
        kept |= set(point.added)
        alone = search.measure(kept, keep_outputs=False)
        assert (point.kl, point.ln_ppl_ratio) == (alone.kl, alone.ln_ppl_ratio)
        assert point.gain == (None if before is None else alone.gain_over(before))
        assert set(point.modules) == {module for name in kept for module in search.groups[name].modules}
        before = alone


def test_no_mixture_is_looked_for_below_what_16_bit_arithmetic_causes(trained_source: Path) -> None:
    _, search = opened(trained_source)
    assert search.floor_kl is None, "on a CPU a search computes in float32"
    sensitivity = measure_sensitivity(search, PROTOCOL)
    search.floor_kl = sensitivity.kl.mean / 2
    frontier = find_frontier(search, sensitivity, PROTOCOL)
    kl = [point.kl.mean for point in frontier.points]
    assert kl[-1] <= search.floor_kl < kl[-2]
    assert frontier.floor_kl == search.floor_kl


def test_mixtures_that_their_windows_cannot_tell_apart_are_alike() -> None:
    rows = [10, 10, 10, 10]
    first, second = [4.0, 2.0, 3.0, 3.0], [3.0, 1.0, 2.0, 2.0]
    about_second = [3.1, 0.8, 2.1, 1.9]
    assert same_kl_as_earlier([first, second], rows, None) is None, "each window has 0.1 less"
    assert same_kl_as_earlier([first, second, about_second], rows, None) == 1
    assert same_kl_as_earlier([first, second], rows, 0.25) is None, "one is above the floor"
    assert same_kl_as_earlier([first, second], rows, 0.3) == 0
    assert same_kl_as_earlier([first, first], rows, None) == 0


def test_a_frontier_read_from_json_is_the_same(searched: tuple[OpenedSearch, Frontier]) -> None:
    assert Frontier.from_json(json.loads(json.dumps(searched[1].to_json()))) == searched[1]


def test_the_greedy_mixture_beats_random_ones_on_another_text(
    trained_source: Path, searched: tuple[OpenedSearch, Frontier]
) -> None:
    _, judged = opened(trained_source, DEFAULT_EVAL_TEXT)
    (row,) = compare(judged, searched[1], fractions=(0.25,), random_sets=20)
    assert row.random_sets == 20
    assert row.percentile is not None
    assert row.percentile >= 95
    assert 0.2 <= row.fraction <= 0.25
    assert row.first_and_last_fraction <= row.fraction


def test_random_and_outer_sets_keep_to_the_bytes(searched: tuple[OpenedSearch, Frontier]) -> None:
    groups = searched[0].groups
    size = sum(group.extra_bytes for group in groups.values()) // 2
    sets = list(random_mixtures(groups, size, 10))
    assert len(set(map(frozenset, sets))) == 10
    for kept in sets:
        assert sum(groups[name].extra_bytes for name in kept) == pytest.approx(size, rel=0.02)
    outer = first_and_last(list(groups.values()), size)
    assert {groups[name].layer for name in outer} == {"model.layers.0", "model.layers.3"}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
def test_a_point_is_published_with_its_bytes_and_its_layers(tmp_path: Path, arch: str) -> None:
    source = tiny.make_causal(tmp_path / "source", arch, dtype="bfloat16")
    loaded, search = opened(source)
    frontier = find_frontier(search, measure_sensitivity(search, PROTOCOL), PROTOCOL)
    (point,) = with_skip_lists(
        type(loaded.model), loaded.model.config, NF4, replace(frontier, points=frontier.points[3:4])
    ).points
    chosen = replace(NF4, skip_modules=point.skip_list)
    skips = list(chosen.skip_modules)
    folder = save_reference(source, tmp_path / "published", chosen, DType.BFLOAT16, skips=skips)
    assert count_unloaded(folder, DType.BFLOAT16).size.weights_bytes == point.weights_bytes
    published = transformers.AutoModelForCausalLM.from_pretrained(folder)
    quantized = {name for name, module in published.named_modules() if type(module).__name__ == "Linear4bit"}
    members = {module for group in search.groups.values() for module in group.modules}
    assert quantized == members - set(point.modules)
    # A submission that names this list is the same scheme.
    assert skip_list_of_source(source, chosen.skip_modules, DType.BFLOAT16) == chosen.skip_modules


def test_what_is_published_has_something_quantized(tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path / "source", dtype="bfloat16", num_hidden_layers=1)
    loaded, search = opened(source)
    frontier = find_frontier(search, measure_sensitivity(search, PROTOCOL), PROTOCOL)
    cls, config = type(loaded.model), loaded.model.config
    listed = with_skip_lists(cls, config, NF4, frontier)
    assert [point.added for point in listed.points] == [point.added for point in frontier.points[:-1]]
    assert listed.points[0].skip_list == ()
    for point in listed.points:
        scheme = replace(NF4, skip_modules=point.skip_list)
        # The names that engines give to fused layers are no mistakes of anybody.
        assert build_skeleton(source, scheme, DType.BFLOAT16, "cpu").idle_skips == ()


def test_everything_quantized_is_the_plain_scheme(searched: tuple[OpenedSearch, Frontier]) -> None:
    model = searched[0].loaded.model
    first = with_skip_lists(type(model), model.config, NF4, searched[1]).points[0]
    assert replace(NF4, skip_modules=first.skip_list) == NF4
