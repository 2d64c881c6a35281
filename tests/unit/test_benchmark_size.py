"""Parameters and bytes against counts done by hand for one small architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qbatch.core.domain import Scheme
from qbatch.worker.measuring.speed.size import ModelSize, disk_bytes, measure_size
from qbatch.worker.methods.cpu_kernels import avoid_packed_kernel
from tests import tiny
from tests.unit.benchmark_models import FP4, INT8, NF4, NF4_DOUBLE, loaded_on_cpu, measured, quantized

# The tiny Llama: hidden 128, intermediate 256, 2 layers, 4 heads of 32, of which 2 for keys and values; untied head.
LINEAR_SHAPES = [(128, 128), (64, 128), (64, 128), (128, 128), (256, 128), (256, 128), (128, 256)] * 2
LINEAR = sum(rows * columns for rows, columns in LINEAR_SHAPES)
ROWS = sum(rows for rows, _ in LINEAR_SHAPES)
EMBEDDING = tiny.VOCAB_SIZE * 128
OTHER = 2 * EMBEDDING + 5 * 128
BLOCK = 64
CODE_BYTES = 16 * 4


def size_of(folder: Path) -> ModelSize:
    return measure_size(loaded_on_cpu(folder).model)


def test_a_baseline_s_bytes_are_two_for_each_parameter(tmp_path: Path) -> None:
    size = size_of(tiny.make_causal(tmp_path))
    assert size.num_parameters == LINEAR + OTHER
    assert size.weights_bytes == 2 * (LINEAR + OTHER)
    assert size.bits_per_param == 16
    assert size.quantized_fraction == 0
    assert size.quant_state_bytes == 0
    assert size.memory_footprint_bytes == size.weights_bytes + size.buffer_bytes


@pytest.mark.parametrize("scheme", [NF4, FP4], ids=["nf4", "fp4"])
def test_four_bits_count_packed_codes_block_scales_and_code_tables(tmp_path: Path, scheme: Scheme) -> None:
    size = size_of(quantized(tiny.make_causal(tmp_path / "source"), tmp_path / "quantized", scheme))
    state = 4 * LINEAR // BLOCK + CODE_BYTES * len(LINEAR_SHAPES)
    assert size.num_parameters == LINEAR + OTHER
    assert size.quantized_parameters == LINEAR
    assert size.quant_state_bytes == state
    assert size.weights_bytes == LINEAR // 2 + state + 2 * OTHER
    assert size.memory_footprint_bytes == LINEAR // 2 + 2 * OTHER + size.buffer_bytes


def test_double_quantization_counts_the_scales_of_the_scales(tmp_path: Path) -> None:
    size = size_of(quantized(tiny.make_causal(tmp_path / "source"), tmp_path / "quantized", NF4_DOUBLE))
    nested = sum(-(-rows * columns // BLOCK // 256) for rows, columns in LINEAR_SHAPES)
    tables = (CODE_BYTES + 256 * 4 + 4) * len(LINEAR_SHAPES)
    assert size.quant_state_bytes == LINEAR // BLOCK + 4 * nested + tables


def test_eight_bits_count_codes_and_row_scales(tmp_path: Path) -> None:
    size = size_of(quantized(tiny.make_causal(tmp_path / "source"), tmp_path / "quantized", INT8))
    assert size.num_parameters == LINEAR + OTHER
    assert size.quant_state_bytes == 4 * ROWS
    assert size.weights_bytes == LINEAR + 4 * ROWS + 2 * OTHER


def test_eight_bits_count_the_same_after_a_forward(tmp_path: Path) -> None:
    loaded = loaded_on_cpu(quantized(tiny.make_causal(tmp_path / "source"), tmp_path / "quantized", INT8))
    before = measure_size(loaded.model)
    loaded.model(torch.zeros(1, 8, dtype=torch.long))
    assert measure_size(loaded.model) == before


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    size = size_of(tiny.make_causal(tmp_path, tie_word_embeddings=True))
    assert size.num_parameters == LINEAR + OTHER - EMBEDDING
    assert size.bits_per_param == 16


def test_the_disk_holds_the_files_that_the_index_names_and_no_others(tmp_path: Path) -> None:
    folder = tiny.make_causal(tmp_path, max_shard_size="200KB")
    shards = list(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    expected = sum(path.stat().st_size for path in shards)
    (folder / "stray.safetensors").write_bytes(b"left over from another download")
    assert disk_bytes(folder) == expected


def test_one_file_s_bytes_are_its_size(tmp_path: Path) -> None:
    folder = tiny.make_causal(tmp_path)
    assert disk_bytes(folder) == (folder / "model.safetensors").stat().st_size


def test_beside_one_file_an_index_says_nothing_as_transformers_has_it(tmp_path: Path) -> None:
    """What a conversion to one file left behind names files that are gone."""
    folder = tiny.make_causal(tmp_path)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert measured(folder).disk_bytes == (folder / "model.safetensors").stat().st_size


def test_a_layer_too_small_for_the_cpu_kernel_is_dequantized(tmp_path: Path) -> None:
    """A classifier of three labels is quantized: its three rows are no multiple of the kernel's 32."""
    from bitsandbytes.functional import dequantize_4bit

    source = tiny.make_encoder(tmp_path / "source", "classification")
    model = loaded_on_cpu(quantized(source, tmp_path / "nf4", NF4)).model
    weight = dequantize_4bit(model.classifier.weight.data, model.classifier.weight.quant_state)
    assert avoid_packed_kernel(model, "cpu") == 1
    inputs = torch.randn(5, 128, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.linear(inputs, weight.bfloat16(), model.classifier.bias)
    torch.testing.assert_close(model.classifier(inputs), expected)


def test_an_input_width_that_splits_a_block_is_computed_right_on_a_cpu(tmp_path: Path) -> None:
    """Here blocks of 64 run across rows of 96: the packed kernel's layout cannot express that."""
    from bitsandbytes.functional import dequantize_4bit

    source = tiny.make_causal(
        tmp_path / "source", hidden_size=96, num_attention_heads=3, num_key_value_heads=3, intermediate_size=192
    )
    model = loaded_on_cpu(quantized(source, tmp_path / "nf4", NF4)).model
    layer = model.model.layers[0].mlp.gate_proj
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert avoid_packed_kernel(model, "cpu") == 12
    inputs = torch.randn(5, 96, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(inputs), torch.nn.functional.linear(inputs, weight.bfloat16()))
