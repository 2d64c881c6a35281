"""A report as Chromium shows it: it asks for nothing, complains of nothing, sorts, fits a phone, and prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Page, browser
from tests.unit.measured_rows import result
from tests.unit.test_golden_views import REAL, noted
from tests.unit.test_report import HOSTILE, page_of, thousand

PHONE = 390
_JOBS = """[...document.querySelectorAll("#size tbody th .of")].map(one => one.textContent.match(/j[0-9]+/)[0])"""
_SIZES = """[...document.querySelectorAll("#size tbody tr")].map(row => parseFloat(row.cells[1].dataset.sort))"""
_OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# What lies wider than the page although nothing around it scrolls.
_CUT_OFF = """[...document.querySelectorAll("body *")].filter(one =>
    !one.closest(".scroll, svg, .skip") && one.getBoundingClientRect().right > innerWidth + 1
).map(one => one.outerHTML.slice(0, 120))"""


pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


def hostile() -> list[dict[str, object]]:
    return [
        result(
            number,
            "none" if number % 2 else "bnb-nf4",
            model=name,
            baseline_job_id=None if number % 2 else f"j{number - 1}",
            checkpoint_path=name * 3,
            weights_bytes=2**30 * (1 + number % 2),
            kl_mean=0.01,
            details={"quality": {"kl_mean": 0.01}, "audit": {"dropped_tensors": [name]}},
        )
        for number, name in enumerate((name for name in HOSTILE for _ in range(2)), start=1)
    ] + [result(99, state="failed", error_kind="unsupported", error_message=name, details=None) for name in HOSTILE[:1]]


REPORTS = {"real": REAL, "of several devices": noted(), "hostile": hostile(), "thousand": thousand()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The address of each report."""
    folder = tmp_path_factory.mktemp("reports")
    for name, rows in REPORTS.items():
        (folder / f"{name}.html").write_text(page_of(rows), encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in REPORTS}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", REPORTS)
def test_it_asks_for_nothing_and_complains_of_nothing(
    page: Page, written: dict[str, str], name: str, scheme: str
) -> None:
    page.open(written[name], scheme=scheme)
    assert page.requests == [written[name]]
    assert page.complaints == []


@pytest.mark.parametrize("name", REPORTS)
def test_nothing_is_cut_off_on_a_phone(page: Page, written: dict[str, str], name: str) -> None:
    page.open(written[name], width=PHONE, height=844)
    assert page.evaluate(_OVERFLOW) == 0
    assert page.evaluate(_CUT_OFF) == []


def test_no_script_of_a_name_runs(page: Page, written: dict[str, str]) -> None:
    page.open(written["hostile"])
    assert page.named("Page.javascriptDialogOpening") == []
    assert page.evaluate("document.scripts.length") == 1


def test_the_policy_stops_what_would_get_in_all_the_same(page: Page, tmp_path: Path) -> None:
    """And the other tests would see it."""
    inside = "<script>alert(1)</script><img src='http://127.0.0.1:9/' onerror='alert(1)'><b style='color:red'>x</b>"
    (tmp_path / "broken.html").write_text(page_of(REAL).replace("<main>", f"<main>{inside}"), encoding="utf-8")
    page.open((tmp_path / "broken.html").as_uri())
    assert page.named("Page.javascriptDialogOpening") == []
    said = str(page.complaints)
    assert [name for name in ("script-src", "img-src", "style-src") if name not in said] == []


def test_a_click_on_a_heading_sorts_and_another_one_turns_it_around(page: Page, written: dict[str, str]) -> None:
    page.open(written["thousand"])
    before = page.evaluate(_SIZES)
    click = 'document.querySelectorAll("#size thead button")[1].click()'
    page.evaluate(click)
    assert page.evaluate(_SIZES) == sorted(before)
    assert page.evaluate('document.querySelectorAll("#size thead th")[1].ariaSort') == "ascending"
    page.evaluate(click)
    assert page.evaluate(_SIZES) == sorted(before, reverse=True)


def test_higher_is_first_where_it_is_better_and_what_is_missing_last(page: Page, written: dict[str, str]) -> None:
    page.open(written["thousand"])
    column = page.evaluate(
        """[...document.querySelectorAll("#size thead th")].findIndex(one => one.textContent.startsWith("KL"))"""
    )
    keys = f"""[...document.querySelectorAll("#size tbody tr")].map(row => row.cells[{column}].dataset.sort ?? "")"""
    for _ in range(2):
        page.evaluate(f"""document.querySelectorAll("#size thead button")[{column}].click()""")
        assert set(page.evaluate(keys)[-250:]) == {""}
    page.evaluate("""document.querySelectorAll("#speed thead button")[1].click()""")
    assert page.evaluate("""document.querySelectorAll("#speed thead th")[1].ariaSort""") == "descending"


def test_names_sort_by_the_numbers_in_them(page: Page, written: dict[str, str]) -> None:
    page.open(written["thousand"])
    page.evaluate('document.querySelectorAll("#size thead button")[0].click()')
    models = page.evaluate(
        """[...document.querySelectorAll("#size tbody th .model")].map(one => one.textContent.split("-")[1])"""
    )
    assert [int(number) for number in models] == sorted(int(number) for number in models)


def test_without_scripts_the_page_is_whole(page: Page, written: dict[str, str]) -> None:
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(written["real"])
    page.call("Emulation.setScriptExecutionDisabled", value=False)
    assert page.evaluate('document.querySelectorAll("thead button").length') == 0
    assert page.evaluate(_JOBS) == [row["job_id"] for row in REAL]


def test_each_size_of_screen_has_its_own_charts(page: Page, written: dict[str, str]) -> None:
    shown = """[...document.querySelectorAll("svg.chart")].filter(one => one.getBoundingClientRect().width > 0)
        .map(one => one.classList[1])"""
    for width, name in ((1280, "wide"), (PHONE, "narrow")):
        page.open(written["real"], width=width)
        assert set(page.evaluate(shown)) == {name}


def test_the_schemes_differ_and_text_is_never_the_colour_behind_it(page: Page, written: dict[str, str]) -> None:
    both = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    seen = []
    for scheme in ("light", "dark"):
        page.open(written["real"], scheme=scheme)
        seen.append(tuple(page.evaluate(both)))
    assert len({*seen[0], *seen[1]}) == 4


def test_print_opens_what_is_folded(page: Page, written: dict[str, str]) -> None:
    page.open(written["real"], scheme="dark")
    page.call("Emulation.setEmulatedMedia", media="print")
    closed = """[...document.querySelectorAll("details:not([open]) dl")].map(one => one.checkVisibility())"""
    assert set(page.evaluate(closed)) == {True}
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf().startswith(b"%PDF")
    page.call("Emulation.setEmulatedMedia", media="")
