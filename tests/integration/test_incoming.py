"""What comes in is judged once, in the same words for every row, and nothing beside the checked files is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.peft
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from transformers import (
    DeepseekV3ForCausalLM,
    GraniteSpeech5ForCTC,
    MistralLarge4ForConditionalGeneration,
    MobileBertForMaskedLM,
    PreTrainedModel,
    Qwen4ExpForCausalLM,
    UnlimitedOcrForConditionalGeneration,
    WavLMForCTC,
)

from qbatch.core.domain import BASELINE, Method, ProtocolOptions, Scheme, Stage
from qbatch.core.errors import SourceCorrupt
from qbatch.worker.checkpoints.verify import verify
from qbatch.worker.quantizing.building import whole_model
from qbatch.worker.runner.messages import Failed, Measured
from qbatch.worker.sources.pickles import read_tensors
from tests import incoming
from tests.bundles import TEXT_HASH, Ear
from tests.integration.test_bundle import a_quick_protocol, places, run
from tests.shrunk import make, shrunk_config
from tests.tiny import make_causal
from tests.unit.benchmark_models import QUICK

__all__ = ["a_quick_protocol"]
BASE, NF4, INT8 = 1, 2, 3
ALL = {BASE: BASELINE, NF4: Scheme(method=Method.NF4), INT8: Scheme(method=Method.INT8)}
BOTH = {BASE: BASELINE, NF4: ALL[NF4]}


def messages(ear: Ear) -> dict[int, str]:
    return {m.job_id: m.message for m in ear.heard if isinstance(m, Failed)}


def the_message(ear: Ear, kind: str, ids: Mapping[int, Scheme] = BOTH) -> str:
    """The message with which every row has failed."""
    assert ear.failed() == dict.fromkeys(ids, kind)
    (message,) = set(messages(ear).values())
    return message


@pytest.mark.parametrize("kind", incoming.QUANTIZED)
def test_a_quantized_source_is_refused_for_every_row(kind: str, tmp_path: Path) -> None:
    ear = run(incoming.already_quantized(tmp_path / "source", kind), schemes=ALL)
    message = the_message(ear, "unsupported", ALL)
    assert message.startswith(f"the source is already quantized ({incoming.QUANTIZED[kind][2]}; model.layers.0.")
    assert message.endswith("use the 16-bit model that it was made from")


def perplexities(ear: Ear) -> dict[int, float | None]:
    return {m.job_id: m.measurement.perplexity for m in ear.heard if isinstance(m, Measured)}


def test_a_stale_quantization_config_is_ignored(tmp_path: Path) -> None:
    stale = run(incoming.merged_qlora(tmp_path / "merged" / "source"), schemes=ALL)
    plain = run(make_causal(tmp_path / "plain" / "source", dtype="bfloat16"), schemes=ALL)
    assert messages(stale) == {}
    assert perplexities(stale) == perplexities(plain)
    (noted,) = [m.measurement.details.audit for m in stale.heard if isinstance(m, Measured) and m.job_id == NF4]
    assert noted.stale_quantization == "bitsandbytes 4 bits (nf4), but no tensor is packed"
    for job_id, folder in places(stale, tmp_path / "merged" / "source").items():
        same = places(plain, tmp_path / "plain" / "source")[job_id]
        for name in ("model.safetensors", "config.json"):
            assert (folder / name).read_bytes() == (same / name).read_bytes()


def test_an_adapter_beside_the_weights_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(make_causal(tmp_path / "plain" / "source", dtype="bfloat16"), schemes=BOTH)
    source = incoming.adapter_beside_weights(tmp_path / "merged" / "source")
    monkeypatch.setattr(transformers.integrations.peft, "is_peft_available", lambda: True)
    ear = run(source, schemes=BOTH)
    assert messages(ear) == {}
    assert perplexities(ear) == perplexities(plain)
    (folder,) = places(ear, source).values()
    assert not list(folder.glob("adapter*"))
    assert folder.name == places(plain, tmp_path / "plain" / "source")[NF4].name, "it is the same model"


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_says_which_base_it_belongs_to(with_config: bool, tmp_path: Path) -> None:
    ear = run(incoming.adapter_alone(tmp_path / "source", with_config=with_config), schemes=BOTH)
    assert "it is an adapter for org/base, not a model" in the_message(ear, "source_not_found")


@pytest.mark.parametrize("name", ["BloomForCausalLm", "LLaMAForCausalLM"])
def test_a_class_that_is_spelt_otherwise_is_found_by_its_type(name: str, tmp_path: Path) -> None:
    source = incoming.old_spelling(tmp_path / "source", name, "own")
    ear = run(source, schemes=BOTH)
    assert messages(ear) == {}
    (folder,) = places(ear, source).values()
    architecture = json.loads((folder / "config.json").read_text())["architectures"]
    assert architecture == ["LlamaForCausalLM" if "LLaMA" in name else "BloomForCausalLM"]


def test_an_old_sentence_transformers_folder_names_its_inner_model(tmp_path: Path) -> None:
    source = incoming.old_sentence_transformer(tmp_path / "source")
    message = the_message(run(source, schemes=BOTH), "source_not_found")
    assert message == (
        f"{source} has no config.json: the model of this sentence-transformers folder is in {source}/0_Transformer: "
        "list that one"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_called_that(name: str, tmp_path: Path) -> None:
    source = incoming.clone_without_lfs(tmp_path / "source", name)
    message = the_message(run(source, schemes=BOTH), "source_corrupt")
    assert message == f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull` in {source}"


def test_a_pickle_that_is_a_git_lfs_pointer_is_called_that(tmp_path: Path) -> None:
    source = incoming.clone_without_lfs(tmp_path / "source", "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    message = the_message(run(source, schemes=BOTH), "source_corrupt")
    assert message.startswith("pytorch_model.bin is a Git LFS pointer")
    with pytest.raises(SourceCorrupt, match="Git LFS pointer"):
        read_tensors(source / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_a_wrong_shape_is_named_with_both_shapes_for_every_row(name: str, tmp_path: Path) -> None:
    schemes = {BASE: BASELINE, NF4: ALL[NF4], 4: Scheme(method=Method.TORCHAO_INT8)}
    ear = run(incoming.partitioned(tmp_path / "source", name), schemes=schemes)
    needed = "(64, 128)" if "k_proj" in name else "(128,)"
    expected = f"{name} has the shape (0,), but the model needs {needed}"
    assert the_message(ear, "source_corrupt", schemes) == expected


def test_files_that_transformers_would_load_instead_are_refused(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    name = "shard-00000-model-00001-of-00001.safetensors"
    (source / name).hardlink_to(source / "model.safetensors")
    assert name in the_message(run(source, schemes=BOTH), "unsupported")


def test_weights_with_nan_are_not_published(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    name = "model.layers.0.mlp.down_proj.weight"
    incoming.edit_tensors(source, lambda tensors: tensors[name].view(-1)[7].fill_(float("nan")))
    ear = run(source, schemes=BOTH)
    assert the_message(ear, "source_corrupt") == f"1 tensor holds NaN or infinity; the first is {name}"
    assert places(ear, source) == {}


@pytest.mark.parametrize("kind", incoming.UNREADABLE_TOKENIZERS)
def test_a_tokenizer_that_is_not_read_is_why_there_is_no_perplexity(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = incoming.unreadable_tokenizer(tmp_path / "source", kind)
    ear = run(source, schemes=BOTH)
    assert messages(ear) == {}
    files, why = incoming.UNREADABLE_TOKENIZERS[kind]
    reasons = {m.measurement.details.perplexity.reason for m in ear.heard if isinstance(m, Measured)}
    assert reasons == {why}
    (folder,) = places(ear, source).values()
    assert all((folder / name).is_file() for name in files)
    said = [record.getMessage() for record in caplog.records]
    assert said.index(f"no text can be measured: {why}") < said.index("j2: quantizing")


def test_a_broken_tokenizer_is_said_before_anything_is_quantized(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", dtype="bfloat16")
    (source / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    ear = run(source, schemes=BOTH)
    message = the_message(ear, "unsupported")
    assert message.startswith("cannot load the tokenizer in source: ")
    assert not message.endswith(":")
    assert ear.entered(Stage.QUANTIZING) == set()


def test_a_tokenizer_of_a_larger_model_is_said_beforehand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ear = run(make_causal(tmp_path / "source", dtype="bfloat16", vocab_size=128), schemes=BOTH)
    said = [record.getMessage() for record in caplog.records]
    (warned,) = [number for number, line in enumerate(said) if line.startswith("no text can be measured: the token")]
    assert said[warned].endswith(", but the model embeds only 128")
    assert warned < said.index("j2: quantizing")
    assert ear.failed() == {BASE: "benchmark_error"}


def audits(ear: Ear) -> dict[int, str | None]:
    return {m.job_id: m.measurement.details.audit.forward for m in ear.heard if isinstance(m, Measured)}


@pytest.mark.parametrize("job_id", [NF4, INT8])
def test_a_checkpoint_that_cannot_run_says_what_mends_it(job_id: int, tmp_path: Path) -> None:
    source = incoming.reads_its_weights_itself(tmp_path / "source")
    ear = run(source, schemes={BASE: BASELINE, job_id: ALL[job_id]})
    assert ear.failed() == {job_id: "unsupported"}
    assert ear.measured() == {BASE}
    assert places(ear, source) == {}
    message = messages(ear)[job_id]
    assert "backbone.layers.0.mixer fails (RuntimeError: " in message
    assert message.endswith("; --skip-modules dt_proj mends it")
    mended = run(source, attempt=2, schemes={job_id: replace(ALL[job_id], skip_modules=("dt_proj",))})
    assert mended.measured() == {job_id}
    assert audits(mended) == {job_id: "ran"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_more_layers_than_needed_are_said_to_mend_it(tmp_path: Path) -> None:
    """MobileBERT has many layers named ``dense``; it reads the weight of one of them itself."""
    model = make(MobileBertForMaskedLM, shrunk_config("mobilebert"))
    ear = run(incoming.save(tmp_path / "source", model), schemes={NF4: ALL[NF4]})
    assert messages(ear)[NF4].endswith("; --skip-modules predictions.dense mends it")


@pytest.mark.parametrize(
    ("cls", "mends"),
    [(WavLMForCTC, "k_proj,v_proj,q_proj,out_proj"), (GraniteSpeech5ForCTC, "input_linear")],
    ids=["several at once", "a layer before the fault"],
)
def test_all_layers_that_mend_it_are_named(cls: type[PreTrainedModel], mends: str, tmp_path: Path) -> None:
    """PyTorch's attention reads four weights itself. Granite's encoder gives its input the dtype of a weight."""
    model = make(cls, shrunk_config(cls.config_class.model_type))
    source = incoming.save(tmp_path / "source", model)
    ear = run(source, schemes={NF4: ALL[NF4]})
    assert messages(ear)[NF4].endswith(f"; --skip-modules {mends} mends it")
    mended = run(source, attempt=2, schemes={NF4: replace(ALL[NF4], skip_modules=tuple(mends.split(",")))})
    assert audits(mended) == {NF4: "ran"}


def test_a_layer_whose_name_transformers_misreads_is_named(tmp_path: Path) -> None:
    """It looks for the parts of a weight by the word, and takes the name of this layer for one."""
    source = incoming.save(tmp_path / "source", make(Qwen4ExpForCausalLM, shrunk_config("qwen4_exp_text")))
    ear = run(source, schemes={NF4: ALL[NF4]})
    assert messages(ear)[NF4].endswith("; --skip-modules block_inject_weight may mend it")
    mended = run(source, attempt=2, schemes={NF4: replace(ALL[NF4], skip_modules=("block_inject_weight",))})
    assert audits(mended) == {NF4: "ran"}


def test_int8_of_deepseek_on_a_cpu_says_what_mends_it(tmp_path: Path) -> None:
    source = incoming.save(tmp_path / "source", make(DeepseekV3ForCausalLM, shrunk_config("deepseek_v3")))
    ear = run(source, schemes=ALL)
    assert ear.failed() == {INT8: "unsupported"}
    assert ear.measured() == {BASE, NF4}
    assert "model.layers.0.self_attn fails (RuntimeError: " in messages(ear)[INT8]
    assert messages(ear)[INT8].endswith("; --skip-modules kv_b_proj mends it")
    mended = run(source, attempt=2, schemes={INT8: replace(ALL[INT8], skip_modules=("kv_b_proj",))})
    assert audits(mended) == {INT8: "ran"}


@pytest.mark.parametrize("cls", [UnlimitedOcrForConditionalGeneration, MistralLarge4ForConditionalGeneration])
def test_what_is_loaded_by_other_names_than_the_model_s_own_has_those(cls: type[Any], tmp_path: Path) -> None:
    """Weights of its vision tower are converted while it loads, and the names of all others are changed once more."""
    model = make(cls, shrunk_config(cls.config_class.model_type)).to(torch.bfloat16)
    source = incoming.save(tmp_path / "source", model)
    ear = run(source, schemes=BOTH)
    assert messages(ear) == {}
    assert audits(ear)[NF4] == "ran"
    (folder,) = places(ear, source).values()
    assert verify(folder) == []
    loaded = cls.from_pretrained(folder, dtype=torch.bfloat16)
    for name, exact in model.named_parameters():
        weight = loaded.get_parameter(name)
        if isinstance(weight, Params4bit):
            weight = dequantize_4bit(weight.data, weight.quant_state)
        assert (weight.float() - exact.float()).norm() <= 0.15 * exact.float().norm(), name


def test_what_transformers_cannot_read_again_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_model, "loads_own_names", lambda _skeleton: True)
    config = shrunk_config("unlimited_ocr")
    source = incoming.save(tmp_path / "source", make(UnlimitedOcrForConditionalGeneration, config))
    ear = run(source, schemes=BOTH)
    assert ear.failed() == {NF4: "unsupported"}
    assert messages(ear)[NF4].startswith("transformers cannot read the checkpoint, so it is not published: ")
    assert messages(ear)[NF4].endswith(" is converted and then quantized: name such layers in --skip-modules")
    mended = run(source, attempt=2, schemes={NF4: replace(ALL[NF4], skip_modules=(".*vision_encoder",))})
    assert audits(mended) == {NF4: "ran"}


def test_what_does_not_run_unquantized_either_is_published_and_says_so(tmp_path: Path) -> None:
    source = incoming.cannot_run_in_bfloat16(tmp_path / "source")
    ear = run(source, schemes=BOTH)
    assert ear.failed() == {BASE: "benchmark_error"}
    (row,) = [m for m in ear.heard if isinstance(m, Measured)]
    assert row.checkpoint_path is not None
    assert row.measurement.quantized_fraction > 0.5
    details = row.measurement.details
    assert str(details.audit.forward).startswith("neither it nor the source runs in bfloat16: RuntimeError")
    assert (details.not_measured or {}).keys() == {"speed"}
    assert details.quality.reason is not None


@pytest.mark.parametrize("model_type", incoming.SEES_OR_HEARS)
def test_a_model_that_reads_no_text_is_timed_on_noise(model_type: str, tmp_path: Path) -> None:
    source = incoming.sees_or_hears(tmp_path / "source", model_type)
    ear = run(source, schemes=BOTH)
    assert messages(ear) == {}
    rows = {m.job_id: m for m in ear.heard if isinstance(m, Measured)}
    assert rows.keys() == BOTH.keys()
    assert rows[NF4].checkpoint_path is not None
    for row in rows.values():
        measured, details = row.measurement, row.measurement.details
        assert measured.num_parameters > 0
        assert (details.not_measured or {}).keys() == {"quality"}
        assert details.noise_inputs is not None
        assert (details.stats or {})["forward"].p50 is not None
        assert details.memory.max_ram is not None
        compared = (measured.forward_s_p50, measured.forward_samples_per_s, measured.max_allocated_bytes)
        assert compared == (None, None, None), "noise is not compared"
    audit = rows[NF4].measurement.details.audit
    assert audit.forward == "ran"
    assert audit.relative_error_worst


def test_a_model_for_which_no_input_is_known_is_counted(tmp_path: Path) -> None:
    source = incoming.reads_time_series(tmp_path / "source")
    ear = run(source, schemes=BOTH)
    assert messages(ear) == {}
    rows = {m.job_id: m.measurement for m in ear.heard if isinstance(m, Measured)}
    assert rows.keys() == BOTH.keys()
    for row in rows.values():
        assert row.weights_bytes > 0
        assert (row.details.not_measured or {})["speed"].startswith("no noise of the usual forms runs as input of")


def test_what_is_only_counted_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_size = replace(QUICK, eval_text_sha256=TEXT_HASH, quality=False, speed=False)
    monkeypatch.setattr(ProtocolOptions, "for_device", lambda _options, _kind: only_size)
    source = incoming.reads_its_weights_itself(tmp_path / "source")
    (source / "tokenizer.json").write_text("{")
    ear = run(source, schemes=BOTH)
    assert messages(ear) == {}
    assert audits(ear) == {BASE: None, NF4: "not tried: only its size was asked for"}
