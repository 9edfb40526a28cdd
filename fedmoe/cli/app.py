"""What can be typed: every command with its options. The work is in the other files, which are
imported when a command runs, because torch alone takes seconds to load."""

import os
import sys
from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperCommand, TyperGroup

from fedmoe import __version__
from fedmoe.cli.trouble import explained

EXAMPLES = """\b
Examples:
  fedmoe run demo                         train, compare, write a report
  fedmoe run domains --method fedmoe --method fedavg --seed 0 --seed 1
  fedmoe run my_module:my_experiment      a function of your own
  fedmoe resume runs/demo                 go on after a kill, same bits
  fedmoe plan domains                     memory, bytes and time, beforehand
  fedmoe inspect runs/demo/fedmoe-seed0   experts, and who holds them

\b
Exit codes: 0 done, 1 something ran and failed, 2 bad usage or input.
FEDMOE_TRACEBACK=1 shows where an error comes from."""

RUN_EXAMPLES = """\b
Examples:
  fedmoe run demo
  fedmoe run domains --method fedmoe --method local --seed 0 --seed 1 --seed 2
  fedmoe run domains --rounds 3 --out runs/short --workers 1
  fedmoe run domains --actors 8 --ray-address ray://10.0.0.1:10001
  fedmoe run my_module:my_experiment --json > result.json"""

PLAN_EXAMPLES = """\b
Examples:
  fedmoe plan domains
  fedmoe plan domains --method fedavg --json"""

INSPECT_EXAMPLES = """\b
Examples:
  fedmoe inspect runs/demo/fedmoe-seed0
  fedmoe inspect runs/demo/fedmoe-seed0/checkpoints/round-000012 --json"""

KEYS_EXAMPLES = """\b
Examples:
  fedmoe keys --host 10.0.0.1 --host moe.example --clients 3
  fedmoe keys --client 7                     on that client's own machine"""


def _plain_help(text: str) -> str:
    # Typer escapes brackets for rich, which is not asked to show them.
    return text.replace(r"\[", "[")


class Command(TyperCommand):
    """A command with plain help, which comes in a quarter of the time that boxes take."""

    def get_help(self, ctx: click.Context) -> str:
        return _plain_help(super().get_help(ctx))


class Group(TyperGroup):
    """The list of commands, each with its whole first line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            rows = [(n, (c.help or "").split("\n")[0]) for n, c in self.commands.items()]
            formatter.write_dl(rows)


app = typer.Typer(
    name="fedmoe",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click does
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


# Arguments are hidden from the list of options: what they are stands in the command's own text.
NAME = typer.Argument(metavar="NAME", hidden=True)
FOLDER = typer.Argument(metavar="FOLDER", hidden=True)
Rounds = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Rounds of training (default: the experiment's own)."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and no more there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Do not write report.html.")]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Runs side by side, a core each (default: 2; 1 with --actors)."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="cpu|cuda", help="Where to train (default: a GPU if there is one)."),
]
ActorCount = Annotated[
    int | None,
    typer.Option(
        "--actors", min=1, metavar="N",
        help="Share each run's clients out over N processes of Ray (default: none, no Ray).",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Of a Ray that runs (default: one is started here)."),
]
GpusPerActor = Annotated[
    float | None,
    typer.Option(min=0, metavar="X", help="GPUs of each actor, such as 0.25 (default: its share)."),
]

TrainerName = Annotated[
    str | None,
    typer.Option(
        "--trainer", click_type=click.Choice(["one-by-one", "batched", "compiled", "fastest"]),
        metavar="WAY",
        help="How clients train: one-by-one, batched, compiled, or the fastest of them, measured "
        "first (default: one-by-one). The same result within 1e-6, not to the bit.",
    ),
]


def say_version(wanted: bool) -> None:
    if wanted:
        print(f"fedmoe {__version__}")
        raise typer.Exit


@app.callback(epilog=EXAMPLES)
def fedmoe(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=say_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Personalise mixture-of-experts models across clients who keep their data."""
    settle_environment()


@app.command(cls=Command, epilog=RUN_EXAMPLES)
def run(
    name: Annotated[str, NAME],
    method: Annotated[
        list[str] | None,
        typer.Option(help="Only this method; repeatable (default: all)."),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, metavar="N", help="Of data, model and draws; repeatable (default: 0)."),
    ] = None,
    rounds: Rounds = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs (default: runs/NAME).")
    ] = None,
    workers: Workers = None,
    device: Device = None,
    actors: ActorCount = None,
    ray_address: RayAddress = None,
    gpus_per_actor: GpusPerActor = None,
    trainer: TrainerName = None,
    json: Json = False,
    no_report: NoReport = False,
    quiet: Quiet = False,
) -> None:
    """Run an experiment and compare its methods.

    \b
    NAME is demo, domains, domains-50, domains-1000, domains-pooled,
    domains-devices, domains-drop-out, two-domains, published-dirichlet,
    published-pathological, published-fifth-dirichlet,
    published-fifth-pathological, dirichlet-0.5, dirichlet-1.0, hundred, motion,
    vowels, shakespeare, crowd, heldout-weak, heldout-average, heldout-ablations,
    or a function of your own, module:function.
    At the end come a table and report.html.

    Runs that the folder holds already are not run again if they are finished, and go on if
    not. Ctrl-C loses at most the round that each run is in.
    """
    with explained("run"):
        from fedmoe.cli.run import Manner, actors_of, run_command

        crew = actors_of(actors, ray_address, gpus_per_actor, device)
        manner = Manner(workers, device, json, not no_report, quiet, crew, trainer)
        run_command(name, method or [], seed or [0], rounds, out, manner)


