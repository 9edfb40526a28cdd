"""The table of personalised methods on all protocols: images, motion, speech and text.

    python -m simulations.table_personal [--protocols domains ...] [--methods fedmoe ...]
    python -m simulations.table_personal --quick

Writes simulations/results/personal.json and, made from it, personal.md and personal.html, as runs
finish. The whole published setting (*published-...*) runs ten rounds of six methods: at our tuned
rate, and its Dirichlet half also at the setting's own, which is made for 2000. Figures that others
published stand beside them, marked (simulations/published.py).

Runs live in runs/table and go on where they were stopped. `--quick` runs one seed of every method
on few clients with few examples for two rounds, in runs/quick, and prints the table: to see that
all of it works, not what is best.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmoe.data.examples import ClientData, Examples
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.sweep import Setting
from fedmoe.experiments.table import find_experiment
from simulations.published import leaderboard_rows
from simulations.tables import (
    HOW_TO_READ,
    RUNS,
    SEEDS,
    Table,
    carry_out,
    options_of,
    settings_of,
)

PROTOCOLS = (
    "domains",
    "published-fifth-dirichlet",
    "published-fifth-pathological",
    "two-domains",
    "motion",
    "vowels",
    "shakespeare",
)
# The whole published setting: all 70,000 images, 20 clients, batches of 10, one local epoch.
PUBLISHED_ROUNDS = 10
PUBLISHED_METHODS = ("fedmoe", "fedmoe-mean", "fedavg", "local", "ditto", "fedper")
AT_PUBLISHED_RATE = "published-dirichlet-rate-0.005"
PUBLISHED = (
    *(
        Setting(name, PUBLISHED_ROUNDS, methods=PUBLISHED_METHODS)
        for name in ("published-dirichlet", "published-pathological")
    ),
    Setting(
        "published-dirichlet",
        PUBLISHED_ROUNDS,
        {"rate": "published"},
        AT_PUBLISHED_RATE,
        PUBLISHED_METHODS,
    ),
)
HOW_TO_READ_MODELS = """\
*fedmoe-mean* is FedMoE on the others' model, *fedavg-sum* and *local-sum* are those two on
FedMoE's, all at the same rates. Methods in *-norm* train a model with batch normalisation."""
HOW_TO_READ_PUBLISHED = f"""\
*published-dirichlet* and *published-pathological* are the setting of public leaderboards whole, for
{PUBLISHED_ROUNDS} rounds instead of 2000. All methods run at the rate that was tuned for few rounds
on validation data, 0.2 falling by a tenth each round, clipped; *{AT_PUBLISHED_RATE}* is
the same at the leaderboards' plain 0.005, a rate for hundreds of rounds and not for so few."""
TABLE = Table(
    "personal",
    "Personalised federated learning, compared",
    (*(Setting(name) for name in PROTOCOLS), *PUBLISHED),
    split=("fedavg",),
    page=True,
    how_to_read=f"{HOW_TO_READ} {HOW_TO_READ_MODELS}\n\n{HOW_TO_READ_PUBLISHED}",
    published=tuple(
        leaderboard_rows(
            {"dirichlet": "published-dirichlet", "pathological": "published-pathological"}
        )
    ),
)
QUICK = Path("runs/quick")
QUICK_CLIENTS = 4  # one of each domain
QUICK_EXAMPLES = 60  # at most, in each part of a client's data
QUICK_ROUNDS = 2  # FedMoE explores in the first


def few_clients(
    seed: int, rounds: int, protocol: str, arguments: Mapping[str, Any]
) -> Mapping[str, Experiment]:
    """The protocol's methods, on the first clients and a few of their examples."""
    methods = find_experiment(protocol)(seed=seed, rounds=rounds, **arguments)
    return {m: _made_small(e) for m, e in methods.items()}


def _made_small(e: Experiment) -> Experiment:
    clients = e.clients[:QUICK_CLIENTS]
    per_round = e.schedule.clients_per_round
    return replace(
        e,
        clients=clients,
        unseen=e.unseen[:QUICK_CLIENTS],
        schedule=replace(e.schedule, clients_per_round=per_round and min(per_round, len(clients))),
        data=replace(
            e.data,
            load=lambda client: _few_examples(e.data.load(client)),
            partition_hash=f"{e.data.partition_hash}-{QUICK_EXAMPLES}",
        ),
    )


def _few_examples(data: ClientData) -> ClientData:
    """At most so many of each part, evenly spread, so that no label is lost to their order."""

    def thinned(part: Examples) -> Examples:
        step = max(1, -(-len(part.y) // QUICK_EXAMPLES))
        return Examples(part.x[::step], part.y[::step])

    return ClientData(thinned(data.train), thinned(data.validation), thinned(data.test))


def quickened(s: Setting) -> Setting:
    """The same protocol on few clients for few rounds."""
    arguments = {"protocol": s.target, "arguments": dict(s.arguments)}
    target = f"{__spec__.name}:few_clients"
    return Setting(target, QUICK_ROUNDS, arguments, s.protocol, s.methods)


def main() -> int:
    parser = options_of(TABLE, __doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few clients, few examples")
    options = parser.parse_args()
    settings = settings_of(TABLE, options.protocols)
    if not options.quick:
        return carry_out(TABLE, settings, options)
    if options.runs == RUNS:
        options.runs = QUICK
    if options.seeds == list(SEEDS):
        options.seeds = [SEEDS[0]]
    code = carry_out(TABLE, [quickened(s) for s in settings], options, options.runs)
    if code < 2:
        print((options.runs / f"{TABLE.name}.md").read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
