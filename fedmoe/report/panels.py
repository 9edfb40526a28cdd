"""What the page shows and says: each panel is one question, its figures, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import plotly.graph_objects as go

from fedmoe.report.expert_plots import (
    client_history,
    client_rows,
    expert_load,
    held_timeline,
    use_heat_map,
)
from fedmoe.report.log import ClientEntry, Run
from fedmoe.report.measures import final_evaluation, over_clients
from fedmoe.report.palette import Style
from fedmoe.report.plots import (
    MEASURES,
    MERGED,
    accuracy_against_bytes,
    accuracy_over_rounds,
    base_figure,
    by_method,
    curve,
    curve_of,
    group_names,
    spread_by_group,
    spread_over_clients,
)
from fedmoe.report.tables import Unit, format_value
from fedmoe.report.usage import LAST_ROUNDS, dead_experts, load_cv_by_layer, use_by_client

# What the histories of all clients together may draw: a page is to open at once.
MOST_CELLS = 400_000
MOST_HISTORIES = 600


@dataclass(frozen=True)
class Selector:
    """A choice the reader has; one with a single option is not shown."""

    name: str
    options: Sequence[str]


@dataclass(frozen=True)
class View:
    """The figure for one option of each selector."""

    choice: Sequence[str]
    figure: go.Figure
    says: str  # what it shows in a sentence, also for those who cannot see it


@dataclass(frozen=True)
class Panel:
    """One section of the page. `views` has every combination of the selectors' options."""

    id: str
    title: str
    subtitle: str  # what is drawn
    how_to_read: str
    key: str  # which legend: "methods", "use", "held", "history" or "load"
    selectors: Sequence[Selector]
    views: Sequence[View]
    scale_end: str = ""  # what the last colour of the legend stands for


def panels(runs: Sequence[Run], styles: Mapping[str, Style]) -> list[Panel]:
    """Every panel that these runs have something to show for, in reading order."""
    methods = by_method(runs)
    found: list[Panel] = []
    if any(final_evaluation(run) for run in runs):
        found += [_bytes(runs, styles), _rounds(runs, styles), _spread(runs, styles)]
    # One run speaks for its method: experts of different seeds have nothing in common.
    with_experts = {
        method: own[0] for method, own in methods.items() if any(r.held for r in own[0].rounds)
    }
    if with_experts:
        most = _most_percent(list(with_experts.values()))
        found += [
            _use(with_experts, most),
            _timeline(with_experts),
            _history(with_experts, most),
            _load(with_experts, styles),
        ]
    return found


def _bytes(runs: Sequence[Run], styles: Mapping[str, Style]) -> Panel:
    ends = []
    for method, own in by_method(runs).items():
        points = curve(own, MEASURES["chosen"])
        if points:
            mib = format_value(points[-1].bytes_total, Unit.BYTES)
            ends.append(f"{method} ends at {100 * points[-1].mean:.1f} % after {mib} MiB")
    full = format_value(runs[0].info.full_bytes, Unit.BYTES)
    return Panel(
        id="bytes",
        title="What accuracy costs in traffic",
        subtitle="Mean personal accuracy against everything sent so far",
        how_to_read="Up and to the left is better: more accuracy for less traffic. Traffic is what "
        "went over the wire, serialised, up and down, for all clients together, and includes "
        f"one-off costs such as sending the full model ({full} MiB) to be explored. A method that "
        "trains with next to no traffic is a level dashed line at the accuracy it ends with."
        + _band(runs),
        key="methods",
        selectors=(),
        views=[View((), accuracy_against_bytes(runs, styles), _sentence(ends))],
    )


def _rounds(runs: Sequence[Run], styles: Mapping[str, Style]) -> Panel:
    options = [m for m in MEASURES if any(curve(own, MEASURES[m]) for own in _groups(runs))]
    if any(r.global_accuracy is not None for run in runs for r in run.rounds):
        options.append(MERGED)
    views = [
        View((option,), accuracy_over_rounds(runs, option, styles), _speeds(runs, option))
        for option in options
    ]
    return Panel(
        id="rounds",
        title="How fast the methods learn",
        subtitle="Accuracy after so many rounds, mean over clients",
        how_to_read="A steeper line learns in fewer rounds. “As received” is the model as it "
        "reaches a client, “after local training” the same once the client has trained on it, and "
        "“chosen” whichever of the two the client’s own validation data prefers; the “merged "
        "model” is tested on all clients’ data together." + _band(runs),
        key="methods",
        selectors=(Selector("Accuracy", options),),
        views=views,
    )


