"""Figures of accuracy: against traffic, over rounds, and over clients.

Each function returns a plotly figure that stands on its own, in a notebook too. A method looks the
same in all of them: pass the same `styles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go

from fedmoe.report.log import Run
from fedmoe.report.measures import Evaluation, evaluations, final_evaluation, over_clients
from fedmoe.report.palette import GRID, INK, MUTED, PAPER, Style, method_styles
from fedmoe.report.tables import MIB

FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"

Accuracies = Callable[[Evaluation], Mapping[int, float]]

MEASURES: Mapping[str, Accuracies] = {
    "chosen": lambda e: e.chosen,
    "as received": lambda e: e.received,
    "after local training": lambda e: e.trained,
}
MERGED = "merged model"


@dataclass(frozen=True)
class Point:
    """A method at one evaluated round: mean over its seeds."""

    round: int
    bytes_total: float
    mean: float  # accuracy, 0 to 1
    std: float | None  # over seeds; None from one seed


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method by seed; methods that change their clients' experts come first."""
    methods: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda r: (r.info.method, r.info.seed)):
        methods.setdefault(run.info.method, []).append(run)

    def steps(method: str) -> int:
        return sum(len(r.changes) for run in methods[method] for r in run.rounds)

    return {m: methods[m] for m in sorted(methods, key=lambda m: (-steps(m), m))}


def curve(runs: Sequence[Run], accuracies: Accuracies) -> list[Point]:
    """One method's course over the rounds that all its seeds evaluated."""
    per_seed = []
    for run in runs:
        measured = [(e, accuracies(e)) for e in evaluations(run)]
        per_seed.append({e.round: (e.bytes_total, over_clients(a).mean) for e, a in measured if a})
    return _over_seeds(per_seed)


def merged_curve(runs: Sequence[Run]) -> list[Point]:
    """As `curve`, for the merged model."""
    per_seed = []
    for run in runs:
        spent, own = 0, {}
        for r in run.rounds:
            if r.global_accuracy is not None:
                own[r.round] = (spent + r.bytes_down, r.global_accuracy)
            spent += r.bytes_down + r.bytes_up
        per_seed.append(own)
    return _over_seeds(per_seed)


def curve_of(runs: Sequence[Run], measure: str) -> list[Point]:
    """One method's course by the name of a measure: one of MEASURES, or MERGED."""
    return merged_curve(runs) if measure == MERGED else curve(runs, MEASURES[measure])


def _over_seeds(per_seed: Sequence[Mapping[int, tuple[int, float]]]) -> list[Point]:
    rounds = sorted(set.intersection(*(set(own) for own in per_seed)))
    points = []
    for r in rounds:
        spent, means = np.array([own[r] for own in per_seed], dtype=np.float64).T
        std = float(means.std(ddof=1)) if len(means) > 1 else None
        points.append(Point(r, float(spent.mean()), float(means.mean()), std))
    return points


def accuracy_against_bytes(
    runs: Sequence[Run], styles: Mapping[str, Style] | None = None
) -> go.Figure:
    """Mean chosen accuracy against all traffic so far; a silent method is a level line."""
    methods = by_method(runs)
    styles = styles or method_styles(list(methods))
    curves = {m: curve(own, MEASURES["chosen"]) for m, own in methods.items()}
    most = max((p.bytes_total for c in curves.values() for p in c), default=0.0)
    figure = base_figure(430, may_shrink=True)
    for method, points in curves.items():
        if not points:
            continue
        # Nothing to see of a course that never leaves the left edge.
        if len(points) > 1 and points[-2].bytes_total < 0.02 * most:
            points = [points[-1]]
            figure.add_trace(_level(method, points[0].mean, most, styles[method]))
            figure.add_annotation(
                text=plain(method),
                x=0,
                y=100 * points[0].mean,
                xanchor="left",
                yanchor="bottom",
                xshift=4,
                showarrow=False,
                font={"size": 12, "color": styles[method].color},
            )
            continue
        x = [round(p.bytes_total / MIB, 4) for p in points]
        figure.add_traces(_band_and_line(method, x, points, styles[method]))
    figure.update_xaxes(title_text="traffic so far, MiB", rangemode="tozero", tickformat=",~r")
    figure.update_yaxes(range=_range(curves.values()), ticksuffix=" %")
    return figure


