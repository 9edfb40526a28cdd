"""What the tables of this folder have in common: their command line, and the files they write.

Every table keeps its rows in results/NAME.json, and all that it shows is made from that file. All
share one folder of runs, and a row of one table counts for the others: nothing is run twice.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmoe.experiments.study import usable_cores
from fedmoe.experiments.sweep import Setting, open_root, plan_sweep, run_sweep
from fedmoe.federated.cohort import TRAINERS
from fedmoe.report.atomic import write_atomically
from fedmoe.report.comparison import comparison_markdown
from fedmoe.report.comparison_page import write_comparison
from fedmoe.report.measures import Row
from fedmoe.report.rows import read_rows, received_and_tuned

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/table")
SEEDS = (0, 1, 2)
TABLES = ("fashion", "personal", "conditions")  # each has its NAME.json

HOW_TO_READ = """\
Accuracies are means over clients on their own test parts; personal is that of the model as
received or after local training, whichever is better on the client's validation part. ± is the
standard deviation over seeds. Bytes are those of the whole run over all clients, both ways, with
exploration and the closing evaluation. Of the differences, those in bold have an interval over
seeds without 0; intervals are at 95 %, one by one, not corrected for how many there are. The
interval over clients says how clients differ, not what another seed would give.

FedMoE and all that choose sub-MoEs (random, frequency-pruning, chosen-by-group) add up the outputs
of as many experts as the smallest device holds. Others that train the model of experts average the
outputs of two: the same parameters and start."""


@dataclass(frozen=True)
class Table:
    """What is run and shown together."""

    name: str
    title: str
    settings: tuple[Setting, ...]
    methods: tuple[str, ...] = ()  # that belong in it; empty: all that a protocol has
    reference: str = "fedmoe"  # the others' distance from it is shown
    split: tuple[str, ...] = ()  # methods shown as received and after fine-tuning, apart
    page: bool = False  # also write NAME.html
    published: tuple[Row, ...] = ()  # figures from elsewhere that stand beside the runs
    script: str = ""  # the module that makes it; empty: table_NAME
    how_to_read: str = HOW_TO_READ
    sections: Callable[[Sequence[Row], str], str] = comparison_markdown  # of rows and reference


def options_of(table: Table, description: str | None) -> argparse.ArgumentParser:
    """The command line of a table."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--protocols", nargs="+", default=[s.protocol for s in table.settings])
    parser.add_argument("--methods", nargs="+", default=[], help="these alone; all if left out")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--runs", type=Path, default=RUNS, help="where runs live")
    parser.add_argument("--workers", type=int, default=min(2, usable_cores()))
    parser.add_argument(
        "--trainer",
        choices=TRAINERS,
        default="compiled",
        help="of runs that begin, where it can train their model (default: compiled)",
    )
    parser.add_argument("--again", action="store_true", help="run even what is done")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="take what was made under other settings as today's, because you know that the "
        "change changes no result",
    )
    return parser


def settings_of(table: Table, protocols: Sequence[str]) -> list[Setting]:
    """The table's settings of these protocols; of any other experiment, its own."""
    known = {s.protocol: s for s in table.settings}
    return [known.get(name, Setting(name)) for name in protocols]


def carry_out(
    table: Table,
    settings: Sequence[Setting],
    options: argparse.Namespace,
    place: Path = RESULTS,
) -> int:
    """Run what the table lacks of these settings, and write it.

    Returns:
        The exit code: 0 if all of it is done, 1 if not, 2 if nothing could be begun.
    """
    try:
        open_root(options.runs)
        plan = plan_sweep(settings, options.seeds, options.runs, options.trainer)
        plan = plan.only(table.methods) if table.methods else plan
        plan.of_methods(options.methods)
    except ValueError as why:
        print(why, file=sys.stderr)
        return 2
    for protocol, reason in plan.missing.items():
        print(f"cannot run {protocol}: {reason}", flush=True)
    undone = run_sweep(
        plan,
        options.runs,
        place / f"{table.name}.json",
        methods=options.methods,
        others=[place / f"{name}.json" for name in TABLES if name != table.name],
        again=options.again,
        trust=options.trust,
        workers=options.workers,
        say=lambda line: print(line, flush=True),
        after=lambda rows: write_table(table, rows, plan.missing, place),
        published=table.published,
    )
    if table.page:
        write_page(table, read_rows(place / f"{table.name}.json"), place)
    for folder, reason in undone.items():
        print(f"not done {folder}: {reason}", flush=True)
    return 1 if undone or plan.missing else 0


def write_table(
    table: Table, rows: Sequence[Row], missing: Mapping[str, str], place: Path = RESULTS
) -> None:
    """NAME.md, from the rows alone; `missing` says why protocols without a row have none."""
    there = {row["protocol"] for row in rows}
    lacking = [
        f"{s.protocol} ({missing.get(s.protocol, 'not run yet')})"
        for s in table.settings
        if s.protocol not in there
    ]
    parts = [
        f"# {table.title}",
        f"Made by `python -m simulations.{table.script or f'table_{table.name}'}` from "
        f"{table.name}.json. "
        f"{table.how_to_read}",
    ]
    if lacking:
        parts.append(f"Not in this table: {'; '.join(lacking)}.")
    if rows:
        parts.append(table.sections(_shown(table, rows), table.reference).rstrip())
    write_atomically(place / f"{table.name}.md", "\n\n".join(parts) + "\n")


def write_page(table: Table, rows: Sequence[Row], place: Path = RESULTS) -> None:
    """NAME.html, from the rows alone; nothing where there are none of runs."""
    if any(not row.get("published") for row in rows):
        write_comparison(_shown(table, rows), table.title, place / f"{table.name}.html")


def _shown(table: Table, rows: Sequence[Row]) -> list[Row]:
    """The rows by the table's own order of protocols, some as two."""
    order = {s.protocol: i for i, s in enumerate(table.settings)}
    ordered = sorted(rows, key=lambda row: order.get(row["protocol"], len(order)))
    return received_and_tuned(ordered, table.split)