@app.command(cls=Command)
def resume(
    folder: Annotated[Path, FOLDER],
    workers: Workers = None,
    device: Device = None,
    actors: ActorCount = None,
    ray_address: RayAddress = None,
    gpus_per_actor: GpusPerActor = None,
    json: Json = False,
    no_report: NoReport = False,
    quiet: Quiet = False,
) -> None:
    """Go on with runs that were stopped.

    FOLDER is a run, or holds several. Each goes on from its newest checkpoint that is whole,
    and ends with the bits that it would have had.
    """
    with explained("resume"):
        from fedmoe.cli.run import Manner, actors_of, resume_command

        crew = actors_of(actors, ray_address, gpus_per_actor, device)
        resume_command(folder, Manner(workers, device, json, not no_report, quiet, crew))


@app.command(cls=Command)
def report(
    folder: Annotated[Path, FOLDER],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to (default: FOLDER/report.html).")
    ] = None,
) -> None:
    """Write one HTML page about runs.

    FOLDER is a run, or holds several. The page needs no network to be read.
    """
    with explained("report"):
        from fedmoe.cli.compare import report_command

        report_command(folder, out)


@app.command(cls=Command)
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", hidden=True)],
    against: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="Whom to measure the others by (default: the first)."),
    ] = None,
    json: Json = False,
) -> None:
    """Compare the methods of all runs in some folders.

    Each FOLDER is a run, or holds several. Differences between methods are paired by seed, with
    95 % intervals, where at least two seeds are common.
    """
    with explained("compare"):
        from fedmoe.cli.compare import compare_command

        compare_command(folders, against, json)


@app.command(cls=Command, epilog=PLAN_EXAMPLES)
def plan(
    name: Annotated[str, NAME],
    method: Annotated[
        str | None, typer.Option(help="Whose clients to list (default: the first).")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Of the clients' data (default: 0).")
    ] = 0,
    rounds: Rounds = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Tell what a run will cost, before it starts.

    NAME as for run. For each client the experts that fit its device, memory and bytes; for each
    method the bytes and the time of a whole run. Memory and time are measured here and now, with
    a few batches.
    """
    with explained("plan"):
        from fedmoe.cli.plan import plan_command

        plan_command(name, method, seed, rounds, device, json)


@app.command(cls=Command, epilog=INSPECT_EXAMPLES)
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", hidden=True)],
    json: Json = False,
) -> None:
    """Look into a run or a checkpoint, expert by expert.

    PATH is a run's folder, whose newest whole checkpoint is taken, or a checkpoint's own,
    round-NNNNNN. A damaged checkpoint is named; exit code 2 if there is nothing else to show.
    """
    with explained("inspect"):
        from fedmoe.cli.inspect import inspect_command

        inspect_command(path, json)


@app.command(cls=Command, epilog=KEYS_EXAMPLES)
def keys(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the keys.")
    ] = Path("keys"),
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address by which clients call the server; repeatable."),
    ] = None,
    clients: Annotated[
        int, typer.Option(min=0, metavar="N", help="Keys for clients 0 to N-1.")
    ] = 0,
    client: Annotated[
        list[int] | None,
        typer.Option(min=0, metavar="I", help="A key for client I; repeatable."),
    ] = None,
    days: Annotated[
        int, typer.Option(min=1, metavar="N", help="Days that the server's certificate holds.")
    ] = 365,
    force: Annotated[
        bool, typer.Option("--force", help="Make anew what is there already.")
    ] = False,
    json: Json = False,
) -> None:
    """Make certificates and keys for flower-server and flower-client.

    With --host: an authority (ca.crt) and the server's certificate. With --clients or --client:
    a key each. What is there already is kept. At the end it tells which file goes where.
    """
    with explained("keys"):
        from fedmoe.cli.keys import keys_command

        keys_command(out, host or [], clients, client or [], days, force, json)


@app.command(cls=Command)
def doctor(json: Json = False) -> None:
    """Check this machine, and tell how to mend it.

    Exit code 1 if something is missing that fedmoe needs.
    """
    with explained("doctor"):
        from fedmoe.cli.doctor import doctor_command

        doctor_command(json)


def main() -> None:
    """The entry point: runs the command that was typed, and ends the process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII alone
    app(prog_name="fedmoe")


def settle_environment() -> None:
    """One thread for each process, and no news to anybody: before torch or Flower is imported."""
    for name, value in {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        os.environ.setdefault(name, value)
