"""Figures of experts: who uses which, how the choice changed, and how the load is spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from fedmoe.report.log import ClientEntry, Run
from fedmoe.report.palette import (
    GRID,
    HELD_SCALE,
    INK,
    MUTED,
    PAPER,
    SOFT,
    USE_SCALE,
    WARN,
    Style,
    scale,
)
from fedmoe.report.plots import base_figure, plain
from fedmoe.report.usage import (
    activations_by_layer,
    dead_experts,
    held_by_round,
    holders_by_layer,
    use_by_client,
)
from fedmoe.types import ExpertId

# action -> (symbol, size, filled)
MARKS = {
    "add": ("triangle-up", 9),
    "drop": ("triangle-down", 9),
    "revert": ("x", 8),
    "freeze": ("line-ns", 14),
}


def use_heat_map(run: Run, layer: int, most_percent: float) -> go.Figure:
    """Client by expert: share of the client's activations; blank where it does not hold it."""
    rows, height = client_rows(run.info.clients), _row_height(len(run.info.clients))
    use = use_by_client(run)
    num_experts = run.info.num_experts_L[layer]
    blank = np.full(num_experts, np.nan)
    z = [
        100 * use[row.id][layer] if isinstance(row, ClientEntry) and row.id in use else blank
        for row in rows
    ]
    figure = base_figure(70 + height * len(rows))
    figure.add_trace(
        _heat_map(
            list(range(num_experts)),
            rows,
            np.stack(z).round(1),
            (0.0, most_percent),
            USE_SCALE,
            "%{y}<br>expert %{x}: %{z:.1f} % of its activations",
            gap=1.5 if num_experts <= 48 else 0,
        )
    )
    _client_axis(figure, rows, height)
    figure.update_xaxes(title_text="expert", range=[-0.5, num_experts - 0.5], showline=False)
    if num_experts <= 20:
        figure.update_xaxes(dtick=1)
    return figure


def held_timeline(run: Run) -> go.Figure:
    """Client by round: how many experts it held, with a mark where that was changed."""
    rows, height = client_rows(run.info.clients), _row_height(len(run.info.clients))
    rounds = [r.round for r in run.rounds if r.phase != "final"]
    blank = [np.nan] * len(rounds)
    z = [
        [
            np.nan if held is None else len(held)
            for held in held_by_round(run, row.id)[: len(rounds)]
        ]
        if isinstance(row, ClientEntry)
        else blank
        for row in rows
    ]
    figure = base_figure(70 + height * len(rows))
    figure.add_trace(
        _heat_map(
            rounds,
            rows,
            np.array(z, dtype=np.float64),
            (0.0, float(sum(run.info.num_experts_L))),
            HELD_SCALE,
            "%{y}<br>round %{x}: holds %{z} experts",
            gap=0,
        )
    )
    names = {row.id: _label(row) for row in rows if isinstance(row, ClientEntry)}
    for action, (symbol, size) in MARKS.items():
        # From the next round on nothing changes: a bar between the two.
        shift = 0.5 if action == "freeze" else 0.0
        at = [
            (r.round + shift, names[c.client], ", ".join(_expert(run, *e) for e in c.experts))
            for r in run.rounds
            for c in r.changes
            if c.action == action
        ]
        figure.add_trace(_marks(action, symbol, size, at))
    _client_axis(figure, rows, height)
    figure.update_xaxes(
        title_text="round", range=[-0.5, max(rounds, default=0) + 0.5], showline=False
    )
    return figure


