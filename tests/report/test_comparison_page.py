"""The comparison as a page: the heat table, the figures, and how it looks in a browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from fedmoe.report.comparison import by_protocol
from fedmoe.report.comparison_page import (
    bytes_figure,
    heat_table,
    render_comparison,
    rounds_figure,
    spread_figure,
    write_comparison,
)
from fedmoe.report.log import Run
from fedmoe.report.measures import Row
from fedmoe.report.palette import Style, method_styles
from fedmoe.report.rows import full_row, received_and_tuned

DRAWN = "[...document.querySelectorAll('.plot')].every((plot) => plot.dataset.drawn)"


@pytest.fixture
def rows(few_runs: list[Run]) -> list[Row]:
    """Three methods, three seeds, two protocols; local is a control, fedavg is split."""
    found = [
        {**full_row(run, p), "control": run.info.method == "local", "date": "2026-01-02"}
        for p in ("first", "second")
        for run in few_runs
    ]
    return received_and_tuned(found, ["fedavg"])


@pytest.fixture
def styles(rows: list[Row]) -> dict[str, Style]:
    return method_styles(list(dict.fromkeys(row["method"] for row in rows)))


def ends(row_method: str, *means: float, **changed: object) -> list[Row]:
    return [
        {"protocol": "p", "method": row_method, "seed": s, "rounds": 1, "personal_mean": m,
         "partition_hash": str(s), **changed}
        for s, m in enumerate(means)
    ]  # fmt: skip


def test_heat_fades_with_the_distance_from_the_best_method() -> None:
    rows = [
        *ends("a", 0.80, 0.80, 0.80),
        *ends("b", 0.75, 0.75, 0.75),
        *ends("c", 0.60, 0.60, 0.60),
        *ends("known", 0.85, 0.85, 0.85, control=True),
    ]
    table = heat_table({"p": rows})
    assert [line.method for line in table] == ["a", "b", "c", "known"]
    cells = [line.cells[0] for line in table]
    # b is 0.05 of the 0.10 behind a; the control is ahead of it, and never the best.
    assert [c.heat for c in cells if c] == [1.0, 0.5, 0.0, 1.0]
    assert [c.best for c in cells if c] == [True, False, False, False]
    assert [line.behind for line in table] == ["0.0", "5.0", "20.0", "-5.0"]


def test_a_method_of_another_size_is_marked_in_its_place_and_never_the_best() -> None:
    sizes = {"a": [16], "b": [16], "mix": [4]}
    table = heat_table({
        "p": [r for m, n in sizes.items() for r in ends(m, 0.5 + 0.1 * len(m), num_experts_L=n)]
    })
    assert [(line.method, line.mark, line.control) for line in table] == [
        ("mix", "§", False), ("a", "", False), ("b", "", False)
    ]  # fmt: skip
    assert not any(c.best for c in table[0].cells if c)


def test_a_method_that_a_protocol_lacks_has_an_empty_cell_and_no_mean() -> None:
    two = {"p": ends("a", 0.8, 0.8, 0.8), "q": [*ends("a", 0.7), *ends("b", 0.6)]}
    a, b = heat_table(two)
    assert (a.method, b.method) == ("a", "b") and b.cells[0] is None and b.behind == "-"
    assert a.cells[1] is not None and not a.cells[1].best  # one seed: nothing is called best


def test_marks_stand_at_the_end_of_the_runs(rows: list[Row], styles: dict[str, Style]) -> None:
    own = by_protocol(rows)["first"]
    figure = bytes_figure(own, styles)
    marks = {trace.name: trace for trace in figure.data if trace.error_y.array is not None}
    assert marks.keys() == {row["method"] for row in own}
    for method, mark in marks.items():
        of_seeds = [row for row in own if row["method"] == method]
        assert mark.x[0] == pytest.approx(
            np.mean([row["bytes_total"] for row in of_seeds]) / 2**20, abs=1e-4
        )
        accuracy = 100 * np.array([row["personal_mean"] for row in of_seeds])
        assert mark.y[0] == pytest.approx(accuracy.mean(), abs=1e-3)
        assert mark.error_y.array[0] == pytest.approx(accuracy.std(ddof=1), abs=1e-3)
    assert figure.layout.xaxis.type == "log"


def test_a_method_is_named_if_none_is_better_with_less_traffic(styles: dict[str, Style]) -> None:
    traffic = {"fedavg + fine-tuning": (300, 0.8), "fedmoe": (100, 0.7), "local": (200, 0.6)}
    rows = [r for m, (b, a) in traffic.items() for r in ends(m, a, a, a, bytes_total=b * 2**20)]
    named = {t.name: "text" in t.mode for t in bytes_figure(rows, styles).data}
    assert named == {"fedavg + fine-tuning": True, "fedmoe": True, "local": False}


@pytest.mark.parametrize("kind", ["chosen", "received", "trained"])
def test_courses_are_means_over_seeds(
    rows: list[Row], styles: dict[str, Style], kind: str
) -> None:
    own = by_protocol(rows)["second"]
    for trace in rounds_figure(own, kind, styles).data:
        curves = [row["curve"] for row in own if row["method"] == trace.name]
        last = np.mean([curve[-1][kind] for curve in curves])
        assert trace.x[-1] == curves[0][-1]["round"]
        assert trace.y[-1] == pytest.approx(100 * last, abs=0.01)


def test_every_client_of_every_seed_is_in_its_methods_box(
    rows: list[Row], styles: dict[str, Style]
) -> None:
    own = by_protocol(rows)["first"]
    figure = spread_figure(own, styles)
    boxes = {t.name: t for t in figure.data if t.type == "box"}
    for method, box in boxes.items():
        clients = [a for r in own if r["method"] == method for a in r["chosen_by_client"].values()]
        assert sorted(box.x) == pytest.approx(sorted(100 * a for a in clients), abs=0.01)
    means = [float(np.mean(boxes[name].x)) for name in figure.layout.yaxis.ticktext]
    assert means == sorted(means, reverse=True)


def test_the_page_stands_alone_and_is_the_same_each_time(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "comparison.html"
    write_comparison(rows, "A <title>", path)
    text = path.read_text()
    assert text == render_comparison(rows, "A <title>")
    assert "A &lt;title&gt;" in text and "2026-01-02" in text
    assert "4 methods" in text and "2 protocols" in text and "local‡" in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [len(panel["views"]) for panel in data["panels"].values()] == [2, 6, 2]


def test_a_page_of_one_seed_says_that_nothing_is_marked_as_best(rows: list[Row]) -> None:
    text = render_comparison([row for row in rows if row["seed"] == 0], "one")
    assert "Fewer than 3 seeds" in text and '<span class="sr"> (best)' not in text


def test_rows_without_any_measurement_have_a_page_too(rows: list[Row]) -> None:
    blank = {"personal_mean": None, "curve": [], "chosen_by_client": {}, "bytes_total": 0}
    text = render_comparison([{**row, **blank} for row in rows[:1]], "blank")
    assert "Nothing was measured." in text


@pytest.mark.parametrize("rows", [[], [{"protocol": "p", "method": "a", "published": True}]])
def test_no_rows_of_runs_make_no_page(rows: list[Row]) -> None:
    with pytest.raises(ValueError, match="at least one row of a run"):
        render_comparison(rows, "none")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "light"), (390, "dark")])
def test_in_a_browser_all_is_drawn_within_the_screen_and_offline(
    rows: list[Row], tmp_path: Path, chromium: str, width: int, scheme: str
) -> None:
    path = tmp_path / "comparison.html"
    write_comparison(rows, "Methods compared", path)
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        page.context.set_offline(True)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_function(DRAWN, timeout=60_000)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator(".plot svg.main-svg").count() >= 3
        colour = "getComputedStyle(document.querySelector('.heat td[style]')).backgroundColor"
        assert page.evaluate(colour) not in ("rgba(0, 0, 0, 0)", "transparent")
        says = page.locator("#rounds .says")
        before = says.inner_text()
        page.locator("#rounds label", has_text="as received").click()
        assert says.inner_text() != before
        browser.close()
    assert complaints == []