def _speeds(runs: Sequence[Run], measure: str) -> str:
    """Where each method ends, and when it was nearly there."""
    parts = []
    for method, own in by_method(runs).items():
        points = curve_of(own, measure)
        if points:
            end = points[-1].mean
            near = next(p.round for p in points if p.mean >= 0.9 * end)
            parts.append(f"{method} {100 * end:.1f} % (after {near})")
    return f"At the end, and after how many rounds within a tenth of it: {_sentence(parts)}"


def _spread(runs: Sequence[Run], styles: Mapping[str, Style]) -> Panel:
    parts = []
    for method, own in by_method(runs).items():
        finals = [e for e in map(final_evaluation, own) if e]
        if finals:
            values = [over_clients(e.chosen) for e in finals]
            mean, worst = (
                100 * float(np.mean([getattr(v, name) for v in values]))
                for name in ("mean", "worst_tenth")
            )
            parts.append(f"{method}: mean {mean:.1f} %, worst tenth {worst:.1f} %")
    says = _sentence(parts)
    views = [View(("all clients",), spread_over_clients(runs, styles), says)]
    groups = group_names(runs)
    if len(groups) > 1:
        says = f"The group that is worst off: {_sentence(_worst_groups(runs))}"
        views.append(View(("by group",), spread_by_group(runs, styles), says))
    return Panel(
        id="spread",
        title="Who is well served, and who is not",
        subtitle="Personal accuracy of every client at the end",
        how_to_read="Each dot is one client" + (" in one seed" if _many_seeds(runs) else "") + ", "
        "the thick line the mean. A box holds the middle half of the clients. Dots far to the "
        "left are clients that a good mean hides.",
        key="methods",
        selectors=(Selector("Show", [v.choice[0] for v in views]),),
        views=views,
    )


def _worst_groups(runs: Sequence[Run]) -> list[str]:
    parts = []
    for method, own in by_method(runs).items():
        groups: dict[str, list[float]] = {}
        for run in own:
            final = final_evaluation(run)
            for client in run.info.clients:
                if final and client.group is not None and client.id in final.chosen:
                    groups.setdefault(client.group, []).append(final.chosen[client.id])
        means = {group: sum(values) / len(values) for group, values in groups.items()}
        if means:
            worst = min(means, key=lambda group: means[group])
            parts.append(f"{method}: {worst}, mean {100 * means[worst]:.1f} %")
    return parts


def _use(runs: Mapping[str, Run], most: float) -> Panel:
    def view(method: str, layer: int) -> View:
        run = runs[method]
        use = use_by_client(run)
        held = [int((~np.isnan(rows[layer])).sum()) for rows in use.values()]
        says = (
            f"{method}, seed {run.info.seed}: of {run.info.num_experts_L[layer]} experts a client "
            f"holds {_from_to(held)}."
        )
        return View((method, _layer(layer)), use_heat_map(run, layer, most), says)

    selectors, views = _method_and_layer(runs, view)
    return Panel(
        id="use",
        title="Which client uses which expert",
        subtitle=f"Share of each client’s activations over its last {LAST_ROUNDS} rounds",
        how_to_read="A row is a client, a column an expert; the stronger the colour, the more of "
        "the client’s data runs through that expert. Blank means that the client does not hold it. "
        "Where rows of a group look alike and unlike other groups, the experts have specialised.",
        key="use",
        scale_end=f"{most:.0f} %",
        selectors=selectors,
        views=views,
    )


def _timeline(runs: Mapping[str, Run]) -> Panel:
    views = []
    for method, run in runs.items():
        steps = [c.action for r in run.rounds for c in r.changes]
        past = {"add": "added", "drop": "dropped", "revert": "reverted", "freeze": "frozen"}
        counted = [f"{word} {steps.count(a)} times" for a, word in past.items() if a in steps]
        says = f"{method}, seed {run.info.seed}: " + (
            ", ".join(counted) + "." if counted else "no client’s experts were adjusted."
        )
        views.append(View((method,), held_timeline(run), says))
    return Panel(
        id="timeline",
        title="How the choice of experts changed",
        subtitle="Number of experts that each client holds, round by round",
        how_to_read="A row is a client, read from left to right. The shade says how many experts "
        "it holds; a mark says that this round added or dropped some, took the last change back "
        "(reverted), or froze the choice for good. A client that explores holds every "
        "expert, or none while it only scouts.",
        key="held",
        scale_end=str(max(sum(run.info.num_experts_L) for run in runs.values())),
        selectors=(Selector("Method", list(runs)),),
        views=views,
    )


