"""The order in which transformers saves tensors."""

from __future__ import annotations

from pathlib import Path

from transformers.core_model_loading import revert_weight_conversion

from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.source_checks import check_source
from qbatch.worker.quantizing import Target
from qbatch.worker.quantizing.planning.loading import trace_loading
from qbatch.worker.quantizing.planning.saving import as_saved
from qbatch.worker.quantizing.tensors.source_reader import SourceReader
from tests.tiny import make_causal


def test_where_nothing_was_converted_the_order_is_transformers(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", num_hidden_layers=11)
    target = Target(scheme=Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16), folder=tmp_path)
    with SourceReader(check_source(source), lambda _: None) as reader:
        model = trace_loading(source, reader, target, DType.BFLOAT16, "cpu").skeleton.model
    # In an order that neither sorts to by itself.
    state = dict(reversed(model.state_dict().items()))
    assert model._weight_conversions == []
    assert list(as_saved(state, model)) == list(revert_weight_conversion(model, dict(state)))
