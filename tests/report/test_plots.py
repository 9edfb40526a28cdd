"""Figures: one look for a method in all of them, and colours that can be told apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest

from fedmoe.report import palette
from fedmoe.report.expert_plots import (
    GroupRow,
    client_history,
    client_rows,
    expert_load,
    held_timeline,
    use_heat_map,
)
from fedmoe.report.log import ClientAccuracy, ClientEntry, RoundRecord, Run, RunInfo
from fedmoe.report.palette import DARK, PAPER, method_styles
from fedmoe.report.panels import panels
from fedmoe.report.plots import (
    MEASURES,
    accuracy_against_bytes,
    accuracy_over_rounds,
    by_method,
    curve,
    spread_by_group,
    spread_over_clients,
)
from fedmoe.types import Change, ExpertId


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast of two colours: 1 for equal ones, 21 for black on white."""

    def luminance(color: str) -> float:
        channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return float(linear @ np.array([0.2126, 0.7152, 0.0722]))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def own_traces(figure: go.Figure, method: str) -> list[go.Scatter]:
    return [t for t in figure.data if t.legendgroup == method and t.type == "scatter"]


def test_a_method_has_the_same_colour_and_symbol_in_every_figure(few_runs: list[Run]) -> None:
    styles = method_styles(list(by_method(few_runs)))
    for make in (accuracy_over_rounds, spread_over_clients, spread_by_group):
        figure = make(few_runs, styles=styles)
        for method, style in styles.items():
            looks = {
                (t.marker.color, t.marker.symbol)
                for t in own_traces(figure, method)
                if "markers" in (t.mode or "")
            }
            assert looks == {(style.color, style.symbol)}


def test_methods_that_adjust_experts_come_first(few_runs: list[Run]) -> None:
    assert list(by_method(few_runs)) == ["fedmoe", "fedavg", "local"]


def test_sixteen_methods_have_sixteen_looks() -> None:
    assert len(set(method_styles([f"m{i}" for i in range(16)]).values())) == 16


@pytest.mark.parametrize("color", [s.color for s in method_styles([*"abcdefgh"]).values()])
def test_method_colours_stand_out_on_light_and_dark_paper(color: str) -> None:
    assert contrast(color, PAPER) >= 3
    assert contrast(DARK[color], DARK[PAPER]) >= 3


@pytest.mark.parametrize("color", [palette.INK, palette.MUTED, palette.WARN])
def test_text_can_be_read_on_light_and_dark_paper(color: str) -> None:
    assert contrast(color, PAPER) >= 4.5
    assert contrast(DARK[color], DARK[PAPER]) >= 4.5


def test_every_colour_of_every_figure_has_a_dark_partner(few_runs: list[Run]) -> None:
    styles = method_styles(list(by_method(few_runs)))
    text = json.dumps(
        [json.loads(v.figure.to_json()) for p in panels(few_runs, styles) for v in p.views]
    )
    used = set(re.findall(r"#[0-9a-fA-F]{6}\b", text))
    assert used and used <= set(DARK)


def test_every_choice_on_the_page_has_its_figure(few_runs: list[Run]) -> None:
    for panel in panels(few_runs, method_styles(list(by_method(few_runs)))):
        expected: list[tuple[str, ...]] = [()]
        for selector in panel.selectors:
            expected = [(*e, option) for e in expected for option in selector.options]
        assert sorted(tuple(v.choice) for v in panel.views) == sorted(expected)
        assert all(v.says for v in panel.views)


def test_a_curve_is_the_mean_over_seeds(
    info: Callable[..., RunInfo], record: Callable[..., RoundRecord]
) -> None:
    runs = [
        Run(
            info(seed=seed),
            [
                replace(
                    record(0),
                    bytes_down=100 * (seed + 1),
                    accuracy={0: ClientAccuracy(None, accuracy)},
                )
            ],
        )
        for seed, accuracy in enumerate([0.25, 0.75])
    ]
    (point,) = curve(runs, MEASURES["chosen"])
    assert (point.round, point.mean, point.bytes_total) == (0, 0.5, 150)
    assert point.std == pytest.approx(0.353553, abs=1e-6)  # 0.5 / sqrt(2)


