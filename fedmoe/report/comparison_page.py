"""The comparison as one HTML page that needs no network: a heat table of methods and protocols,
accuracy against traffic, over rounds and over clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from fedmoe.report.atomic import write_atomically
from fedmoe.report.comparison import by_protocol, facts, target_of, target_text, with_target
from fedmoe.report.fairness import Note, comparison_notes, refused
from fedmoe.report.measures import Aggregate, Row, TableRow, aggregate_rows
from fedmoe.report.page import render
from fedmoe.report.palette import INK, MUTED, PAPER, Style, method_styles
from fedmoe.report.panels import Panel, Selector, View
from fedmoe.report.plots import base_figure, plain
from fedmoe.report.rows import KINDS
from fedmoe.report.tables import MIB, Unit, format_value

FADES_AT = 0.10  # a cell of the heat table has no colour from this much behind the best on
WORDS = {"chosen": "chosen", "received": "as received", "trained": "after local training"}


@dataclass(frozen=True)
class HeatCell:
    """One method on one protocol; `heat` is 1 for the best and 0 from FADES_AT behind it on."""

    text: str
    std: str
    heat: float
    best: bool


@dataclass(frozen=True)
class HeatLine:
    method: str
    control: bool
    cells: Sequence[HeatCell | None]  # one a protocol; None where the method did not run
    behind: str  # points behind the best, mean over protocols
    mark: str = ""


@dataclass(frozen=True)
class Remarks:
    """What is to be said of one protocol's rows."""

    protocol: str
    facts: str
    target: str
    notes: Sequence[Note]


