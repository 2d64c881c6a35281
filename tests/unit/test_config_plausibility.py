"""A config is judged against its own weights, and a sound one is never refused."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qbatch.core.config_plausibility import refuse_implausible_config
from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.errors import SourceCorrupt
from qbatch.core.sources import Header, TensorInfo, read_config, read_headers
from qbatch.worker.models.load import load
from qbatch.worker.quantizing import Refused, Target, write_checkpoints
from tests import tiny

NF4 = Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16)


def headers_of(*shapes: tuple[str, tuple[int, ...]]) -> tuple[Header, ...]:
    tensors = tuple(TensorInfo(name=name, dtype="BF16", shape=shape, start=0, end=0) for name, shape in shapes)
    return (Header(path=Path("model.safetensors"), tensors=tensors, metadata={}, size=0),)


LLAMA = headers_of(*((f"model.layers.{n}.mlp.up_proj.weight", (256, 128)) for n in range(20)))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
        ({"n_layer": 300}, "n_layer"),
        ({"num_hidden_layers": 1e7}, "num_hidden_layers"),
        ({"encoder_layers": 10**30}, "encoder_layers"),
        ({"n_positions": 10**8}, "n_positions"),
        ({"max_position_embeddings": 10**8}, "max_position_embeddings"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"num_local_experts": 10**5}, "num_local_experts"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"depths": [2, 2, 10**6]}, "depths"),
        ({"block_sizes": [10**6]}, "block_sizes"),
        ({"text_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers"),
        ({"vision_config": {"a": {"b": [{"num_layers": 10**7}]}}}, "num_layers"),
    ],
    ids=str,
)
def test_what_the_weights_cannot_fill_is_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(SourceCorrupt, match=rf"sets {named} to .*, but the weights are only 20 tensors"):
        refuse_implausible_config(config, LLAMA)


def test_what_the_weights_hold_is_not_refused() -> None:
    layers = headers_of(*((f"model.layers.{n}.norm.weight", (64,)) for n in range(5000)))
    refuse_implausible_config({"num_hidden_layers": 5000}, layers)
    refuse_implausible_config({"num_experts": 10**5}, headers_of(("experts", (10**5, 8, 8))))
    refuse_implausible_config({"vocab_size": 2**26}, headers_of(("embed_tokens.weight", (2**26, 8))))
    refuse_implausible_config({"n_positions": 10**6}, headers_of(("wpe.weight", (10**6, 8))))
    # What is no count, however large, and a rotary model of ten million tokens beside a vision tower's small table.
    refuse_implausible_config(
        {"rope_theta": 10**11, "bos_token_id": 10**12, "seed": 2**63, "model_max_length": 10**30}, ()
    )
    tower = headers_of(("vision_model.position_embeddings.weight", (577, 64)))
    refuse_implausible_config({"text_config": {"max_position_embeddings": 10_485_760}, "vision_config": {}}, tower)


def test_positions_beyond_the_table_that_the_weights_hold_are_refused() -> None:
    with pytest.raises(SourceCorrupt, match="n_positions"):
        refuse_implausible_config({"n_positions": 10**5}, headers_of(("transformer.wpe.weight", (1024, 64))))


@pytest.mark.slow
def test_no_config_that_transformers_knows_of_is_refused_as_it_stands() -> None:
    """Whatever the weights: of these, one model alone keeps more experts than a few, as the rows of a table."""
    table = headers_of(("experts.weight", (16384, 64)))
    made_of_nothing = []
    for model_type in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception as error:
            made_of_nothing.append((model_type, error))
            continue
        refuse_implausible_config(config.to_dict(), table)
    assert len(made_of_nothing) < 10, made_of_nothing
    assert len(list(CONFIG_MAPPING)) > 300


@pytest.mark.parametrize(
    "arch", [*tiny.CAUSAL_ARCHS, *tiny.SEQ2SEQ_ARCHS, *tiny.OVERWRITTEN_ARCHS, "bert", "nomic", "speech"]
)
def test_no_model_of_the_tests_is_refused(arch: str, tmp_path: Path) -> None:
    if arch in tiny.CAUSAL_ARCHS:
        tiny.make_causal(tmp_path, arch)
    elif arch in tiny.SEQ2SEQ_ARCHS:
        tiny.make_seq2seq(tmp_path, arch)
    elif arch in tiny.OVERWRITTEN_ARCHS:
        tiny.make_overwritten(tmp_path, arch)
    else:
        {"bert": tiny.make_encoder, "nomic": tiny.make_fused_qkv, "speech": tiny.make_speech}[arch](tmp_path)
    refuse_implausible_config(read_config(tmp_path), read_headers(tmp_path))


@pytest.mark.parametrize("field", ["num_hidden_layers", "max_position_embeddings"])
def test_it_is_refused_before_anything_is_built(field: str, tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path / "source", dtype="bfloat16")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {field: 10**9}))
    (tmp_path / "out").mkdir()
    before_kib, begin_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    (refused,) = write_checkpoints(
        source,
        [Target(scheme=NF4, folder=tmp_path / "out")],
        dtype=DType.BFLOAT16,
        device="cpu",
        on_progress=lambda *_: None,
    )
    assert isinstance(refused, Refused)
    assert type(refused.error) is SourceCorrupt
    assert field in str(refused.error)
    with pytest.raises(SourceCorrupt, match=field):
        load(source, dtype=DType.BFLOAT16, device="cpu")
    assert time.monotonic() - begin_s < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 2**20