def test_a_round_that_not_every_seed_evaluated_is_not_in_the_curve(few_runs: list[Run]) -> None:
    own = by_method(few_runs)["fedmoe"]
    short = replace(own[0], rounds=own[0].rounds[:-1])
    assert [p.round for p in curve(own, MEASURES["chosen"])] == [0, 4, 8]
    assert [p.round for p in curve([short, *own[1:]], MEASURES["chosen"])] == [0, 4]


def test_a_method_without_traffic_is_a_level_line(few_runs: list[Run]) -> None:
    figure = accuracy_against_bytes(few_runs)
    (line,) = own_traces(figure, "local")
    assert len(set(line.y)) == 1 and line.x[0] == 0 and line.x[-1] > 0


@pytest.fixture
def story(info: Callable[..., RunInfo], record: Callable[..., RoundRecord]) -> Run:
    """One client: explores two experts, keeps the first, sits out, gains the second."""
    rounds = [
        replace(record(0, "explore"), held={0: [[0, 1]]}, count={0: [[30, 10]]}),
        replace(record(1), held={0: [[0]]}, count={0: [[8, 0]]}),
        record(2),
        replace(
            record(3),
            held={0: [[0, 1]]},
            count={0: [[5, 0]]},
            changes=[Change(0, "add", (ExpertId(0, 1),)), Change(0, "freeze", ())],
        ),
    ]
    return Run(info(rounds=4, num_experts_L=(2,), num_clients=1), rounds)


def blank_to_none(z: object) -> list[list[float | None]]:
    values = np.array(z, dtype=np.float64)
    return [[None if np.isnan(v) else float(v) for v in row] for row in values]


def test_a_clients_history_shows_held_used_and_sat_out(story: Run) -> None:
    figure = client_history(story, client=0, layer=0, most_percent=100)
    idle, used, added = figure.data[:3]
    assert blank_to_none(used.z) == [[75, 100, None, 100], [25, None, None, 0]]
    assert blank_to_none(idle.z) == [[None, None, 1, None], [None, None, None, None]]
    assert (list(added.x), list(added.y)) == ([3], [1])
    assert [line.x0 for line in figure.layout.shapes] == [3.5]  # frozen from here on


def test_rounds_that_share_a_column_are_added_up(story: Run) -> None:
    _, used = client_history(story, client=0, layer=0, most_percent=100, step=2).data[:2]
    # 30 + 8 of 48; then one round out, one with 5 of 5
    assert blank_to_none(used.z) == [[79.2, 100], [20.8, 0]]
    assert list(used.x) == [0.5, 2.5]


def test_the_timeline_counts_experts_and_marks_changes(story: Run) -> None:
    figure = held_timeline(story)
    assert blank_to_none(figure.data[0].z) == [[2, 1, 1, 2]]
    marks = {t.name: list(t.x) for t in figure.data[1:]}
    assert marks == {"add": [3], "drop": [], "revert": [], "freeze": [3.5]}


def test_an_expert_that_is_not_held_is_blank_and_an_unused_one_is_not(story: Run) -> None:
    short = replace(story, rounds=story.rounds[:2])
    assert blank_to_none(use_heat_map(short, 0, 100).data[0].z) == [[100, None]]
    assert blank_to_none(use_heat_map(story, 0, 100).data[0].z) == [[100, 0]]


def test_dead_experts_are_marked_in_the_load(story: Run) -> None:
    style = method_styles(["fedmoe"])["fedmoe"]
    share, holders, dead = expert_load(story, 0, style).data
    assert (list(share.y), list(holders.y), list(dead.x)) == ([100, 0], [1, 1], [1])


def test_clients_stand_under_the_name_of_their_group() -> None:
    clients = [ClientEntry(i, g, None, 1, 1, 1) for i, g in enumerate(["b", "a", "b"])]
    rows = [r.name if isinstance(r, GroupRow) else r.id for r in client_rows(clients)]
    assert rows == ["a", 1, "b", 0, 2]
    alone = [replace(c, group=None) for c in clients]
    assert client_rows(alone) == alone