def write_comparison(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the page for these rows, whole or not at all.

    Raises:
        ValueError: there are no rows but published ones.
    """
    text = render_comparison(rows, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def render_comparison(rows: Sequence[Row], title: str) -> str:
    """The page as text; the same rows give the same text."""
    own = [row for row in rows if not row.get("published")]
    if not own:
        raise ValueError("rows must hold at least one row of a run, got none")
    protocols = by_protocol(own)
    styles = _styles(own)
    return render(
        "comparison.html",
        [_bytes(protocols, styles), _rounds(protocols, styles), _spread(protocols, styles)],
        styles,
        title=title,
        facts=[
            _plural(len(styles), "method"),
            _plural(len(protocols), "protocol"),
            _plural(len({row["seed"] for row in own}), "seed"),
            _plural(len(own), "row"),
        ],
        protocols=list(protocols),
        heat=heat_table(protocols),
        fades_at=f"{100 * FADES_AT:.0f}",
        remarks=[_remarks(name, by_protocol(rows)[name]) for name in protocols],
        versions=sorted({f"{n} {v}" for row in own for n, v in row["versions"].items()}),
        dates=sorted({row["date"] for row in own if row.get("date")}),
    )


def heat_table(protocols: Mapping[str, Sequence[Row]]) -> list[HeatLine]:
    """Methods from the least behind the best to the most, then controls in the same way."""
    ends: dict[str, dict[str, tuple[TableRow, Aggregate]]] = {}
    best: dict[str, float] = {}
    comparable = {}
    for name, rows in protocols.items():
        table = [m for m in aggregate_rows(rows) if "personal_mean" in m.values]
        for m in table:
            ends.setdefault(m.method, {})[name] = m, m.values["personal_mean"]
        best[name] = max(
            (m.values["personal_mean"].mean for m in table if m.competes), default=1.0
        )
        comparable[name] = not refused(comparison_notes(rows))

    def cell(method: str, name: str) -> HeatCell | None:
        if name not in ends[method]:
            return None
        row, value = ends[method][name]
        text = format_value(value.mean, Unit.SHARE)
        is_best = text == format_value(best[name], Unit.SHARE)
        std = "" if value.std is None else format_value(value.std, Unit.SHARE)
        heat = 1 - min(1.0, max(0.0, best[name] - value.mean) / FADES_AT)
        return HeatCell(text, std, round(heat, 3), is_best and row.competes and comparable[name])

    def behind(method: str) -> float:
        return float(np.mean([best[p] - value.mean for p, (_, value) in ends[method].items()]))

    def is_control(method: str) -> bool:
        return any(row.control for row, _ in ends[method].values())

    def mark(method: str) -> str:
        return next((row.mark for row, _ in ends[method].values() if row.mark), "")

    return [
        HeatLine(
            method,
            is_control(method),
            [cell(method, name) for name in protocols],
            f"{100 * behind(method):.1f}" if len(ends[method]) == len(protocols) else "-",
            mark(method),
        )
        for method in sorted(ends, key=lambda m: (is_control(m), behind(m)))
    ]


def _styles(rows: Sequence[Row]) -> dict[str, Style]:
    """A look for each method; controls are grey."""
    styles = method_styles(list(dict.fromkeys(r["method"] for r in rows if not r.get("control"))))
    controls = dict.fromkeys(r["method"] for r in rows if r.get("control"))
    grey = {m: replace(s, color=MUTED) for m, s in method_styles(list(controls)).items()}
    return {**styles, **grey}


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    return methods


def _bytes(protocols: Mapping[str, Sequence[Row]], styles: Mapping[str, Style]) -> Panel:
    return Panel(
        id="bytes",
        title="What accuracy costs in traffic",
        subtitle="Mean personal accuracy at the end, against everything sent",
        how_to_read="Up and to the left is better. Each mark is a method at the end of its runs, "
        "its bar the standard deviation over seeds. Traffic is serialised, both ways, of all "
        "clients together, one-off costs included, on a scale of powers of ten. The dotted line is "
        "the target. A method is named where no other one is better with less traffic; the key "
        "tells the rest.",
        key="methods",
        selectors=(Selector("Protocol", list(protocols)),),
        views=[
            View((name,), bytes_figure(rows, styles), _bytes_says(rows))
            for name, rows in protocols.items()
        ],
    )


def bytes_figure(rows: Sequence[Row], styles: Mapping[str, Style]) -> go.Figure:
    """One protocol's methods at the end: accuracy against all traffic, in MiB, log scale."""
    figure = base_figure(460, may_shrink=True)
    target = target_of(rows)
    if target is not None:
        figure.add_hline(
            100 * target.accuracy, line={"color": MUTED, "width": 1, "dash": "dot"}, layer="below"
        )
    ends = [
        (m, m.values["bytes_total"], m.values["personal_mean"])
        for m in aggregate_rows(rows)
        if {"bytes_total", "personal_mean"} <= m.values.keys() and m.values["bytes_total"].mean
    ]
    least = min((traffic.mean for _, traffic, _ in ends), default=0.0)
    for m, traffic, end in ends:
        style = styles[m.method]
        beaten = any(t.mean <= traffic.mean and e.mean > end.mean for _, t, e in ends)
        figure.add_trace(
            go.Scatter(
                x=[round(traffic.mean / MIB, 4)],
                y=[round(100 * end.mean, 3)],
                error_y={
                    "type": "data",
                    "array": [round(100 * (end.std or 0), 3)],
                    "visible": end.std is not None,
                    "color": style.color,
                    "thickness": 1.2,
                    "width": 4,
                },
                mode="markers" if beaten else "markers+text",
                # Up and to the left of such a method there is nobody; the first has the axis there.
                text=[f"\xa0\xa0{plain(m.method)}\xa0\xa0"],
                textposition="middle right" if traffic.mean == least else "middle left",
                textfont={"size": 12, "color": style.color},
                cliponaxis=False,
                marker={
                    "color": style.color,
                    "symbol": style.symbol,
                    "size": 11,
                    "line": {"width": 1, "color": PAPER},
                },
                hovertemplate=f"<b>{plain(m.method)}</b>: %{{y:.1f}} %"
                + (f" ± {100 * end.std:.1f}" if end.std is not None else "")
                + f"<br>{format_value(traffic.mean, Unit.BYTES)} MiB<extra></extra>",
                name=plain(m.method),
                legendgroup=m.method,
                showlegend=False,
            )
        )
    ticks = _log_ticks([traffic.mean / MIB for _, traffic, _ in ends])
    figure.update_xaxes(
        title_text="traffic of the whole run, MiB",
        type="log",
        tickvals=ticks,
        ticktext=[f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks],
    )
    figure.update_yaxes(ticksuffix=" %")
    return figure


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten about these values; where they are few, also twice and five times each."""
    if not values:
        return []
    low, high = (math.log10(v) for v in (min(values), max(values)))
    steps = (1, 2, 5) if high - low < 1.5 else (1,)
    return [
        float(f"{step}e{power}")
        for power in range(math.floor(low) - 1, math.ceil(high) + 1)
        for step in steps
    ]


def _bytes_says(rows: Sequence[Row]) -> str:
    target = target_of(rows)
    if target is None:
        return "Nothing was measured."
    says = f"Best at the end: {target.best_method}, {100 * target.best:.1f} %."
    reached = {
        m.method: m.values["bytes_to_target"].mean
        for m in aggregate_rows(with_target(rows, target))
        if m.competes and "bytes_to_target" in m.values
    }
    if reached:
        first = min(reached, key=lambda method: reached[method])
        says += (
            f" Least traffic to the target of {100 * target.accuracy:.1f} %: {first}, "
            f"{format_value(reached[first], Unit.BYTES)} MiB."
        )
    return says


def _rounds(protocols: Mapping[str, Sequence[Row]], styles: Mapping[str, Style]) -> Panel:
    return Panel(
        id="rounds",
        title="How fast the methods learn",
        subtitle="Accuracy after so many rounds, mean over clients and seeds",
        how_to_read="A steeper line learns in fewer rounds. “As received” is the model as it "
        "reaches a client, “after local training” the same once the client has trained on it, and "
        "“chosen” whichever of the two the client’s own validation data prefers.",
        key="methods",
        selectors=(
            Selector("Protocol", list(protocols)),
            Selector("Accuracy", [WORDS[kind] for kind in KINDS]),
        ),
        views=[
            View((name, WORDS[kind]), rounds_figure(rows, kind, styles), _ends(rows, kind))
            for name, rows in protocols.items()
            for kind in KINDS
        ],
    )


def rounds_figure(rows: Sequence[Row], kind: str, styles: Mapping[str, Style]) -> go.Figure:
    """One protocol's courses; `kind` is "chosen", "received" or "trained"."""
    figure = base_figure(460, may_shrink=True)
    for method, own in _by_method(rows).items():
        points = _course(own, kind)
        if not points:
            continue
        style = styles[method]
        figure.add_trace(
            go.Scatter(
                x=list(points),
                y=[round(100 * mean, 2) for mean in points.values()],
                mode="lines+markers",
                line={"color": style.color, "width": 2, "dash": style.dash},
                marker={
                    "color": style.color,
                    "symbol": style.symbol,
                    "size": 8,
                    "line": {"width": 1, "color": PAPER},
                },
                cliponaxis=False,
                hovertemplate=f"<b>{plain(method)}</b>: %{{y:.1f}} % after %{{x}} rounds"
                "<extra></extra>",
                name=plain(method),
                legendgroup=method,
                showlegend=False,
            )
        )
    figure.update_xaxes(title_text="rounds done", rangemode="tozero")
    figure.update_yaxes(ticksuffix=" %")
    return figure


def _course(rows: Sequence[Row], kind: str) -> dict[int, float]:
    """Mean accuracy by round, over the rounds that all seeds of a method evaluated."""
    courses = [
        {point["round"]: point[kind] for point in row["curve"] if point[kind] is not None}
        for row in rows
    ]
    common = sorted(set.intersection(*(set(course) for course in courses)))
    return {r: sum(course[r] for course in courses) / len(courses) for r in common}


def _ends(rows: Sequence[Row], kind: str) -> str:
    methods = _by_method([row for row in rows if not row.get("control")])
    courses = {m: _course(own, kind) for m, own in methods.items()}
    ends = {m: list(points.values())[-1] for m, points in courses.items() if points}
    if not ends:
        return "Nothing was measured."
    first = sorted(ends, key=lambda m: -ends[m])[:3]
    return "At the end: " + ", ".join(f"{m} {100 * ends[m]:.1f} %" for m in first) + "."


def _spread(protocols: Mapping[str, Sequence[Row]], styles: Mapping[str, Style]) -> Panel:
    return Panel(
        id="spread",
        title="Who is well served, and who is not",
        subtitle="Personal accuracy of every client at the end, all seeds together",
        how_to_read="A box holds the middle half of the clients, its line the median, the diamond "
        "the mean; dots are clients far from the rest. A long way to the left is a client that a "
        "good mean hides.",
        key="",  # each box has its name beside it
        selectors=(Selector("Protocol", list(protocols)),),
        views=[
            View((name,), spread_figure(rows, styles), _worst_says(rows))
            for name, rows in protocols.items()
        ],
    )


def spread_figure(rows: Sequence[Row], styles: Mapping[str, Style]) -> go.Figure:
    """One protocol's clients, a box for each method, the best mean on top."""
    clients = {
        method: [100 * a for row in own for a in row["chosen_by_client"].values()]
        for method, own in _by_method(rows).items()
    }
    order = sorted((m for m in clients if clients[m]), key=lambda m: -float(np.mean(clients[m])))
    figure = base_figure(80 + 30 * len(order))
    for lane, method in enumerate(order):
        style = styles[method]
        values = clients[method]
        shared = {"legendgroup": method, "showlegend": False, "name": plain(method)}
        figure.add_trace(
            go.Box(
                x=[round(v, 2) for v in values],
                y0=lane,
                orientation="h",
                width=0.6,
                boxpoints="outliers",
                line={"color": style.color, "width": 1.4},
                marker={"color": style.color, "size": 4},
                fillcolor="rgba(0,0,0,0)",
                hoverinfo="skip",
                **shared,
            )
        )
        figure.add_trace(
            go.Scatter(
                x=[round(float(np.mean(values)), 2)],
                y=[lane],
                mode="markers",
                marker={"symbol": "diamond", "size": 8, "color": INK},
                hovertemplate=f"<b>{plain(method)}</b>: mean %{{x:.1f}} %, worst "
                f"{min(values):.1f} %, best {max(values):.1f} %<extra></extra>",
                **shared,
            )
        )
    figure.update_xaxes(title_text="accuracy of a client", ticksuffix=" %", showgrid=True)
    figure.update_yaxes(
        tickvals=list(range(len(order))),
        ticktext=[plain(m) for m in order],
        range=[len(order) - 0.4, -0.6],
        showgrid=False,
        tickfont={"color": INK},
    )
    return figure


def _worst_says(rows: Sequence[Row]) -> str:
    worst = {
        m.method: m.values["personal_worst_tenth"].mean
        for m in aggregate_rows(rows)
        if m.competes and "personal_worst_tenth" in m.values
    }
    if not worst:
        return "Nothing was measured."
    best = max(worst, key=lambda method: worst[method])
    return (
        f"The worst tenth of the clients fares best with {best}: {100 * worst[best]:.1f} % on "
        f"average."
    )


def _remarks(protocol: str, rows: Sequence[Row]) -> Remarks:
    target = target_of(rows)
    return Remarks(
        protocol,
        facts(rows).replace("`", ""),
        target_text(target, rows) if target is not None else "",
        comparison_notes(rows),
    )


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)
