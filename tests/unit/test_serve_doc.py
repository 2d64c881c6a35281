"""docs/howto/serve.md says of each loader what is known of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from qbatch.core.domain import DeviceKind, DType, JobSpec, Method, ProtocolOptions, Scheme, SourceRef
from qbatch.core.loaders.checkpoint_facts import CheckpointFacts
from qbatch.core.loaders.known_loaders import LOADERS
from qbatch.core.measured.loader_judgement import LoaderVerdict
from qbatch.core.sources import read_config, read_headers
from qbatch.scheduler.loader_warnings import loader_warnings
from tests.schemes import with_options
from tests.tiny import make_causal
from tests.unit.test_loaders import ENGINES, NF4

DOCS = (Path(__file__).parents[2] / "docs" / "howto" / "serve.md").read_text(encoding="utf-8")
# Words of the document → the loader.
NAMES = {
    "transformers": "transformers",
    "PEFT": "peft",
    "FSDP": "fsdp",
    "vLLM": "vllm",
    "SGLang": "sglang",
    "llama.cpp": "gguf",
    "sentence-transformers": "sentence-transformers",
}
METHOD = re.compile(r"\b(?:bnb|torchao)-\w+")


def table(head: str) -> list[list[str]]:
    """The cells of the rows under the line ``head``."""
    lines = DOCS[DOCS.index(head) :].splitlines()
    rows = [line.strip("|").split(" | ") for line in lines[2 : lines.index("")]]
    return [[cell.strip() for cell in row] for row in rows]


def named(cell: str) -> str:
    """The loader that a cell is about."""
    return NAMES[re.split(r"[ ,]", cell)[0].removesuffix("-QLoRA")]


def test_each_loader_is_there_with_its_version_and_date() -> None:
    rows = {named(name): (version, day) for name, version, _, day in table("| loader | version |")}
    assert rows.keys() == LOADERS.keys()
    for name, (version, day) in rows.items():
        assert day == LOADERS[name].read_on, name
        if name == "gguf":  # no release was read
            continue
        numbers = re.findall(r"\d[\d.]+", LOADERS[name].version)
        assert re.findall(r"\d[\d.]+", version) == numbers, name


# What torchao's methods write, of which loaders are told nothing beforehand.
_TORCHAO = {Method.TORCHAO_INT8: "Int8WeightOnlyConfig", Method.TORCHAO_INT4: "Int4WeightOnlyConfig"}


def written(scheme: Scheme) -> CheckpointFacts:
    """What a checkpoint of a Llama shows."""
    torchao = {"quant_method": "torchao", "quant_type": {"default": {"_type": _TORCHAO.get(scheme.method)}}}
    config = scheme.description.config_for_loaders(scheme.options, DType.BFLOAT16) or torchao
    return CheckpointFacts(
        config={"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "quantization_config": config},
        packed={"model.layers.0.mlp.down_proj"},
        kept=set(),
        experts=set(),
    )


def verdicts(loader: str) -> Mapping[str, LoaderVerdict]:
    """What a loader makes of each method."""
    judged = {method: LOADERS[loader].judge(written(Scheme(method=method))) for method in Method if method != "none"}
    return {method.value: LoaderVerdict(one.verdict or "") for method, one in judged.items()}


@pytest.mark.parametrize("row", table("| for | use | not |"), ids=lambda row: row[0])
def test_what_is_recommended_loads_and_what_is_advised_against_does_not(row: list[str]) -> None:
    target, use, leave = row
    found = verdicts(named(target))
    used = found if use == "any method" else METHOD.findall(use)
    assert {found[name] for name in used} <= {LoaderVerdict.LOADS}
    assert LoaderVerdict.LOADS not in {found[name] for name in METHOD.findall(leave)}
    assert bool(used) == (LoaderVerdict.LOADS in found.values()) or "--quant-storage" in use


def test_the_storage_of_codes_is_chosen_for_training_or_for_serving() -> None:
    facts = written(with_options(NF4, quant_storage="bfloat16"))
    loads = {name for name, loader in LOADERS.items() if loader.judge(facts).verdict == LoaderVerdict.LOADS}
    advised = {named(row[0]) for row in table("| for | use | not |") if "--quant-storage" in row[1]}
    against = {named(row[0]) for row in table("| for | use | not |") if "--quant-storage" in row[2]}
    assert advised <= loads
    assert against == {name for name, loader in LOADERS.items() if loader.is_engine}
    assert not against & loads


def test_the_families_are_those_that_are_tested() -> None:
    head = next(line for line in DOCS.splitlines() if line.startswith("| model | vLLM"))
    assert head == f"| model | vLLM {LOADERS['vllm'].version.split()[1].strip(',')} | {LOADERS['sglang'].version} |"
    rows = [(name.lower().replace("-", "_"), *cells) for names, *cells in table(head) for name in names.split(", ")]
    told = {name.replace("gpt_2", "gpt2").replace("nomic_bert", "nomic"): cells for name, *cells in rows}
    known = {model: (vllm, sglang) for model, scheme, vllm, sglang in ENGINES if scheme == NF4}
    assert told.keys() == known.keys()
    for name, verdicts_ in known.items():
        assert tuple(re.split("[:;]", cell)[0] for cell in told[name]) == verdicts_, name


@pytest.mark.parametrize("row", table("| `--skip-modules` | transformers"), ids=lambda row: row[0])
def test_skip_lists_mean_what_the_table_says(row: list[str], tmp_path: Path) -> None:
    folder = make_causal(tmp_path / "model", dtype="bfloat16")
    for pattern in re.findall(r"`([^`]+)`", row[0]):
        scheme = Scheme(method=Method.NF4, skip_modules=(pattern.replace("\\|", "|"),))
        spec = JobSpec(
            source=SourceRef(name="m", location=str(folder), is_folder=True),
            scheme=scheme,
            dtype=DType.AUTO,
            device=DeviceKind.CPU,
            protocol=ProtocolOptions(eval_text_sha256="0" * 64),
        )
        said = list(loader_warnings([spec], read_headers(folder), read_config(folder), DType.BFLOAT16))
        assert [line for line in said if "vLLM quantizes" in line] == (said[:1] if "quantizes them" in row[2] else [])
        assert bool(said) == ("quantizes them" in row[2]), pattern
