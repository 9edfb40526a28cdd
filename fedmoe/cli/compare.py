"""Runs side by side: the table, paired differences, the page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fedmoe.cli.trouble import CommandError
from fedmoe.cli.words import console, listed, plain_table, plural, write_json
from fedmoe.report.fairness import comparison_notes
from fedmoe.report.log import Run, read_run
from fedmoe.report.measures import Row, result_row, table_rows
from fedmoe.report.paired import PairedDifference, paired_over_seeds
from fedmoe.report.tables import TerminalTable


@dataclass(frozen=True)
class Difference:
    """How far a method is ahead of the reference in mean personal accuracy, share 0 to 1."""

    method: str
    against: str
    found: PairedDifference | None
    why_not: str | None = None


def compare_command(folders: Sequence[Path], against: str | None, json: bool) -> None:
    """Raises CommandError: a folder holds no run, or nobody is called `against`."""
    found = _told_apart(find_runs(folders))
    by_experiment: dict[str, dict[Path, Run]] = {}
    for folder, run in found.items():
        by_experiment.setdefault(run.info.experiment, {})[folder] = run
    names = {run.info.method for run in found.values()}
    if against is not None and against not in names:
        raise CommandError(
            f"--against must be one of the methods {listed(sorted(names))}, got {against!r}"
        )
    parts = [_as_json(name, own, against) for name, own in by_experiment.items()]
    if json:
        write_json({"experiments": parts})
        return
    for i, own in enumerate(by_experiment.values()):
        if i:
            console().print()
        show(list(own.values()), against)


def report_command(folder: Path, out: Path | None) -> None:
    """Raises CommandError: the folder holds no run with a round."""
    runs = [run for run in find_runs([folder]).values() if run.rounds]
    if not runs:
        raise CommandError(
            f"{folder} holds no run with a finished round yet: there is nothing to show"
        )
    path = out or folder / "report.html"
    if path.is_dir():
        raise CommandError(f"--out must be a file, got the folder {path}")
    write_page(runs, path)
    console().print(f"{path}  ({plural(len(runs), 'run')})", soft_wrap=True, markup=False)
    err = console(stderr=True)
    for run in runs:
        for note in run.notes:
            err.print(Text(f"! {note}", "yellow"), soft_wrap=True)


def find_runs(folders: Sequence[Path]) -> dict[Path, Run]:
    """The runs that these folders are or hold, by their own folder; by method, then seed.

    Raises:
        CommandError: a folder is not there or holds no run.
        LogError: a run's files are damaged.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise CommandError(
                f"{folder} is no folder: name a run's folder, or one that holds runs"
            )
        places = [folder] if (folder / "run.json").exists() else None
        places = places or [path.parent for path in folder.glob("*/run.json")]
        if not places:
            raise CommandError(
                f"{folder} holds no run: neither run.json nor */run.json is there; "
                f"`fedmoe run NAME --out {folder}` begins one"
            )
        found |= {place: read_run(place) for place in places}
    order = sorted(found, key=lambda f: (found[f].info.method, found[f].info.seed, f))
    return {folder: found[folder] for folder in order}


def write_page(runs: Sequence[Run], path: Path) -> None:
    """The report as one HTML page."""
    from fedmoe.report.page import write_report  # plotly takes a while to load

    write_report(runs, path)


def show(runs: Sequence[Run], against: str | None = None) -> None:
    """The table of these runs of one experiment, and how far methods differ, on stdout."""
    runs = [run for run in runs if run.rounds]
    out = console()
    if not runs:
        out.print("no run has finished a round yet")
        return
    ordered = _in_order(runs)
    info = runs[0].info
    title = (
        f"{info.experiment}: {plural(info.num_clients, 'client')}, "
        f"{plural(max(r.info.rounds for r in runs), 'round')}"
    )
    out.print()
    out.print(TerminalTable([result_row(run, info.experiment) for run in ordered], title))
    found = [d for d in differences(runs, against) if d.found is not None]
    if found:
        title = f"Personal accuracy against {found[0].against}, in points, paired by seed"
        out.print()
        out.print(Text(title, "bold"))
        out.print(_difference_table(found))
    for run in runs:
        for note in run.notes:
            out.print(Text(f"! {note}", "yellow"), soft_wrap=True)


