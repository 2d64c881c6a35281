"""What a job is predicted to need of a GPU's memory, from headers and config alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from qbatch.core.byte_units import GIB
from qbatch.core.domain import BASELINE, DeviceKind, DType, JobSpec, Method, ProtocolOptions, Scheme, SourceRef
from qbatch.core.settings import Settings
from qbatch.core.sources import Header, read_headers
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.submit import Submission, submit
from qbatch.scheduler.vram_prediction import memory_bytes, predicted_need
from tests.rows import a_gpu
from tests.schemes import with_options

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
PROTOCOL = ProtocolOptions(eval_text_sha256="0" * 64)
NF4, INT8 = Scheme(method=Method.NF4), Scheme(method=Method.INT8)


def llama_shapes(layers: int) -> dict[str, list[int]]:
    hidden, inner, vocabulary = 4096, 14336, 128256
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "lm_head.weight": [vocabulary, hidden]}
    for n in range(layers):
        layer = f"model.layers.{n}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": [hidden, hidden] for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": [1024, hidden] for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": [inner, hidden] for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": [hidden, inner], f"{layer}.input_layernorm.weight": [hidden]}
    return shapes


def write_folder(folder: Path, shapes: Mapping[str, list[int]], config: Mapping[str, Any], dtype: str = "BF16") -> Path:
    """A source whose weights are a hole in a file: of any size, and of no bytes on disk."""
    folder.mkdir()
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + _nbytes(shape, dtype)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _nbytes(shape: list[int], dtype: str) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel * (4 if dtype == "F32" else 2)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Llama 3's 8B."""
    return write_folder(tmp_path / "llama", llama_shapes(32), LLAMA)


def need_gib(
    headers: tuple[Header, ...], scheme: Scheme, config: Mapping[str, Any] = LLAMA, dtype: DType = DType.BFLOAT16
) -> float:
    tensors = [tensor for header in headers for tensor in header.tensors]
    return memory_bytes(tensors, config, scheme, dtype, PROTOCOL.for_device(DeviceKind.CUDA)) / GIB


def spec(folder: Path, scheme: Scheme, device: DeviceKind = DeviceKind.AUTO) -> JobSpec:
    source = SourceRef(name="llama", location=str(folder), is_folder=True)
    return JobSpec(source=source, scheme=scheme, dtype=DType.AUTO, device=device, protocol=PROTOCOL)


def test_the_prediction_holds_the_weights_and_not_much_more(llama: Path) -> None:
    headers = read_headers(llama)
    # 8.03e9 parameters: 15.0 GiB at 16 bits, 8.5 at 8 and 5.6 at 4, of which the two tables take 2.
    for scheme, weights_gib in ((BASELINE, 15.0), (INT8, 8.5), (NF4, 5.6)):
        assert weights_gib < need_gib(headers, scheme) < weights_gib * 1.05 + 4


def test_double_quantization_and_skipped_modules_count(llama: Path) -> None:
    headers = read_headers(llama)
    plain = need_gib(headers, NF4)
    assert need_gib(headers, with_options(NF4, double_quant=True)) < plain
    assert need_gib(headers, replace(NF4, skip_modules=("down_proj",))) > plain + 2


def test_outliers_dequantize_at_worst_a_whole_weight(llama: Path) -> None:
    headers = read_headers(llama)
    # 4096 × 14336 values, of 9 bytes each.
    without = need_gib(headers, with_options(INT8, int8_threshold=0.0))
    assert need_gib(headers, INT8) - without == pytest.approx(0.49, abs=0.01)


def test_experts_stay_at_16_bits(tmp_path: Path) -> None:
    shapes = {f"model.layers.0.mlp.experts.{n}.w1.weight": [4096, 4096] for n in range(64)}
    headers = read_headers(write_folder(tmp_path / "moe", shapes, LLAMA))
    assert need_gib(headers, NF4) == pytest.approx(need_gib(headers, BASELINE))


