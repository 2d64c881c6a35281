"""What a model card says holds for whoever has the checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qbatch.core.measured.result_row import ResultRow
from qbatch.models_db.measured_checkpoints import MeasuredCheckpoint
from qbatch.views.model_card import card_text
from tests.unit.measured_rows import PROTOCOL, result

WALK = Path(__file__).parents[2] / "docs" / "howto" / "first-checkpoint.md"


def card(**fields: Any) -> str:
    row = ResultRow.from_json(result(2, "bnb-nf4", **fields))
    path = "checkpoints/m/bnb-nf4-0"
    checkpoint = MeasuredCheckpoint(path=path, root_sha256="5" * 64, is_folder=False, row=row, baseline=None)
    return card_text(checkpoint, licence=None, runs_code=False, has_tokenizer=True)


def test_a_speed_that_was_not_measured_is_not_claimed() -> None:
    assert "- Speed and memory were measured on NVIDIA H200" in card(decode_tokens_per_s=40.0)
    without = card(protocol=PROTOCOL | {"speed": False})
    assert ("Speed and memory" in without, "- Measured on NVIDIA H200, without its speed." in without) == (False, True)


def test_a_warning_names_no_command_that_needs_the_database() -> None:
    said = card(quantized_fraction=0.1)
    assert "- Only 10 % of its parameters are stored in 4 bits: the rest is bfloat16\n" in said
    assert "`qbatch show" not in said


def test_a_checkpoint_is_loaded_as_the_first_walk_does() -> None:
    loading, _ = WALK.read_text(encoding="utf-8").split("```python\n")[1].split("inputs = ")
    assert f"```python\n{loading}```" in card(details={"task": "causal-lm"})
