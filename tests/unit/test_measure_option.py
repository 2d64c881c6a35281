"""``--measure``: which parts it asks for, what contradicts it, and what it makes of the protocol."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import click
import pytest

from qbatch.commands.parameter_types import Parts
from qbatch.commands.request import read_submission
from qbatch.commands.submission import submit
from qbatch.core.domain import DeviceKind, Protocol, ProtocolOptions
from qbatch.core.errors import UsageError
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.settings import Settings
from qbatch.scheduler.submit import Submission
from tests.unit.measured_rows import PROTOCOL, result

CUDA, CPU = DeviceKind.CUDA, DeviceKind.CPU


def submission(folder: Path, *arguments: str) -> Submission:
    models = folder / "models.txt"
    models.write_text("org/a\n")
    context = submit.make_context(
        "submit", ["--models", str(models), "--bits", "4", *arguments], help_option_names=["-h", "--help"]
    )
    return read_submission(Settings(home=folder, storage=folder, cache=folder), context.params)


def protocol(folder: Path, kind: DeviceKind, *arguments: str) -> Protocol:
    return submission(folder, *arguments).specs()[0].protocol.for_device(kind)


@pytest.mark.parametrize(
    ("arguments", "on_gpu", "on_cpu"),
    [
        ([], "size quality speed why", "size quality speed"),
        (["--no-why"], "size quality speed", "size quality speed"),
        (["--energy"], "size quality speed why energy", "size quality speed"),
        (["--measure", "size"], "size", "size"),
        (["--measure", "quality"], "size quality", "size quality"),
        (["--measure", "speed, quality"], "size quality speed", "size quality speed"),
        (["--measure", "why"], "size speed why", "size speed"),
        (["--measure", "energy"], "size energy", "size"),
        (["--measure", "size", "--energy", "--no-why"], "size energy", "size"),
        (["--measure", "quality", "--why"], "size quality speed why", "size quality speed"),
    ],
)
def test_the_parts_of_the_protocol(arguments: list[str], on_gpu: str, on_cpu: str, tmp_path: Path) -> None:
    for kind, expected in ((CUDA, on_gpu), (CPU, on_cpu)):
        chosen = protocol(tmp_path, kind, *arguments)
        assert chosen.parts == set(map(MeasuredPart, expected.split()))
        assert Protocol.from_json(chosen.to_json()) == chosen
        row = ResultRow.from_json(result(1) | {"protocol": chosen.to_json()})
        assert row.protocol.parts == chosen.parts, "read back from what is stored"
        assert row.not_measured.keys() == set(MeasuredPart) - chosen.parts


def test_the_default_and_its_spellings_are_one_protocol(tmp_path: Path) -> None:
    """Those that were stored before there was a choice: nothing is measured again."""
    default = protocol(tmp_path, CUDA)
    assert default.hash == protocol(tmp_path, CUDA, "--measure", "size,quality,speed,why").hash
    assert default.to_json().keys() & {"quality", "speed"} == set()
    assert protocol(tmp_path, CUDA, "--no-why").hash == protocol(tmp_path, CUDA, "--measure", "quality,speed").hash
    options = ProtocolOptions(eval_text_sha256="0" * 64)
    assert options.to_json().keys() & {"quality", "speed"} == set(), "0.1.0's workers read it"
    assert default.hash != protocol(tmp_path, CUDA, "--measure", "quality").hash


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--measure", "size,quality,why", "--no-why"], "--measure asks for why, but --no-why leaves it out"),
        (["--measure", "energy", "--no-energy"], "--measure asks for energy, but --no-energy leaves it out"),
        (["--measure", "quality", "--batch-size", "8"], "are about speed and energy, which --measure leaves out"),
        (["--measure", "size", "--new-tokens", "8"], "are about speed and energy, which --measure leaves out"),
        (["--measure", "size", "--eval-text", "{text}"], "--eval-text is about quality, speed and energy"),
        (["--measure", "quality", "--speed", "shape"], "--speed shape is about speed, which --measure leaves out"),
        (["--measure", "speed", "--eval-text", "prose", "--eval-text", "code"], "quality is measured on further texts"),
        (["--eval-text", "code", "--eval-text", "{text}", "--eval-text", "{text}"], "two texts are called text"),
        (["--eval-text", "poems"], "no text file poems, and the texts that come with qbatch are prose, code"),
        (["--measure", "speed", "--tasks", "arc_easy"], "--tasks are a part of quality, which --measure leaves out"),
    ],
)
def test_what_contradicts_it_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("A text.")
    given = [argument.format(text=tmp_path / "text") for argument in arguments]
    with pytest.raises(UsageError, match=message):
        submission(tmp_path, *given)


def test_sharing_speeds_is_another_protocol_where_they_can_be_shared(tmp_path: Path) -> None:
    shape, each = ("--speed", "shape"), ("--speed", "each")
    assert protocol(tmp_path, CUDA).share_speed
    assert not protocol(tmp_path, CUDA, *each).share_speed
    assert protocol(tmp_path, CUDA, *shape).hash == protocol(tmp_path, CUDA).hash
    assert protocol(tmp_path, CPU).hash == protocol(tmp_path, CPU, *shape).hash == protocol(tmp_path, CPU, *each).hash


@pytest.mark.parametrize("asked", [("--energy",), ("--measure", "size,quality"), ("--measure", "energy")])
def test_where_each_model_is_measured_or_none_is_timed_no_speed_is_shared(
    asked: tuple[str, ...], tmp_path: Path
) -> None:
    assert not protocol(tmp_path, CUDA, *asked).share_speed
    assert protocol(tmp_path, CUDA, *asked).hash == protocol(tmp_path, CUDA, *asked, "--speed", "each").hash


def test_one_text_is_the_protocol_that_it_always_was(tmp_path: Path) -> None:
    default = protocol(tmp_path, CUDA)
    assert default.hash == protocol(tmp_path, CUDA, "--eval-text", "prose").hash
    assert "more_texts" not in default.to_json()
    options = submission(tmp_path).specs()[0].protocol
    assert "more_texts" not in options.to_json(), "0.1.0's workers read it"


def test_further_texts_belong_to_the_protocol_by_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "poems.txt").write_text("A poem.")
    given = ("--eval-text", "prose", "--eval-text", "code", "--eval-text", str(tmp_path / "poems.txt"))
    found = protocol(tmp_path, CUDA, *given)
    assert found.eval_text_sha256 == protocol(tmp_path, CUDA).eval_text_sha256
    assert [text.name for text in found.more_texts] == ["code", "poems"]
    assert found.more_texts[1].sha256 == hashlib.sha256(b"A poem.").hexdigest()
    assert Protocol.from_json(json.loads(json.dumps(found.to_json()))) == found
    asked = submission(tmp_path, *given).specs()[0].protocol
    assert ProtocolOptions.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    assert set(asked.text_hashes) == {found.eval_text_sha256, *(text.sha256 for text in found.more_texts)}
    alone = found.on_text(found.more_texts[0])
    assert alone.hash == protocol(tmp_path, CUDA, "--eval-text", "code").hash


def test_speed_at_several_sizes_without_quality(tmp_path: Path) -> None:
    specs = submission(tmp_path, "--measure", "speed", "--batch-size", "1,8").specs()
    assert [spec.protocol.batch_size for spec in specs] == [1, 1, 8, 8]


@pytest.mark.parametrize("text", ["", "sizes", "size,,speed", "Size", "quality speed"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="use size, quality, speed, why, energy"):
        Parts().convert(text, None, None)


@pytest.mark.parametrize("change", [{"why": True, "speed": False}, {"tasks": ("a",), "quality": False}])
def test_a_protocol_that_lacks_what_it_needs_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    options = ProtocolOptions(eval_text_sha256="0" * 64, **change)
    with pytest.raises(UsageError, match=r"not measured|without measuring"):
        options.for_device(CUDA)


def test_json_says_what_is_missing_and_why() -> None:
    stored = result(2, "bnb-nf4") | {"protocol": PROTOCOL | {"speed": False}}
    stored["details"] = {"device_uuid": None, "not_measured": {"quality": "it has no text"}}
    del stored["batch_id"]
    row = ResultRow(batch_id="b1", **vars_of(stored))
    assert row.to_json()["not_measured"] == {
        "quality": "it has no text",
        "speed": "it was not asked for (--measure speed)",
        "why": "qbatch measures it on a GPU only",
        "energy": "qbatch measures it on a GPU only",
    }
    unmeasured = ResultRow.from_json(result(3) | {"protocol": None, "state": "failed"})
    assert unmeasured.not_measured == {}


def vars_of(stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row as they are read, so that it is one that was made here."""
    row = ResultRow.from_json(stored | {"batch_id": "b1"})
    return {name: getattr(row, name) for name in stored}
