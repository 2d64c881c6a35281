"""A report's page: what it says is what ``compare`` says, it is whole, and nothing from outside gets a hold of it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from qbatch.models_db.job_record import JobRecord, WholeJob
from qbatch.views.answer_comparisons import baseline_pairs, compare_answers, say
from qbatch.views.comparison import Preference
from qbatch.views.groups import models_of
from qbatch.views.recommend import recommend
from qbatch.views.report.report_page import report_page
from qbatch.views.report.reported_batches import ReportedBatches
from tests.unit import test_compare
from tests.unit.measured_rows import H200, result
from tests.unit.printed import read
from tests.unit.test_answer_comparisons import right
from tests.unit.test_golden_views import REAL, a_failed_row, noted, parts, tasked, why_rows

Row = dict[str, Any]
BATCH = {"batch_id": "b1", "name": "nightly", "created_at": "2026-11-29T02:00:00+00:00"}


def reported(rows: Sequence[Row], batches: Sequence[Row] = (BATCH,)) -> ReportedBatches:
    jobs = [WholeJob(row=row, record=_record(row.job_id), baseline=None) for row in read(rows)]
    return ReportedBatches(batches=batches, jobs=jobs, made_at="2026-11-29T03:00:00+01:00", version="0.2.0")


def _record(job_id: str) -> JobRecord:
    return JobRecord(
        job_id=job_id,
        batch_id="b1",
        location="/models/a",
        allow_pickle=False,
        priority=0,
        attempt=1,
        failures=0,
        attempts=(),
        measured_at="2026-11-29T02:30:00+00:00",
    )


def page_of(rows: Sequence[Row], **preference: Any) -> str:
    return report_page(reported(rows), Preference(**preference))


class Document(HTMLParser):
    """The elements of a page with their attributes, and its text, each run of white space as one space."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self._texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def values(self, *attributes: str) -> list[str]:
        return [value for _, own in self.elements for name in attributes if (value := own.get(name)) is not None]


def text_of(rows: Sequence[Row], **preference: Any) -> str:
    return Document(page_of(rows, **preference)).text


@pytest.mark.parametrize("preference", [{}, {"prefer": "speed"}, {"prefer": "quality", "max_kl": 0.001}])
def test_the_answer_is_the_recommendation_word_for_word(preference: dict[str, Any]) -> None:
    shown = text_of(test_compare.ALL, **preference)
    for model in models_of(read(test_compare.ALL)):
        for group in model.groups:
            assert recommend(group, Preference(**preference)).sentence in shown


def test_the_answer_stands_before_everything_else() -> None:
    page = page_of(REAL)
    places = [page.index(f'id="{part}"') for part in ("answer", "chart", "size", "speed", "audit", "provenance")]
    assert places == sorted(places)


def test_how_questions_were_answered_is_said_as_compare_says_it() -> None:
    base, other = right(lost=40, gained=2, same=58)
    answers = {"j1": {"quiz": base}, "j3": {"quiz": other}}
    whole = reported([test_compare.BASELINE, test_compare.NF4])
    jobs = [replace(job, row=replace(job.row, answers=answers[job.row.job_id])) for job in whole.jobs]
    whole = replace(whole, jobs=jobs)
    shown = Document(report_page(whole, Preference())).text
    group = whole.models[0].groups[0]
    (compared,) = compare_answers(baseline_pairs(group))
    assert say(compared) in shown


def test_the_path_of_what_to_ship_is_there() -> None:
    ship = recommend(models_of(read(REAL))[0].groups[0], Preference()).ship
    assert ship is not None
    assert str(ship.checkpoint_path) in text_of(REAL)


def test_a_figure_has_its_error_and_its_ratio_and_the_heading_its_unit() -> None:
    shown = text_of(REAL)
    assert "KL nats" in shown.replace("KLnats", "KL nats")
    assert "1.6e-03± 1.0e-04" in shown


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "There are no jobs"),
        ([a_failed_row()], "Nothing was measured"),
        ([result(1), result(2, model="b", baseline_job_id=None)], "Only the unquantized model has a result"),
        (REAL, "AMD EPYC"),
        (noted(), "NVIDIA A100"),
        (why_rows(), "What limits it"),
        (parts(), "it was not asked for"),
        ([tasked(row, 0.8) for row in test_compare.ALL], "arc_easy acc"),
    ],
    ids=["empty", "failures", "baselines", "cpu", "devices", "why", "parts", "tasks"],
)
def test_a_page_is_made_of(rows: list[Row], words: str) -> None:
    assert words in text_of(rows)


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE, 0.0, -1.0, None])
def test_figures_that_are_no_numbers_are_shown_and_not_drawn(value: float | None) -> None:
    figures = dict.fromkeys(("kl_mean", "perplexity", "decode_tokens_per_s", "prefill_s_p50", "top1_agreement"), value)
    quality = {"kl_mean": value, "kl_mean_se": value, "ln_ppl_ratio": value}
    row = result(2, "bnb-nf4", **figures, weights_bytes=2**30, details={"quality": quality})
    page = page_of([result(1, weights_bytes=2**31, decode_tokens_per_s=40.0), row])
    assert {NAN: "NaN", INFINITE: "∞", -INFINITE: "−∞"}.get(value, "–") in page
    assert not re.search(r' (?:x|y|x1|y1|cx|data-sort)="[^"]*(?:nan|inf)', page)


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; alert(1); '",
    "</style><script src=//evil.example/x.js></script>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "model \u202egnp.exe\u2066",
    "line\u2028break\x00\x1b[31m",
    "m" * 5000,
    "\udcff not text",
)


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:16])
def test_names_and_messages_from_outside_stay_text(name: str) -> None:
    details = {"audit": {"dropped_tensors": [name], "kept": [{"name": name, "reason": name, "parameters": 3}]}}
    rows = [
        result(1, model=name, device_name=name, checkpoint_path=name, weights_bytes=2**31),
        result(2, "bnb-nf4", model=name, device_name=name, checkpoint_path=name, weights_bytes=2**30, kl_mean=0.01)
        | {"details": details | {"quality": {"kl_mean": 0.01}}},
        a_failed_row() | {"model": name, "error_kind": name, "error_message": name, "revision": name},
        result(4, name, model=name),
    ]
    page = report_page(reported(rows, [BATCH | {"name": name}]), Preference())
    document = Document(page)
    assert len(document.all("script")) == 1
    assert document.all("img") == []
    assert {name for _, own in document.elements for name in own if name.startswith("on") or name == "style"} == set()
    page.encode()
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\x00\x1b]", page)