def test_a_small_model_still_needs_what_quantizing_takes(tmp_path: Path) -> None:
    config = {"vocab_size": 512}
    headers = read_headers(write_folder(tmp_path / "small", {"a.weight": [64, 64]}, config))
    assert need_gib(headers, BASELINE, config) == pytest.approx(1, abs=0.1)
    assert need_gib(headers, NF4, config) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(
    "config", [{}, {"vocab_size": "many", "n_layer": -1}, {"text_config": None}, {"num_attention_heads": True}]
)
def test_a_config_that_says_nothing_of_use_stops_nothing(llama: Path, config: dict[str, Any]) -> None:
    assert need_gib(read_headers(llama), BASELINE, config) > 15


def test_the_text_part_of_a_larger_config_is_read(llama: Path) -> None:
    headers = read_headers(llama)
    assert need_gib(headers, NF4, {"text_config": LLAMA}) == need_gib(headers, NF4)


def test_an_fp32_source_is_stored_in_16_bits_and_read_in_32(tmp_path: Path, llama: Path) -> None:
    wide = read_headers(write_folder(tmp_path / "wide", llama_shapes(32), LLAMA, dtype="F32"))
    need, of_bf16 = predicted_need(spec(llama, BASELINE), wide, LLAMA), need_gib(read_headers(llama), BASELINE)
    # Twice the largest tensor, and not twice the model.
    assert need is not None
    assert of_bf16 + 0.9 < need / GIB < of_bf16 + 1.1


def test_a_cpu_and_a_model_that_fits_anywhere_need_no_prediction(llama: Path) -> None:
    headers = read_headers(llama)
    assert predicted_need(spec(llama, BASELINE, DeviceKind.CPU), headers, LLAMA) is None
    assert predicted_need(spec(llama, BASELINE), (), {}) is None
    assert predicted_need(spec(llama, BASELINE, DeviceKind.CUDA), headers, LLAMA) is not None


def test_a_size_needs_no_memory_that_a_model_takes_to_run(llama: Path) -> None:
    def need(scheme: Scheme) -> int | None:
        sized = spec(llama, scheme, DeviceKind.CUDA)
        options = replace(sized.protocol, quality=False, speed=False, why=False)
        return predicted_need(replace(sized, protocol=options), headers, LLAMA)

    headers = read_headers(llama)
    assert (need(BASELINE), need(NF4), need(INT8)) == (None, None, None)
    assert need(Scheme(method=Method.TORCHAO_INT8)) is not None, "it is built as a whole"


def test_submit_stores_the_prediction_of_a_folder_and_none_for_the_hub(
    sqlite_database: Database, tmp_path: Path, llama: Path
) -> None:
    settings = Settings(home=tmp_path, storage=tmp_path, cache=tmp_path)
    sources = (
        SourceRef(name="llama", location=str(llama), is_folder=True),
        SourceRef(name="meta/llama", location="meta/llama"),
    )
    submit(sqlite_database, settings, Submission(sources=sources, grid=Grid(bits=(4, 8)), eval_text="words"))
    with sqlite_database.read() as session:
        stored = session.scalars(select(Job.above_memory_bytes).order_by(Job.id)).all()
    headers = read_headers(llama)
    expected = [predicted_need(spec(llama, scheme), headers, LLAMA) for scheme in (BASELINE, INT8, NF4)]
    assert stored == [*expected, None, None, None]


@pytest.mark.parametrize(("gib", "warns"), [(None, False), (4, True), (80, False)])
def test_submit_warns_where_no_live_gpu_is_predicted_to_be_large_enough(
    sqlite_database: Database, tmp_path: Path, llama: Path, gib: int | None, warns: bool
) -> None:
    if gib is not None:
        a_gpu(sqlite_database, gib)
    settings = Settings(home=tmp_path, storage=tmp_path, cache=tmp_path)
    source = SourceRef(name="llama", location=str(llama), is_folder=True)
    receipt = submit(sqlite_database, settings, Submission(sources=(source,), grid=Grid(bits=(4,)), eval_text="words"))
    assert [f"the largest live GPU has, one of {gib} GiB" in line for line in receipt.warnings] == [True] * warns
    assert list(receipt.warnings.values()) == [1] * warns
