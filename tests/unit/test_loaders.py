"""What each loader makes of a checkpoint, over checkpoints that qbatch has written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from qbatch.cli import main
from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.loaders.checkpoint_facts import CheckpointFacts
from qbatch.core.loaders.engine_names import EngineArchitecture
from qbatch.core.loaders.known_loaders import LOADERS, judge_folder
from qbatch.core.loaders.skip_list import SkippedLayers
from qbatch.core.loaders.skip_rules import transformers_skips
from qbatch.core.measured.loader_judgement import LoaderJudgement, LoaderVerdict
from qbatch.views.loader_judgements import JudgedCheckpoint, judgement_text
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from tests.schemes import with_options
from tests.tiny import make_causal, make_encoder, make_fused_qkv, make_seq2seq

NF4 = Scheme(method=Method.NF4)
INT8 = Scheme(method=Method.INT8)
LOADS, DIFFERS, REFUSES, UNKNOWN = (
    LoaderVerdict.LOADS,
    LoaderVerdict.DIFFERS,
    LoaderVerdict.REFUSES,
    LoaderVerdict.UNKNOWN,
)

Make = Callable[[Path], Path]


def make_classifier(folder: Path) -> Path:
    """A Llama whose last layer, the classifier, transformers leaves at 16 bits by itself."""
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**shape, intermediate_size=256, vocab_size=512, num_labels=3)
    transformers.LlamaForSequenceClassification(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_vision_language(folder: Path) -> Path:
    """A Qwen2-VL, whose modules vLLM calls by other names."""
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2}
    text = shape | {"intermediate_size": 256, "vocab_size": 512}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


MODELS: Mapping[str, Make] = {
    "llama": lambda folder: make_causal(folder, dtype="bfloat16"),
    "qwen2": lambda folder: make_causal(folder, "qwen2", dtype="bfloat16"),
    "mixtral": lambda folder: make_causal(folder, "mixtral", dtype="bfloat16"),
    "gpt2": lambda folder: make_causal(folder, "gpt2", dtype="bfloat16"),
    "gpt_neox": lambda folder: make_causal(folder, "gpt_neox", dtype="bfloat16"),
    "opt": lambda folder: make_causal(folder, "opt", dtype="bfloat16"),
    "t5": lambda folder: make_seq2seq(folder, "t5", dtype="bfloat16"),
    "bert": lambda folder: make_encoder(folder, dtype="bfloat16"),
    "nomic": lambda folder: make_fused_qkv(folder, dtype="bfloat16"),
    "classifier": lambda folder: make_classifier(folder),
    "qwen2_vl": lambda folder: make_vision_language(folder),
}


def write(source: Path, folder: Path, scheme: Scheme) -> Path:
    folder.mkdir()
    target = Target(scheme=scheme.resolved(DType.BFLOAT16), folder=folder)
    (outcome,) = write_checkpoints(source, [target], dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None)
    assert isinstance(outcome, Written), outcome
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Scheme], Path]:
    """A checkpoint of one of MODELS, written once for all tests."""
    base = tmp_path_factory.mktemp("loaders")
    written: dict[tuple[str, Scheme], Path] = {}

    def make(model: str, scheme: Scheme = NF4) -> Path:
        source = base / model
        if not source.exists():
            MODELS[model](source)
        if (model, scheme) not in written:
            written[model, scheme] = write(source, base / f"written-{len(written)}", scheme)
        return written[model, scheme]

    return make


def judge(folder: Path) -> dict[str, LoaderJudgement]:
    return judge_folder(folder, LOADERS)


def verdicts(folder: Path) -> dict[str, str | None]:
    return {name: one.verdict for name, one in judge(folder).items()}


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


ENGINES = [
    ("llama", NF4, LOADS, LOADS),
    ("llama", INT8, LOADS, LOADS),
    ("qwen2", NF4, LOADS, LOADS),
    ("mixtral", NF4, DIFFERS, REFUSES),
    ("mixtral", INT8, REFUSES, REFUSES),
    ("gpt2", NF4, REFUSES, REFUSES),
    ("gpt_neox", NF4, UNKNOWN, REFUSES),
    ("opt", NF4, LOADS, REFUSES),
    ("t5", NF4, UNKNOWN, REFUSES),
    ("bert", NF4, LOADS, REFUSES),
    ("nomic", NF4, REFUSES, REFUSES),
    ("qwen2_vl", NF4, LOADS, LOADS),
]
"""What vLLM and SGLang make of MODELS."""


@pytest.mark.parametrize(("model", "scheme", "vllm", "sglang"), ENGINES)
def test_serving_engines_over_ten_families(
    model: str, scheme: Scheme, vllm: LoaderVerdict, sglang: LoaderVerdict, checkpoint: Callable[..., Path]
) -> None:
    found = judge(checkpoint(model, scheme))
    assert (found["vllm"].verdict, found["sglang"].verdict) == (vllm, sglang), found
    for one in found.values():
        assert one.version
        assert one.reasons or one.verdict is LOADS
        assert one.advice or one.verdict is not REFUSES
    assert found["transformers"].verdict == found["peft"].verdict == LOADS
    assert found["fsdp"].verdict == found["gguf"].verdict == REFUSES


@pytest.mark.parametrize(
    "pattern", ["down_proj", "mlp.down_proj", ".*self_attn", "model.layers.(1|2)", "(gate|up)_proj"]
)
@pytest.mark.parametrize("scheme", [NF4, INT8])
def test_a_skip_list_is_understood_by_engines(scheme: Scheme, pattern: str, checkpoint: Callable[..., Path]) -> None:
    found = verdicts(checkpoint("llama", replace(scheme, skip_modules=(pattern,))))
    assert found["vllm"] == found["sglang"] == LOADS


def test_where_no_list_means_the_same_to_both_it_is_said() -> None:
    """transformers would also take the name for the end of another one, so an expression is listed."""
    kept, packed = {"tower.fc1"}, {"tower.fc2", "side_tower.fc1"}
    listed = sorted(SkippedLayers(kept | packed, kept, EngineArchitecture()).entries())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": listed},
    }
    facts = CheckpointFacts(config=config, packed=packed, kept=kept, experts=set())
    assert [name for name in kept | packed if transformers_skips(listed)(name)] == ["tower.fc1"]
    assert LOADERS["vllm"].judge(facts).verdict == DIFFERS


@pytest.mark.parametrize("pattern", [".*self_attn", ".*visual", "model.language_model.layers.1", "down_proj"])
def test_a_renamed_skip_list_is_understood_by_vllm(pattern: str, checkpoint: Callable[..., Path]) -> None:
    assert verdicts(checkpoint("qwen2_vl", replace(NF4, skip_modules=(pattern,))))["vllm"] == LOADS


def test_what_transformers_skips_by_itself_engines_do_not_know(checkpoint: Callable[..., Path]) -> None:
    found = judge(checkpoint("classifier"))["vllm"]
    assert found.verdict == DIFFERS
    assert found.advice is not None
    assert "quantize it again with --skip-modules score, which lists the full names" in found.advice
    assert verdicts(checkpoint("classifier", replace(NF4, skip_modules=("score",))))["vllm"] == LOADS


@pytest.mark.parametrize("pattern", ["q_proj", "gate_proj", "model.layers.1.mlp.gate_proj"])
def test_a_part_of_a_group_is_quantized_in_silence(pattern: str, checkpoint: Callable[..., Path]) -> None:
    found = judge(checkpoint("llama", replace(NF4, skip_modules=(pattern,))))
    assert found["vllm"].verdict == DIFFERS
    assert found["sglang"].verdict == REFUSES
    (*_, first) = reversed(found["vllm"].reasons or ())
    assert "without a message" in first
    assert "proj is one layer there: use --skip-modules" in str(found["vllm"].advice)


@pytest.mark.parametrize("pattern", ["mlp.down_proj", ".*self_attn", "model.layers.(0|11)"])
def test_a_list_that_only_transformers_understands_is_found_out(
    pattern: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """As qbatch published it before, and as others still do."""
    folder = checkpoint("llama", replace(NF4, skip_modules=(pattern,)))
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    set_config(other, llm_int8_skip_modules=["lm_head", pattern])
    assert verdicts(other)["vllm"] == DIFFERS
    assert verdicts(other)["transformers"] == LOADS


@pytest.mark.parametrize(
    ("scheme", "fsdp", "vllm"),
    [
        (NF4, REFUSES, LOADS),
        (with_options(NF4, quant_storage="bfloat16"), LOADS, REFUSES),
        (with_options(NF4, quant_storage="float32"), REFUSES, REFUSES),
        (INT8, REFUSES, LOADS),
    ],
)
def test_the_storage_of_codes_suits_training_or_serving(
    scheme: Scheme, fsdp: LoaderVerdict, vllm: LoaderVerdict, checkpoint: Callable[..., Path]
) -> None:
    found = verdicts(checkpoint("llama", scheme))
    assert (found["fsdp"], found["vllm"], found["sglang"]) == (fsdp, vllm, vllm)


def test_a_module_with_capitals_loses_its_int8_scales(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "capitals"
    folder.mkdir()
    source = checkpoint("llama", INT8)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file({name.replace("o_proj", "O_proj"): one for name, one in tensors.items()}, folder / "model.safetensors")
    assert "lower case" in str(judge(folder)["vllm"].reasons)
    assert verdicts(folder)["vllm"] == REFUSES


def test_a_name_without_a_dot_that_engines_find_elsewhere(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "component"
    folder.mkdir()
    for path in checkpoint("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    set_config(folder, llm_int8_skip_modules=["lm_head", "mlp"])
    assert "packed layers as skipped" in str(judge(folder)["vllm"].reasons)


def test_an_adapter_beside_the_weights_is_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in checkpoint("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "adapter_config.json").write_text("{}")
    assert verdicts(folder)["transformers"] == verdicts(folder)["peft"] == REFUSES


def test_what_was_not_read_is_not_known(checkpoint: Callable[..., Path]) -> None:
    found = verdicts(checkpoint("llama", Scheme(method=Method.TORCHAO_INT8)))
    assert found["vllm"] == found["sglang"] == found["fsdp"] == UNKNOWN
    assert found["transformers"] == found["peft"] == LOADS


def verify_for(loaders: str, *folders: Path, format_: str = "json") -> tuple[int, Any]:
    done = CliRunner().invoke(main, ["verify", "--for", loaders, *map(str, folders), "--format", format_])
    return done.exit_code, json.loads(done.stdout) if format_ == "json" and done.stdout else done.output


def test_verify_says_it_of_each_checkpoint(checkpoint: Callable[..., Path]) -> None:
    llama, mixtral = checkpoint("llama"), checkpoint("mixtral")
    code, rows = verify_for("transformers,vllm", llama, mixtral)
    assert [(row["checkpoint"], row["loader"], row["verdict"]) for row in rows] == [
        (str(llama), "transformers", LOADS),
        (str(llama), "vllm", LOADS),
        (str(mixtral), "transformers", LOADS),
        (str(mixtral), "vllm", DIFFERS),
    ]
    assert code == 1
    assert verify_for("transformers,vllm", llama)[0] == 0


def test_verify_explains_itself(checkpoint: Callable[..., Path]) -> None:
    done = CliRunner().invoke(main, ["verify", "--for", "gguf", str(checkpoint("llama"))])
    assert done.stdout.splitlines()[1:] == [
        "  gguf: refuses (llama.cpp, Ollama, 2026-11-28)",
        "    llama.cpp and Ollama cannot convert bitsandbytes checkpoints (llama.cpp#10965, ollama#6357)",
        "    → convert the source, and quantize it there",
    ]


@pytest.mark.parametrize("loaders", ["vlm", "", ","])
def test_a_loader_that_is_not_known_is_refused(loaders: str, checkpoint: Callable[..., Path]) -> None:
    code, said = verify_for(loaders, checkpoint("llama"), format_="csv")
    assert code == 2
    assert "transformers, peft, fsdp, vllm, sglang, gguf, sentence-transformers" in said


def test_a_folder_without_weights_cannot_be_judged(tmp_path: Path) -> None:
    code, said = verify_for("vllm", tmp_path, format_="csv")
    assert code == 2
    assert "config.json" in said


def test_options_for_trying_need_each_other(checkpoint: Callable[..., Path]) -> None:
    folder = str(checkpoint("llama"))
    for options in (["--try"], ["--python", "python3"], ["--for", "peft", "--python", "python3"]):
        done = CliRunner().invoke(main, ["verify", *options, folder])
        assert done.exit_code == 2, options
        assert "needs" in done.output
    done = CliRunner().invoke(main, ["verify", "--for", "peft", "--try", "--python", "/no/such/python", folder])
    assert done.exit_code == 2
    assert "/no/such/python is not an interpreter" in done.output


def test_what_was_tried_is_shown_instead_of_what_was_judged() -> None:
    judged = LoaderJudgement(verdict=LoaderVerdict.LOADS, version="1", read_on="2026-11-28", reasons=(), advice=())
    tried = replace(judged, verdict=LoaderVerdict.REFUSES, reasons=("tried: it fails",))
    both = JudgedCheckpoint(folder=Path("/c"), loader="peft", judged=judged, tried=tried)
    assert judgement_text([both]) == "/c\n  peft: refuses (1, 2026-11-28)\n    tried: it fails"
    assert both.to_json() == {
        "checkpoint": "/c",
        "loader": "peft",
        **tried.to_json(),
        "tried": True,
        "judged": judged.to_json(),
    }