def test_nothing_is_loaded_from_elsewhere() -> None:
    document = Document(page_of(REAL))
    loaded = document.values("src", "href", "srcset", "data", "poster", "action", "xlink:href")
    assert {address for address in loaded if not address.startswith("#")} == {"data:,"}
    assert not re.search(r"@import|url\(|https?://", page_of(REAL))


def policy_of(page: str) -> str:
    (policy,) = [own["content"] for own in Document(page).all("meta") if "http-equiv" in own]
    assert policy is not None
    return policy


def test_the_policy_names_the_style_and_the_script_by_their_hashes() -> None:
    page = page_of(REAL)
    assert policy_of(page).startswith("default-src 'none'")
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy_of(page)


def test_times_are_said_in_utc() -> None:
    assert "submitted 2026-11-29 02:00 UTC" in text_of(REAL)
    assert "Report made 2026-11-29 02:00 UTC" in text_of(REAL)


def test_a_job_without_a_result_has_its_reason_and_what_shows_its_log() -> None:
    attempt = {"attempt": 1, "worker": "w", "claimed_at": BATCH["created_at"]}
    whole = reported([a_failed_row()])
    record = JobRecord.from_json(whole.jobs[0].record.to_json() | {"attempts": [attempt]})
    jobs = [WholeJob(row=whole.jobs[0].row, record=record, baseline=None)]
    page = report_page(
        ReportedBatches(batches=[BATCH], jobs=jobs, made_at=whole.made_at, version="0.2.0"), Preference()
    )
    shown = Document(page).text
    assert "cuda_oom: no room" in shown
    assert "qbatch logs j9" in shown


def test_what_nobody_began_has_no_log() -> None:
    assert "qbatch logs" not in text_of([result(1, state="queued", details=None, protocol=None)])


def thousand() -> list[Row]:
    schemes = ("none", "bnb-int8", "bnb-nf4", "bnb-fp4")
    return [
        result(
            number,
            schemes[number % 4],
            model=f"org/model-{number // 4}",
            baseline_job_id=f"j{number - number % 4}" if number % 4 else None,
            weights_bytes=2**30 + number * 2**20,
            decode_tokens_per_s=30.0 + number % 7,
            kl_mean=None if number % 4 == 0 else 0.001 * (1 + number % 50),
            details={"quality": {"kl_mean": 0.001 * (1 + number % 50), "kl_mean_se": 1e-4}} if number % 4 else {},
        )
        for number in range(1, 1001)
    ]


def test_a_page_of_a_thousand_rows_has_them_all() -> None:
    document = Document(page_of(thousand()))
    shown = re.findall(r"j(\d+)", document.text)
    assert set(map(str, range(1, 1001))) <= set(shown)


def colours(style: str) -> Iterable[dict[str, str]]:
    """The variables of the light and of the dark scheme, and those of print."""
    for block in re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL):
        yield dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(part * value for part, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_stands_out_from_what_is_behind_it_in_every_scheme() -> None:
    (style,) = re.findall(r"<style>(.*?)</style>", page_of([]), flags=re.DOTALL)
    schemes = list(colours(style))
    assert len(schemes) == 3
    pairs = [(text, back) for text in ("text", "muted", "accent") for back in ("page", "surface", "raised")]
    pairs += [(kind, f"{kind}-back") for kind in ("good", "bad", "warn")] + [("second", "surface"), ("bad", "surface")]
    faint = [
        (pair, round(contrast(*(scheme[name] for name in pair)), 2))
        for scheme in schemes
        for pair in pairs
        if contrast(*(scheme[name] for name in pair)) < 4.5
    ]
    assert faint == []


def test_a_row_of_a_device_or_protocol_of_several_says_which() -> None:
    rows = [
        *test_compare.ALL,
        *(row | {"device_name": "A100", "job_id": f"{row['job_id']}0"} for row in test_compare.ALL),
    ]
    shown = text_of(rows)
    assert f"{H200}, protocol 1" in shown or H200 in shown
    assert "A100" in shown