def _history(runs: Mapping[str, Run], most: float) -> Panel:
    names = {
        c.id: f"client {c.id}" + (f" ({c.group})" if c.group is not None else "")
        for run in runs.values()
        for c in client_rows(run.info.clients)
        if isinstance(c, ClientEntry)
    }
    num_layers = max(len(run.info.num_experts_L) for run in runs.values())
    fitting = max(1, MOST_HISTORIES // (len(names) * max(1, num_layers)))
    left_out = list(runs)[fitting:]
    runs = {method: run for method, run in runs.items() if method not in left_out}
    cells = sum(
        len(run.info.clients) * sum(run.info.num_experts_L) * len(run.rounds)
        for run in runs.values()
    )
    step = math.ceil(cells / MOST_CELLS)

    def of_client(client: int) -> Callable[[str, int], View]:
        def view(method: str, layer: int) -> View:
            run, choice = runs[method], (method, _layer(layer))
            if client not in {c.id for c in run.info.clients}:
                return View(choice, base_figure(80), f"{method} has no {names[client]}.")
            figure = client_history(run, client, layer, most, step)
            return View(choice, figure, f"{method}, seed {run.info.seed}, {names[client]}.")

        return view

    per_client = {client: _method_and_layer(runs, of_client(client)) for client in names}
    (method, layer), _ = next(iter(per_client.values()))
    return Panel(
        id="history",
        title="One client’s experts, round by round",
        subtitle="Share of the client’s activations in each round"
        + (f", {step} rounds to a column" if step > 1 else ""),
        how_to_read="A row is an expert, time runs to the right. Colour starts where the client "
        "gets the expert and ends where it loses it; the faintest blue is an expert that is held "
        "and was not used, grey a round that the client sat out. A dotted line is where its choice "
        "was frozen."
        + (f" To keep the page small it leaves out {', '.join(left_out)}." if left_out else ""),
        key="history",
        scale_end=f"{most:.0f} %",
        selectors=(method, Selector("Client", list(names.values())), layer),
        views=[
            replace(v, choice=(v.choice[0], names[client], v.choice[1]))
            for client, (_, views) in per_client.items()
            for v in views
        ],
    )


def _load(runs: Mapping[str, Run], styles: Mapping[str, Style]) -> Panel:
    def view(method: str, layer: int) -> View:
        run = runs[method]
        cv = load_cv_by_layer(run)[layer]
        dead = [str(e.expert) for e in dead_experts(run) if e.layer == layer]
        says = f"{method}, seed {run.info.seed}: " + (
            "no activations were counted."
            if cv is None
            else f"load CV {cv:.2f} (standard deviation / mean over experts); "
            + (f"dead: {', '.join(dead)}." if dead else "no dead experts.")
        )
        return View((method, _layer(layer)), expert_load(run, layer, styles[method]), says)

    selectors, views = _method_and_layer(runs, view)
    return Panel(
        id="load",
        title="How the load is spread over experts",
        subtitle=f"All clients together, over the last {LAST_ROUNDS} rounds",
        how_to_read="Above, bars at the dotted line would share the work evenly; a cross marks a "
        "dead expert, which no token ran at all. Below, how many clients hold each expert at the "
        "end: one that few hold is trained on little data.",
        key="load",
        selectors=selectors,
        views=views,
    )


def _method_and_layer(
    runs: Mapping[str, Run], view: Callable[[str, int], View]
) -> tuple[list[Selector], list[View]]:
    """Selectors for both, and a view for each pair; an empty one where a method lacks the layer."""
    num_layers = max(len(run.info.num_experts_L) for run in runs.values())
    views = [
        view(method, layer)
        if layer < len(run.info.num_experts_L)
        else View((method, _layer(layer)), base_figure(80), f"{method} has no such layer.")
        for method, run in runs.items()
        for layer in range(num_layers)
    ]
    layers = [_layer(i) for i in range(num_layers)]
    return [Selector("Method", list(runs)), Selector("Layer", layers)], views


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    return list(by_method(runs).values())


def _layer(layer: int) -> str:
    return f"layer {layer}"


def _most_percent(runs: Sequence[Run]) -> float:
    shares = [row for run in runs for rows in use_by_client(run).values() for row in rows]
    used = np.concatenate(shares) if shares else np.zeros(1)
    used = used[~np.isnan(used)]
    # The odd client that uses one expert for everything must not make all others pale.
    top = float(np.quantile(used[used > 0], 0.98)) if (used > 0).any() else 1.0
    return min(100.0, max(10.0, 10.0 * math.ceil(10 * top)))


def _many_seeds(runs: Sequence[Run]) -> bool:
    return any(len(own) > 1 for own in _groups(runs))


def _band(runs: Sequence[Run]) -> str:
    if not _many_seeds(runs):
        return " One seed: another one may look different."
    return " Lines are means over seeds; the band is one standard deviation to either side."


def _from_to(counts: Sequence[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _sentence(parts: Sequence[str]) -> str:
    return "; ".join(parts) + "." if parts else ""
