"""The page as a reader meets it: in Chromium, offline, wide and narrow, light and dark."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from fedmoe.report.log import ClientEntry, Run
from fedmoe.report.page import write_report

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
DRAWN = "[...document.querySelectorAll('.plot')].every((plot) => plot.dataset.drawn)"

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        missing = f"{CHROMIUM} is not there: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(many_runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(many_runs, path)
    return path.as_uri()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a page offline; afterwards, it must have asked for nothing and complained of nothing."""
    pages: list[Page] = []
    complaints: list[str] = []

    def open(uri: str, width: int = 1280, scheme: str = "light") -> Page:
        dark = scheme == "dark"
        page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        pages.append(page)
        page.context.set_offline(True)
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on(
            "request",
            lambda request: (
                complaints.append(f"request: {request.url}")
                if not request.url.startswith(("file:", "data:", "blob:"))
                else None
            ),
        )
        page.goto(uri)
        page.wait_for_function(DRAWN, timeout=60_000)
        return page

    yield open
    for page in pages:
        page.close()
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_drawn_and_nothing_hangs_over_the_edge(
    open_page: Callable[..., Page], report: str, width: int, scheme: str
) -> None:
    page = open_page(report, width, scheme)
    plots = page.locator(".plot")
    assert plots.count() == 7
    for i in range(plots.count()):
        assert plots.nth(i).locator("svg.main-svg").count() > 0
        marks = plots.nth(i).locator(".trace, .hm image, .points path").count()
        assert marks > 0, f"figure {i} is empty"
        box = plots.nth(i).bounding_box()
        drawn = plots.nth(i).locator("svg.main-svg").first.bounding_box()
        assert box and drawn
        assert drawn["width"] <= box["width"] + 1 and drawn["height"] <= box["height"] + 1
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_dark_screens_get_dark_paper_and_other_colours(
    open_page: Callable[..., Page], report: str
) -> None:
    def look(scheme: str) -> tuple[str, str]:
        page = open_page(report, 1280, scheme)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        line = page.locator("#rounds .js-line").first
        return paper, line.evaluate("(path) => path.style.stroke")

    assert look("light") == ("rgb(253, 252, 250)", "rgb(47, 95, 197)")
    assert look("dark") == ("rgb(21, 23, 26)", "rgb(92, 172, 252)")


def test_a_choice_changes_the_figure_and_what_is_said(
    open_page: Callable[..., Page], report: str
) -> None:
    page = open_page(report)
    says = page.locator("#load .says")
    assert says.inner_text().startswith("fedmoe, seed 0: load CV")
    page.locator("#load label", has_text="random-sub-moe").click()
    assert says.inner_text().startswith("random-sub-moe, seed 0")

    page.select_option("#history select", "client 4 (clipart)")
    assert page.locator("#history .says").inner_text() == "fedmoe, seed 0, client 4 (clipart)."


def test_choices_can_be_made_from_the_keyboard(open_page: Callable[..., Page], report: str) -> None:
    page = open_page(report)
    page.locator("#spread input").first.focus()
    page.keyboard.press("ArrowRight")
    assert "worst off" in page.locator("#spread .says").inner_text()


def test_a_method_can_be_hidden_and_shown_again(
    open_page: Callable[..., Page], report: str
) -> None:
    page = open_page(report)
    lines = page.locator("#rounds .scatterlayer .js-line")
    before = lines.count()
    button = page.locator("#rounds .key button", has_text="fedavg")
    button.click()
    page.wait_for_function(
        f"document.querySelectorAll('#rounds .scatterlayer .js-line').length < {before}"
    )
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    page.wait_for_function(
        f"document.querySelectorAll('#rounds .scatterlayer .js-line').length === {before}"
    )


def test_printing_uses_light_paper_and_fits_it(
    open_page: Callable[..., Page], report: str, tmp_path: Path
) -> None:
    page = open_page(report, 1280, "dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    page.wait_for_function(
        "document.querySelector('#rounds .js-line').style.stroke === 'rgb(47, 95, 197)'"
    )
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 252, 250)"
    widths = page.evaluate(
        "[...document.querySelectorAll('.plot .main-svg')].map((svg) => svg.clientWidth)"
    )
    assert max(widths) <= 690  # A4 less its margins, in CSS pixels


def test_names_run_no_code(
    open_page: Callable[..., Page], many_runs: list[Run], tmp_path: Path
) -> None:
    evil = "<img src=x onerror=alert(1)><b>&lt;script&gt;alert(2)"
    run = next(r for r in many_runs if r.info.method == "fedmoe")
    clients = [ClientEntry(c.id, f"{evil}{c.id % 2}", None, 1, 1, 1) for c in run.info.clients]
    path = tmp_path / "report.html"
    info = replace(run.info, method=evil, experiment=evil, clients=clients)
    write_report([replace(run, info=info)], path)
    page = open_page(path.as_uri())
    page.locator("#spread label", has_text="by group").click()
    assert page.locator("h1").inner_text() == evil
    assert page.locator("img").count() == 0