def differences(runs: Sequence[Run], against: str | None = None) -> list[Difference]:
    """Every other method's lead over `against`, or over the first, over their common seeds."""
    methods = _by_method(runs)
    reference = against if against in methods else next(iter(methods))
    found = []
    for method, own in methods.items():
        if method == reference:
            continue
        why_not = _why_not(methods[reference], own)
        try:
            paired = None if why_not else paired_over_seeds(own, methods[reference])
        except ValueError as why:
            paired, why_not = None, str(why)
        found.append(Difference(method, reference, paired, why_not))
    return found


def _why_not(reference: Sequence[Run], own: Sequence[Run]) -> str | None:
    common = {r.info.seed for r in reference} & {r.info.seed for r in own}
    if len(common) < 2:
        return f"a difference needs at least 2 common seeds, got {len(common)}"
    open_runs = [r for r in (*reference, *own) if not r.rounds or r.rounds[-1].phase != "final"]
    if open_runs:
        info = open_runs[0].info
        return f"{info.method} seed {info.seed} is not finished"
    return None


def _difference_table(found: Sequence[Difference]) -> Table:
    table = plain_table()
    table.add_column("method", style="bold", no_wrap=True)
    for head in ("difference", "95 % interval", "seeds"):
        table.add_column(head, justify="right", no_wrap=True)
    for d in found:
        assert d.found is not None
        low, high = d.found.low, d.found.high
        interval = "-" if low is None or high is None else f"{100 * low:+.1f} to {100 * high:+.1f}"
        clear = low is not None and high is not None and (low > 0 or high < 0)
        style = ("green" if d.found.mean > 0 else "red") if clear else ""
        table.add_row(
            d.method, Text(f"{100 * d.found.mean:+.1f}", style), interval, str(d.found.num_pairs)
        )
    return table


def _as_json(experiment: str, found: Mapping[Path, Run], against: str | None) -> Row:
    runs = [run for run in found.values() if run.rounds]
    rows = [result_row(run, experiment) for run in runs]
    return {
        "experiment": experiment,
        "runs": [
            {
                "folder": str(folder),
                "finished": bool(run.rounds) and run.rounds[-1].phase == "final",
                "model_hash": run.rounds[-1].model_hash if run.rounds else None,
                "notes": list(run.notes),
                **result_row(run, experiment),
            }
            for folder, run in found.items()
        ],
        "methods": [
            {"method": m.method, "num_seeds": m.num_seeds, "values": _values(m.values)}
            for m in table_rows(runs, experiment)
        ],
        "differences": [
            {
                "method": d.method,
                "against": d.against,
                "measure": "personal_mean",
                "paired_by": "seed",
                **(asdict(d.found) if d.found else {}),
                "why_not": d.why_not,
            }
            for d in (differences(runs, against) if runs else [])
        ],
        "notes": [{"text": n.text, "refuses": n.refuses} for n in comparison_notes(rows)],
    }


def _values(values: Mapping[str, object]) -> Row:
    return {
        name: {"mean": getattr(v, "mean", None), "std": getattr(v, "std", None)}
        for name, v in values.items()
    }


def _told_apart(found: Mapping[Path, Run]) -> dict[Path, Run]:
    """As found; where a method's seed came from two folders, methods carry their folder's name."""
    seen: dict[tuple[str, str, int], Path] = {}
    twice = False
    for folder, run in found.items():
        key = run.info.experiment, run.info.method, run.info.seed
        twice = twice or key in seen
        seen[key] = folder
    if not twice:
        return dict(found)
    named = {
        folder: replace(
            run, info=replace(run.info, method=f"{folder.absolute().parent.name}/{run.info.method}")
        )
        for folder, run in found.items()
    }
    keys = [(r.info.experiment, r.info.method, r.info.seed) for r in named.values()]
    if len(set(keys)) < len(keys):
        raise CommandError(
            "each run must come once, or its folders must be called differently, got "
            + listed([str(f) for f in found])
        )
    return named


def _by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    methods: dict[str, list[Run]] = {}
    for run in _in_order(runs):
        methods.setdefault(run.info.method, []).append(run)
    return methods


def _in_order(runs: Sequence[Run]) -> list[Run]:
    """By method and seed; methods that change their clients' experts first, as on the page."""

    def steps(method: str) -> int:
        return sum(len(r.changes) for x in runs if x.info.method == method for r in x.rounds)

    return sorted(runs, key=lambda r: (-steps(r.info.method), r.info.method, r.info.seed))