def accuracy_over_rounds(
    runs: Sequence[Run], measure: str = "chosen", styles: Mapping[str, Style] | None = None
) -> go.Figure:
    """Mean accuracy after so many rounds; `measure` is one of MEASURES, or MERGED."""
    methods = by_method(runs)
    styles = styles or method_styles(list(methods))
    every = {
        name: {m: curve_of(own, name) for m, own in methods.items()} for name in (*MEASURES, MERGED)
    }
    figure = base_figure(430, may_shrink=True)
    for method, points in every[measure].items():
        if points:
            x = [float(p.round) for p in points]
            figure.add_traces(_band_and_line(method, x, points, styles[method]))
    figure.update_xaxes(title_text="rounds done", rangemode="tozero")
    # One range for every measure, so that switching between them can be seen.
    ranges = [c for curves in every.values() for c in curves.values()]
    figure.update_yaxes(range=_range(ranges), ticksuffix=" %")
    return figure


def spread_over_clients(
    runs: Sequence[Run], styles: Mapping[str, Style] | None = None
) -> go.Figure:
    """Every client's chosen accuracy at the end, one lane per method."""
    methods = by_method(runs)
    styles = styles or method_styles(list(methods))
    figure = base_figure(90 + 74 * len(methods))
    for lane, (method, own) in enumerate(methods.items()):
        dots = _final_dots(own)
        if dots:
            _add_lane(figure, method, lane, 1.0, dots, styles[method], box=True)
    _lanes(figure, list(range(len(methods))), [plain(m) for m in methods])
    figure.update_yaxes(range=[len(methods) - 0.45, -0.55])
    return figure


def spread_by_group(runs: Sequence[Run], styles: Mapping[str, Style] | None = None) -> go.Figure:
    """The same, by the clients' groups: within each group, one lane per method."""
    methods = by_method(runs)
    styles = styles or method_styles(list(methods))
    groups = group_names(runs)
    block = len(methods) + 1.4
    figure = base_figure(int(70 + 22 * block * len(groups)))
    for g, group in enumerate(groups):
        top = g * block
        figure.add_annotation(
            text=f"<b>{plain(group)}</b>",
            x=0,
            xref="paper",
            xanchor="left",
            y=top - 0.2,
            yanchor="middle",
            showarrow=False,
            font={"size": 13, "color": INK},
        )
        for m, (method, own) in enumerate(methods.items()):
            dots = [d for d in _final_dots(own) if d.group == group]
            if dots:
                _add_lane(figure, method, top + 0.8 + m, 0.7, dots, styles[method], box=False)
    _lanes(figure, [], [])
    figure.update_yaxes(range=[block * len(groups) - 0.4, -0.9], showgrid=False)
    return figure


def group_names(runs: Sequence[Run]) -> list[str]:
    """The clients' groups by name; empty where the clients have none."""
    return sorted({c.group for run in runs for c in run.info.clients if c.group is not None})


@dataclass(frozen=True)
class _Dot:
    accuracy: float
    client: int
    seed: int
    group: str | None


def _final_dots(runs: Sequence[Run]) -> list[_Dot]:
    dots = []
    for run in runs:
        groups = {c.id: c.group for c in run.info.clients}
        final = final_evaluation(run)
        if final:
            seed = run.info.seed
            dots += [_Dot(a, c, seed, groups.get(c)) for c, a in sorted(final.chosen.items())]
    return dots


def _add_lane(
    figure: go.Figure,
    method: str,
    lane: float,
    height: float,
    dots: Sequence[_Dot],
    style: Style,
    box: bool,
) -> None:
    accuracy = [round(100 * d.accuracy, 2) for d in dots]
    if box:
        figure.add_trace(
            go.Box(
                x=accuracy,
                y0=lane,
                orientation="h",
                width=0.52,
                boxpoints=False,
                line={"color": style.color, "width": 1.2},
                fillcolor="rgba(0,0,0,0)",
                hoverinfo="skip",
                legendgroup=method,
                showlegend=False,
            )
        )
    # Off the middle by the golden ratio: even, and the same each time.
    offset = [height * 0.34 * (2 * ((0.618034 * (i + 1)) % 1.0) - 1) for i in range(len(dots))]
    figure.add_trace(
        go.Scatter(
            x=accuracy,
            y=[round(lane + o, 3) for o in offset],
            mode="markers",
            marker={
                "color": style.color,
                "symbol": style.symbol,
                "size": _size(style.symbol) - 1,
                "opacity": 0.55,
                "line": {"width": 0},
            },
            customdata=[
                [d.client, d.seed, plain(d.group) if d.group else "no group"] for d in dots
            ],
            hovertemplate=f"<b>{plain(method)}</b>: %{{x:.1f}} %<br>client %{{customdata[0]}} "
            "(%{customdata[2]}), seed %{customdata[1]}<extra></extra>",
            name=plain(method),
            legendgroup=method,
            showlegend=False,
        )
    )
    mean = sum(accuracy) / len(accuracy)
    figure.add_trace(
        go.Scatter(
            x=[mean, mean],
            y=[lane - height * 0.44, lane + height * 0.44],
            mode="lines",
            line={"color": INK, "width": 2.5},
            hovertemplate=f"<b>{plain(method)}</b>: mean {mean:.1f} %<extra></extra>",
            legendgroup=method,
            showlegend=False,
        )
    )


