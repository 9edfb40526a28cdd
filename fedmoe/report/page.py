"""One HTML page about a set of runs: self-contained, so it opens anywhere and for years."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from fedmoe.report import palette
from fedmoe.report.atomic import write_atomically
from fedmoe.report.fairness import refused
from fedmoe.report.log import Run
from fedmoe.report.measures import result_row
from fedmoe.report.paired import PairedDifference, paired_over_seeds
from fedmoe.report.palette import Style, method_styles
from fedmoe.report.panels import Panel, panels
from fedmoe.report.plots import by_method, group_names
from fedmoe.report.tables import Grid, Unit, format_value, grid


@dataclass(frozen=True)
class Trouble:
    """Failures or refusals of one run that share their reason."""

    method: str
    seed: int
    kind: str  # "failed" or "refused"
    reason: str
    clients: str
    rounds: str
    times: int


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write the page for these runs, whole or not at all.

    Raises:
        ValueError: there are no runs, or one method has the same seed twice.
    """
    path = Path(path)
    text = render_report(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def render_report(runs: Sequence[Run]) -> str:
    """The page as text; the same runs give the same text."""
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    methods = by_method(runs)
    ordered = [run for own in methods.values() for run in own]
    styles = method_styles(list(methods))
    table = grid([result_row(run, "report") for run in ordered])
    found = panels(ordered, styles)
    return render(
        "page.html",
        found,
        styles,
        title=" and ".join(sorted({run.info.experiment for run in ordered})),
        facts=_facts(ordered),
        partitions=_partitions(ordered),
        versions=sorted({f"{n} {v}" for run in ordered for n, v in run.info.versions.items()}),
        table=table,
        differences=_differences(ordered, table),
        reference=next(iter(methods)),
        troubles=_troubles(ordered),
        log_notes=[note for run in ordered for note in run.notes],
        runs=[(run, result_row(run, "report")) for run in ordered],
    )


def render(
    template: str, found: Sequence[Panel], styles: Mapping[str, Style], **more: object
) -> str:
    """One of the templates, with its figures and all that draws them inside."""
    environment = Environment(
        loader=PackageLoader("fedmoe.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        panels=found,
        styles=styles,
        palette=palette,
        mib=lambda n: format_value(n, Unit.BYTES),
        plotly_js=Markup(get_plotlyjs()),
        data=_embedded(found),
        **more,
    )


def _embedded(found: Sequence[Panel]) -> Markup:
    """The figures as JSON that may stand inside a script element."""
    data = {
        "dark": palette.DARK,
        "panels": {
            panel.id: {
                "selectors": [list(s.options) for s in panel.selectors],
                "views": [
                    {
                        "choice": list(view.choice),
                        "says": view.says,
                        "figure": json.loads(view.figure.to_json()),
                    }
                    for view in panel.views
                ],
            }
            for panel in found
        },
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _facts(runs: Sequence[Run]) -> list[str]:
    """What was run, in a few words each."""
    info = runs[0].info
    num_layers = len(info.num_experts_L)
    experts = sorted(set(info.num_experts_L))
    groups = group_names(runs)
    seeds = {run.info.seed for run in runs}
    facts = [
        _plural(len({run.info.method for run in runs}), "method"),
        _plural(info.num_clients, "client")
        + (f" in {_plural(len(groups), 'group')}" if groups else ""),
    ]
    if experts:
        amount = f"{experts[0]}" if len(experts) == 1 else f"{experts[0]} to {experts[-1]}"
        noun = "expert" if experts == [1] else "experts"
        facts.append(
            f"{amount} {noun} in {'each of ' if num_layers > 1 else ''}"
            f"{_plural(num_layers, 'layer')}"
        )
    facts.append(_plural(max(run.info.rounds for run in runs), "round"))
    facts.append(_plural(len(seeds), "seed"))
    return facts


def _partitions(runs: Sequence[Run]) -> list[tuple[str, list[int]]]:
    """Each partition's hash with the seeds that used it."""
    seeds: dict[str, list[int]] = {}
    for run in sorted(runs, key=lambda r: r.info.seed):
        own = seeds.setdefault(run.info.partition_hash, [])
        if run.info.seed not in own:
            own.append(run.info.seed)
    return list(seeds.items())


def _differences(runs: Sequence[Run], table: Grid) -> list[tuple[str, PairedDifference]]:
    """How far the first method is ahead of each other one; empty where that must not be said."""
    methods = by_method(runs)
    first, *others = methods
    measured = all(result_row(run, "")["personal_mean"] is not None for run in runs)
    if refused(table.notes) or not measured:
        return []
    found = []
    for other in others:
        common = {r.info.seed for r in methods[first]} & {r.info.seed for r in methods[other]}
        if len(common) > 1:
            found.append((other, paired_over_seeds(methods[first], methods[other])))
    return found


def _troubles(runs: Sequence[Run]) -> list[Trouble]:
    found = []
    for run in runs:
        every = [
            (kind, failure.reason, record.round, failure.client)
            for record in run.rounds
            for kind, failures in (("failed", record.failed), ("refused", record.refused))
            for failure in failures
        ]
        for (kind, reason), group in groupby(sorted(every), key=lambda t: t[:2]):
            same = list(group)
            clients = sorted({client for *_, client in same})
            rounds = sorted({round for _, _, round, _ in same})
            found.append(
                Trouble(
                    run.info.method,
                    run.info.seed,
                    kind,
                    reason,
                    _listed(clients),
                    _listed(rounds),
                    len(same),
                )
            )
    return found


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return shown if len(numbers) <= 12 else f"{shown} and {len(numbers) - 12} more"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