def client_history(
    run: Run, client: int, layer: int, most_percent: float, step: int = 1
) -> go.Figure:
    """Expert by round for one client: how it used what it held; blank where it did not hold it.

    With many rounds, `step` of them share a column.
    """
    num_experts = run.info.num_experts_L[layer]
    records = [r for r in run.rounds if r.phase != "final"]
    history = held_by_round(run, client)[: len(records)]
    columns = range(0, len(records), step)
    z = np.full((num_experts, len(columns)), np.nan)
    idle = z.copy()
    for column, start in enumerate(columns):
        held = frozenset[ExpertId]().union(*(h or () for h in history[start : start + step]))
        own = [e for at, e in sorted(held) if at == layer]
        counts = [
            r.count[client][layer][:num_experts]
            for r in records[start : start + step]
            if client in r.count
        ]
        if counts:
            count = np.array(counts, dtype=np.float64).sum(0)
            own = sorted({*own, *np.flatnonzero(count).tolist()})
            z[own, column] = 100 * count[own] / max(1.0, count.sum())
        else:
            idle[own, column] = 1.0
    figure = base_figure(70 + 17 * num_experts)
    # Where several rounds share a column, it stands over their middle.
    middles = [
        (records[start].round + records[min(start + step, len(records)) - 1].round) / 2
        for start in columns
    ]
    experts = list(range(num_experts))
    gap = 1.0 if len(columns) <= 60 else 0.0
    hover = "expert %{y}, round %{x}: held; the client sat this round out"
    figure.add_trace(_heat_map(middles, experts, idle, (0.0, 1.0), (GRID, GRID), hover, gap))
    hover = "expert %{y}, round %{x}: %{z:.1f} % of the activations"
    limits = (0.0, most_percent)
    figure.add_trace(_heat_map(middles, experts, z.round(1), limits, USE_SCALE, hover, gap))
    for action in ("add", "drop", "revert"):
        symbol, size = MARKS[action]
        moments: list[tuple[float, int | str, str]] = [
            (r.round, e.expert, f"expert {e.expert}")
            for r in records
            for c in r.changes
            if c.client == client and c.action == action
            for e in c.experts
            if e.layer == layer
        ]
        figure.add_trace(_marks(action, symbol, size, moments))
    for record in records:
        if any(c.client == client and c.action == "freeze" for c in record.changes):
            figure.add_vline(x=record.round + 0.5, line={"color": INK, "width": 1.2, "dash": "dot"})
    last = max((r.round for r in records), default=0)
    figure.update_xaxes(title_text="round", range=[-0.5, last + 0.5], showline=False)
    figure.update_yaxes(
        title_text="expert", range=[num_experts - 0.5, -0.5], showgrid=False, tickfont={"size": 11}
    )
    if num_experts <= 32:
        figure.update_yaxes(dtick=1)
    return figure


def expert_load(run: Run, layer: int, style: Style) -> go.Figure:
    """For each expert its share of all activations, and how many clients hold it."""
    total, holders = activations_by_layer(run)[layer], holders_by_layer(run)[layer]
    num_experts = len(total)
    share = (100 * total / max(1, int(total.sum()))).round(2)
    experts = list(range(num_experts))
    dead = [e.expert for e in dead_experts(run) if e.layer == layer]
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.16,
        row_heights=[0.6, 0.4],
        subplot_titles=("Share of all activations", "Clients that hold it"),
    )
    base = base_figure(440).layout
    figure.layout.template = go.layout.Template()  # make_subplots brings colours of its own
    figure.update_layout(base)
    figure.update_layout(
        xaxis2={**base.xaxis.to_plotly_json(), "anchor": "y2"},
        yaxis2={**base.yaxis.to_plotly_json(), "anchor": "x2"},
        bargap=0.3,
        margin_t=30,
    )
    figure.update_layout(xaxis_anchor="y", yaxis_anchor="x")
    figure.add_trace(
        go.Bar(
            x=experts,
            y=share.tolist(),
            marker_color=style.color,
            hovertemplate="expert %{x}: %{y:.1f} % of all activations<extra></extra>",
        ),
        row=1,
        col=1,
    )
    figure.add_trace(
        go.Bar(
            x=experts,
            y=holders.tolist(),
            marker_color=SOFT,
            hovertemplate="expert %{x}: held by %{y} clients<extra></extra>",
        ),
        row=2,
        col=1,
    )
    figure.add_hline(
        y=100 / num_experts,
        line={"color": MUTED, "width": 1.2, "dash": "dot"},
        row=1,
        col=1,
    )
    if dead:
        figure.add_trace(
            go.Scatter(
                x=dead,
                y=[float(share.max()) * 0.04] * len(dead),
                mode="markers",
                marker={"symbol": "x", "size": 10, "color": WARN},
                hovertemplate="expert %{x} is dead: no token ran it<extra></extra>",
            ),
            row=1,
            col=1,
        )
    figure.for_each_annotation(
        lambda note: note.update(x=0, xanchor="left", font={"size": 13, "color": INK}, yshift=4)
    )
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(ticksuffix=" %", row=1, col=1)
    figure.update_xaxes(title_text="expert", row=2, col=1)
    figure.update_xaxes(range=[-0.6, num_experts - 0.4])
    if num_experts <= 20:
        figure.update_xaxes(dtick=1)
    return figure


