"""What Flower calls a task."""

from __future__ import annotations

import pytest

from qbatch.models_db.window import label_of
from qbatch.scheduler.flower import named_after_its_work
from qbatch.scheduler.queues import RUN_BUNDLE


@pytest.mark.parametrize("model", ["org/model", "C: / a · b: c", "/models/ein Modell (Kopie)", "x" * 500])
def test_a_task_is_called_after_its_model(model: str) -> None:
    label = label_of(3, model, ["none", "bnb-nf4"], [7, 8])
    event = {"type": "task-received", "name": RUN_BUNDLE, "args": label, "hostname": "one"}
    named = named_after_its_work(event)
    assert model.endswith(named["name"].removeprefix("…"))
    assert named["args"] == "b3: baseline, bnb-nf4 · j7, j8"
    assert named["hostname"] == "one"


@pytest.mark.parametrize(
    "event",
    [
        {"type": "task-started", "uuid": "x"},
        {"type": "task-received", "name": RUN_BUNDLE, "args": "([1, 2],)"},
        {"type": "task-received", "name": "other", "args": "b3 org/model: bnb-nf4 · j7"},
        {"type": "worker-heartbeat", "hostname": "one"},
    ],
)
def test_other_events_stay_as_they_are(event: dict[str, str]) -> None:
    assert named_after_its_work(event) == event
