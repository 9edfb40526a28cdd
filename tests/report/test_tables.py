"""The table, in Markdown and on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedmoe.report.log import Run
from fedmoe.report.measures import Row, result_row
from fedmoe.report.tables import (
    Better,
    Column,
    TerminalTable,
    Unit,
    format_value,
    grid,
    markdown_table,
)


@pytest.fixture
def rows(few_runs: list[Run]) -> list[Row]:
    return [result_row(run, "p") for run in few_runs]


def on_terminal(rows: list[Row], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(TerminalTable(rows, "four domains"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.78349, Unit.SHARE, "78.3"),
        (1.0, Unit.SHARE, "100.0"),
        (2**20 * 1234.5, Unit.BYTES, "1,234"),
        (2**20 * 12.34, Unit.BYTES, "12.3"),
        (2**20 * 1.234, Unit.BYTES, "1.23"),
        (2**10, Unit.BYTES, "0.001"),
        (0, Unit.BYTES, "0"),
        (16.0, Unit.COUNT, "16"),
        (4.96, Unit.COUNT, "5.0"),
    ],
)
def test_values_are_written_in_the_unit_of_their_column(
    value: float, unit: Unit, text: str
) -> None:
    assert format_value(value, unit) == text


def test_markdown_has_a_line_per_method_and_marks_the_best(rows: list[Row]) -> None:
    lines = markdown_table(rows).splitlines()
    assert lines[0].startswith("| method | seeds | Personal % |")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 3 and len({line.count("|") for line in table}) == 1
    assert "**" in "".join(table)
    for number, column in enumerate(grid(rows).columns):
        cells = [line.cells[number] for line in grid(rows).lines]
        means = [float(c.text.split(" ± ")[0].replace(",", "")) for c in cells]
        best = {"high": max, "low": min}.get(column.better.value)
        marked = [m for m, c in zip(means, cells, strict=True) if c.best]
        assert marked == ([m for m in means if m == best(means)] if best else [])


def test_nothing_is_marked_as_best_where_the_comparison_is_refused(rows: list[Row]) -> None:
    one_seed = [r for r in rows if r["seed"] == 0]
    text = markdown_table(one_seed)
    assert "**" not in text and "- Fewer than 3 seeds" in text
    assert " ± " not in text


def test_a_method_of_another_size_is_marked_and_never_the_best(rows: list[Row]) -> None:
    best = "local"
    ahead = {"personal_mean": 0.99, "num_experts_L": [2]}
    changed = [{**r, **ahead} if r["method"] == best else r for r in rows]
    lines = {line.method: line for line in grid(changed).lines}
    assert {m: line.mark for m, line in lines.items()} == {"fedmoe": "", "fedavg": "", best: "§"}
    assert lines[best].name == f"{best}§" and not any(c.best for c in lines[best].cells)
    assert sum(line.cells[0].best for line in lines.values()) == 1


def test_methods_that_look_equal_are_marked_equal(rows: list[Row]) -> None:
    level = [{**r, "personal_mean": 0.70001 + 1e-5 * r["seed"]} for r in rows]
    personal = [line.cells[0] for line in grid(level).lines]
    assert [c.best for c in personal] == [True, True, True]


def test_a_published_row_is_never_the_best(rows: list[Row]) -> None:
    published: Row = {"protocol": "p", "method": "a|b", "published": True, "personal_mean": 0.99}
    text = markdown_table([*rows, published])
    assert "| a\\|b† | 1 | 99.0 |" in text
    equal = {**published, "personal_mean": grid_best(rows)}
    assert [line.cells[0].best for line in grid([*rows, equal]).lines][-1] is False


def test_a_control_stands_below_the_methods_and_is_never_the_best(rows: list[Row]) -> None:
    marked = [
        {**r, "control": True, "personal_mean": 0.99} if r["method"] == "fedavg" else r
        for r in rows
    ]
    table = grid(marked)
    assert [line.name for line in table.lines] == ["fedmoe", "local", "fedavg‡"]
    assert [line.cells[0].best for line in table.lines] == [False, True, False]  # local's
    text = markdown_table(marked)
    assert "| fedavg‡ | 3 | 99.0" in text and "- Rows marked ‡ are controls" in text


def test_columns_can_be_named(rows: list[Row]) -> None:
    column = Column("seconds_exploring", "Exploring", Unit.SECONDS, Better.LOW, "")
    assert markdown_table(rows, [column]).splitlines()[0] == "| method | seeds | Exploring |"


def grid_best(rows: list[Row]) -> float:
    """The best personal accuracy of these rows, as written."""
    (best,) = [line.cells[0].text for line in grid(rows).lines if line.cells[0].best]
    return float(best.split(" ± ")[0]) / 100


def test_columns_that_nobody_measured_are_left_out(rows: list[Row]) -> None:
    without = [{**r, "client_memory_bytes": None} for r in rows]
    assert "Memory" in markdown_table(rows) and "Memory" not in markdown_table(without)


def test_the_terminal_table_says_what_markdown_says(rows: list[Row]) -> None:
    text = on_terminal(rows, 140)
    for line in grid(rows).lines:
        (shown,) = [t for t in text.splitlines() if t.startswith(line.method)]
        cells = [c.text.replace(" ", "") for c in line.cells]
        assert shown.split() == [line.method, "3", *cells]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_value_is_cut_off_on_a_terminal_of_usual_width(rows: list[Row], width: int) -> None:
    text = on_terminal(rows, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert all(c.text.replace(" ", "") in text for line in grid(rows).lines for c in line.cells)