@dataclass(frozen=True)
class GroupRow:
    """A blank row above a group's clients; its name stands over as many of these as it needs."""

    name: str
    number: int


Rows = Sequence[ClientEntry | GroupRow]


def client_rows(clients: Sequence[ClientEntry]) -> list[ClientEntry | GroupRow]:
    """Clients by group, each group under its name; just the clients where there are no groups."""
    blank = -(-16 // _row_height(len(clients)))  # rows that a name of 16 pixels needs
    rows: list[ClientEntry | GroupRow] = []
    seen: set[str] = set()
    for client in sorted(clients, key=lambda c: (c.group or "", c.id)):
        if client.group is not None and client.group not in seen:
            seen.add(client.group)
            rows += [GroupRow(client.group, i) for i in range(blank)]
        rows.append(client)
    return rows


def _row_height(num_clients: int) -> int:
    return 18 if num_clients <= 60 else 9 if num_clients <= 150 else 5


def _label(row: ClientEntry | GroupRow | int) -> str | int:
    if isinstance(row, int):
        return row
    if isinstance(row, GroupRow):
        return f"group {plain(row.name)} {row.number}"
    return f"client {row.id}" + (f" ({plain(row.group)})" if row.group is not None else "")


def _heat_map(
    x: Sequence[float],
    rows: Rows | Sequence[int],
    z: NDArray[np.float64],
    limits: tuple[float, float],
    colors: Sequence[str],
    hover: str,
    gap: float,
) -> go.Heatmap:
    return go.Heatmap(
        x=list(x),
        y=[_label(row) for row in rows],
        z=z.tolist(),
        zmin=limits[0],
        zmax=limits[1],
        colorscale=scale(colors),
        showscale=False,
        xgap=gap,
        ygap=max(gap, 1.0),
        hoverongaps=False,
        hovertemplate=hover + "<extra></extra>",
    )


def _client_axis(figure: go.Figure, rows: Rows, row_height: int) -> None:
    """Number the clients' rows, and write each group's name into the row kept free for it."""
    every = 1 if row_height >= 12 else 5
    ticks = [
        (_label(row), str(row.id))
        for row in rows
        if isinstance(row, ClientEntry) and row.id % every == 0
    ]
    figure.update_yaxes(
        type="category",
        range=[len(rows) - 0.5, -0.5],
        tickvals=[at for at, _ in ticks],
        ticktext=[name for _, name in ticks],
        title_text="client",
        showgrid=False,
        tickfont={"size": 11},
    )
    for row in rows:
        if isinstance(row, GroupRow) and row.number == 0:
            blank = sum(isinstance(other, GroupRow) and other.name == row.name for other in rows)
            figure.add_annotation(
                text=f"<b>{plain(row.name)}</b>",
                x=0,
                xref="paper",
                xanchor="left",
                y=_label(row),
                yanchor="middle",
                yshift=-row_height * (blank - 1) / 2,
                showarrow=False,
                font={"size": 12, "color": INK},
            )


def _marks(
    action: str, symbol: str, size: int, at: Sequence[tuple[float, int | str, str]]
) -> go.Scatter:
    bar = symbol == "line-ns"
    return go.Scatter(
        x=[x for x, _, _ in at],
        y=[y for _, y, _ in at],
        mode="markers",
        marker={
            "symbol": symbol,
            "size": size,
            "color": PAPER,
            "line": {"color": INK, "width": 2.5 if bar else 1.4},
        },
        customdata=[[int(x), experts] for x, _, experts in at],
        hovertemplate=f"round %{{customdata[0]}}: {action} %{{customdata[1]}}<extra></extra>",
        name=action,
        showlegend=False,
    )


def _expert(run: Run, layer: int, expert: int) -> str:
    return f"expert {expert}" if len(run.info.num_experts_L) == 1 else f"expert {layer}.{expert}"
