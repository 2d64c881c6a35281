"""The order in which transformers saves tensors."""

from __future__ import annotations

from pathlib import Path

from transformers.core_model_loading import revert_weight_conversion

from models_db.domain import DType, Method, Scheme
from tests.tiny import make_causal
from worker.quantize import Target
from worker.quantize.loading import trace_loading
from worker.quantize.reading import SourceReader
from worker.quantize.saving import as_saved
from worker.quantize.vet import vet_source


def test_where_nothing_was_converted_the_order_is_what_transformers_makes_it(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "source", num_hidden_layers=11)
    target = Target(scheme=Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16), folder=tmp_path)
    with SourceReader(vet_source(source), lambda _: None) as reader:
        model = trace_loading(source, reader, target, DType.BFLOAT16, "cpu").skeleton.model
    # In an order that neither sorts to by itself.
    state = dict(reversed(model.state_dict().items()))
    assert model._weight_conversions == []
    assert list(as_saved(state, model)) == list(revert_weight_conversion(model, dict(state)))