def _lanes(figure: go.Figure, at: Sequence[int], names: Sequence[str]) -> None:
    figure.update_yaxes(tickvals=at, ticktext=names, showgrid=False, tickfont={"color": INK})
    figure.update_xaxes(title_text="accuracy of a client", ticksuffix=" %", showgrid=True)


def _band_and_line(
    method: str, x: Sequence[float], points: Sequence[Point], style: Style
) -> list[go.Scatter]:
    mean = [round(100 * p.mean, 3) for p in points]
    std = [round(100 * p.std, 3) if p.std is not None else None for p in points]
    traces = []
    if len(points) > 1 and any(std):
        high = [m + (s or 0) for m, s in zip(mean, std, strict=True)]
        low = [m - (s or 0) for m, s in zip(mean, std, strict=True)]
        traces.append(
            go.Scatter(
                x=[*x, *reversed(x)],
                y=[*high, *reversed(low)],
                fill="toself",
                mode="none",
                fillcolor=style.color,
                opacity=0.16,
                hoverinfo="skip",
                legendgroup=method,
                showlegend=False,
            )
        )
    traces.append(
        go.Scatter(
            x=list(x),
            y=mean,
            mode="lines+markers",
            line={"color": style.color, "width": 2.2, "dash": style.dash},
            marker={
                "color": style.color,
                "symbol": style.symbol,
                "size": _size(style.symbol),
                "line": {"width": 1, "color": PAPER},
            },
            cliponaxis=False,
            customdata=[
                [p.round, round(p.bytes_total / MIB, 1), "" if s is None else f" ± {s:.1f}"]
                for p, s in zip(points, std, strict=True)
            ],
            hovertemplate=f"<b>{plain(method)}</b>: %{{y:.1f}}%{{customdata[2]}} %<br>"
            "after %{customdata[0]} rounds, %{customdata[1]:,.4~r} MiB<extra></extra>",
            name=plain(method),
            legendgroup=method,
            showlegend=False,
        )
    )
    return traces


def _size(symbol: str) -> int:
    # Triangles, crosses and stars fill less of their square than the others do.
    return 8 if symbol in ("circle", "square") else 10


def _level(method: str, accuracy: float, most_bytes: float, style: Style) -> go.Scatter:
    # Many points, so that a pointer finds the line anywhere.
    return go.Scatter(
        x=[round(most_bytes / MIB * i / 40, 4) for i in range(41)],
        y=[round(100 * accuracy, 3)] * 41,
        mode="lines",
        line={"color": style.color, "width": 2, "dash": "dash"},
        hovertemplate=f"<b>{plain(method)}</b>: %{{y:.1f}} % at the end<br>"
        "trains with next to no traffic<extra></extra>",
        name=plain(method),
        legendgroup=method,
        showlegend=False,
    )


def _range(curves: Iterable[Sequence[Point]]) -> list[float] | None:
    means = [100 * p.mean for points in curves for p in points]
    if not means:
        return None
    room = max(2.0, 0.06 * (max(means) - min(means)))
    return [max(-1.0, min(means) - room), min(101.0, max(means) + room)]


def base_figure(height: int, may_shrink: bool = False) -> go.Figure:
    """An empty figure in the report's style, `height` CSS pixels high.

    One that may shrink has no rows that need their height, so a small screen may flatten it.
    """
    axis = {
        "gridcolor": GRID,
        "linecolor": MUTED,
        "zeroline": False,
        "ticks": "",
        "fixedrange": True,
        "automargin": True,
        "title_font": {"size": 13, "color": MUTED},
        "title_standoff": 10,
        "ticklabelstandoff": 5,
        "tickfont": {"color": MUTED},
    }
    return go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": height,
            "meta": {"may_shrink": may_shrink},
            "margin": {"l": 8, "r": 12, "t": 10, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": FONT, "size": 13, "color": INK},
            "hoverlabel": {
                "bgcolor": PAPER,
                "bordercolor": MUTED,
                "font": {"family": FONT, "size": 13, "color": INK},
                "align": "left",
            },
            "hovermode": "closest",
            "dragmode": False,
            "showlegend": False,
            "xaxis": {**axis, "showgrid": False, "showline": True},
            "yaxis": {**axis, "showline": False},
        }
    )


def plain(text: str) -> str:
    """Text for a figure, whose labels would otherwise read tags in it."""
    return escape(text, quote=False)
