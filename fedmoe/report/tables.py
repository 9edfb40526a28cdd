"""One table of methods, for the terminal, for Markdown and for the page.

Accuracies in per cent, bytes in MiB, "mean ± standard deviation over seeds". The best of a column
is marked, unless something about the runs forbids comparing them; the notes say what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedmoe.report.fairness import Note, comparison_notes, refused
from fedmoe.report.measures import Aggregate, Row, TableRow, aggregate_rows

MIB = 2**20


class Unit(Enum):
    """How a value is written."""

    SHARE = "per cent"
    BYTES = "MiB"
    COUNT = "count"
    SECONDS = "seconds"


class Better(Enum):
    """Which end of a column is the good one."""

    HIGH = "high"
    LOW = "low"
    NEITHER = "neither"


@dataclass(frozen=True)
class Column:
    key: str  # of result_row
    title: str
    unit: Unit
    better: Better
    meaning: str


COLUMNS = (
    Column(
        "personal_mean",
        "Personal %",
        Unit.SHARE,
        Better.HIGH,
        "mean over clients of the accuracy on their own test part, of the model that each would "
        "keep: as received or after local training, whichever its own validation part prefers",
    ),
    Column("personal_std", "Std %", Unit.SHARE, Better.NEITHER, "standard deviation over clients"),
    Column(
        "personal_worst_tenth",
        "Worst tenth %",
        Unit.SHARE,
        Better.HIGH,
        "mean of the tenth of the clients that are worst off",
    ),
    Column(
        "accuracy_received_mean",
        "As received %",
        Unit.SHARE,
        Better.HIGH,
        "mean over clients of the model as it arrived, not trained any further",
    ),
    Column(
        "accuracy_trained_mean",
        "Trained %",
        Unit.SHARE,
        Better.HIGH,
        "the same after local training",
    ),
    Column(
        "global",
        "Global %",
        Unit.SHARE,
        Better.HIGH,
        "the merged model on all clients' test parts together",
    ),
    Column(
        "bytes_total",
        "Traffic MiB",
        Unit.BYTES,
        Better.LOW,
        "all that was sent, up and down, all clients, with one-off costs",
    ),
    Column(
        "client_memory_bytes",
        "Memory MiB",
        Unit.BYTES,
        Better.LOW,
        "the most that any client needed at its peak",
    ),
    Column(
        "experts_held_mean",
        "Experts held",
        Unit.COUNT,
        Better.NEITHER,
        "mean over clients, all layers, at the end",
    ),
    Column("seconds", "Seconds", Unit.SECONDS, Better.NEITHER, "wall time of the whole run"),
)


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


@dataclass(frozen=True)
class Line:
    """One method's line of the table."""

    method: str
    num_seeds: int
    published: bool
    cells: Sequence[Cell]  # as many as the grid has columns
    control: bool = False
    mark: str = ""

    @property
    def name(self) -> str:
        """The method's name with its mark."""
        return self.method + self.mark


@dataclass(frozen=True)
class Grid:
    """The table before it is drawn anywhere."""

    columns: Sequence[Column]
    lines: Sequence[Line]
    notes: Sequence[Note]


def grid(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> Grid:
    """The table of these rows of results; a column that nobody has a value for is left out.

    Controls, and then published figures, stand below the methods and are never the best.
    """
    notes = comparison_notes(rows)
    methods = sorted(aggregate_rows(rows), key=lambda m: (m.published, m.control))
    columns = [c for c in columns if any(c.key in m.values for m in methods)]
    mark = not refused(notes) and sum(m.competes for m in methods) > 1
    best = {c: _best(c, methods) if mark else None for c in columns}
    return Grid(
        columns,
        [
            Line(
                m.method,
                m.num_seeds,
                m.published,
                [_cell(c, m, best[c]) for c in columns],
                m.control,
                m.mark,
            )
            for m in methods
        ],
        notes,
    )


def markdown_table(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> str:
    """The table in Markdown, notes below, the best in bold."""
    table = grid(rows, columns)
    head = ["method", "seeds", *(c.title for c in table.columns)]
    lines = [_markdown_line(head), "|---|" + "---:|" * (len(head) - 1)]
    for line in table.lines:
        cells = [f"**{c.text}**" if c.best else c.text for c in line.cells]
        name = line.name.replace("|", "\\|")
        lines.append(_markdown_line([name, str(line.num_seeds), *cells]))
    if table.notes:
        lines += ["", *(f"- {note.text}" for note in table.notes)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class TerminalTable:
    """The table for a terminal: on one that is too narrow, costs stand under accuracies."""

    rows: Sequence[Row]
    title: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        content = grid(self.rows)
        if self.title:
            yield Text(self.title, style="bold")
        whole = _terminal_part(content, content.columns)
        unbounded = options.update(max_width=10_000)
        if Measurement.get(console, unbounded, whole).maximum <= options.max_width:
            yield whole
        else:
            yield _terminal_part(content, [c for c in content.columns if c.unit is Unit.SHARE])
            yield Text()
            yield _terminal_part(content, [c for c in content.columns if c.unit is not Unit.SHARE])
        if content.notes:
            yield Text()
        for note in content.notes:
            mark, style = ("! ", "yellow") if note.refuses else ("· ", "dim")
            yield Text(mark + note.text, style=style)


def _terminal_part(content: Grid, columns: Sequence[Column]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\nmethod", no_wrap=True)
    table.add_column("\nseeds", justify="right", no_wrap=True)
    for column in columns:
        # Two short lines rather than one long.
        head = "\n".join(column.title.split(" ", 1))
        table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
    shown = [i for i, column in enumerate(content.columns) if column in columns]
    for line in content.lines:
        cells = [
            Text(line.cells[i].text.replace(" ", ""), "bold green" if line.cells[i].best else "")
            for i in shown
        ]
        name = Text(line.name, style="bold")
        table.add_row(name, str(line.num_seeds), *cells)
    return table


def format_value(value: float, unit: Unit) -> str:
    """A value in its unit, without the unit's name."""
    if unit is Unit.SHARE:
        return f"{100 * value:.1f}"
    if unit is Unit.BYTES:
        return _three_digits(value / MIB)
    if unit is Unit.SECONDS:
        return _three_digits(value)
    return f"{value:.1f}" if value % 1 else f"{value:.0f}"


def _three_digits(value: float) -> str:
    """Three significant digits, thousands in groups, never an exponent."""
    if value == 0:
        return "0"
    for limit, digits in ((0.1, 3), (10, 2), (100, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def _cell(column: Column, row: TableRow, best: str | None) -> Cell:
    value = row.values.get(column.key)
    if value is None:
        return Cell("-")
    text = format_value(value.mean, column.unit)
    is_best = best is not None and text == best and row.competes
    return Cell(_with_std(text, value, column.unit), is_best)


def _with_std(text: str, value: Aggregate, unit: Unit) -> str:
    # How much traffic or time varies over seeds is noise beside what it is.
    if value.std is None or unit is not Unit.SHARE:
        return text
    return f"{text} ± {format_value(value.std, unit)}"


def _best(column: Column, rows: Sequence[TableRow]) -> str | None:
    """The best value as written, so that what looks equal is marked equal."""
    means = [r.values[column.key].mean for r in rows if column.key in r.values and r.competes]
    if column.better is Better.NEITHER or len(means) < 2:
        return None
    best = max(means) if column.better is Better.HIGH else min(means)
    return format_value(best, column.unit)


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
