"""What each part of FedMoE and of FedJETs does: one thing changed at a time.

    python -m simulations.ablate_methods [--protocols domains heldout-weak ...] [--seeds 100]

Writes simulations/results/ablations.json and, made from it, ablations.md, as runs finish: of every
variant the accuracy on validation and on test data, and how far it is from the method as it is.
Runs live in runs/ablations and go on where they were stopped; what is done is not done again. The
seed is one that no table of methods uses, so that a choice made here, by the validation column
alone, is not made on what those tables show.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedmoe.experiments import fashion, unseen
from fedmoe.experiments.experiment import Experiment, with_budgets
from fedmoe.experiments.sweep import Setting
from fedmoe.federated.average import by_examples
from fedmoe.federated.fedmoe import FedMoE, as_published, frequency, mass
from fedmoe.federated.local import frozen_router, private_router
from fedmoe.federated.methods.flame import frequency_power
from fedmoe.federated.methods.reap import Reaping, importance
from fedmoe.nn.gates.topk import GateMass
from fedmoe.nn.vision import fashion_cnn
from fedmoe.report.comparison import by_protocol, facts
from fedmoe.report.fairness import comparison_notes
from fedmoe.report.measures import Row, TableRow, aggregate_rows
from fedmoe.report.tables import Unit, format_value
from fedmoe.report.unseen import judged
from fedmoe.state import split_state
from simulations.tables import Table, carry_out, options_of, settings_of
from simulations.tune_fashion import SEED

RUNS = Path("runs/ablations")
ROUNDS = 20  # of FedMoE's; FedJETs' have as many as the protocol
WIDTH = 512  # of all experts' hidden layers together, however many there are
SHARE = 0.25  # of the experts, that a device of *domains* holds

Change = Callable[[Experiment], Experiment]


@dataclass(frozen=True)
class Variant:
    """What is asked, and the change to the method that answers it."""

    says: str
    change: Change


def strategy(**fields: Any) -> Change:
    """Other fields of the strategy."""
    return lambda e: replace(e, strategy=replace(fedmoe_of(e), **fields))


def fedmoe_of(e: Experiment) -> FedMoE:
    """The strategy of an experiment with FedMoE."""
    assert isinstance(e.strategy, FedMoE)
    return e.strategy


def model(
    num_experts: int = 16,
    k: int = fashion.HELD,
    share: float = SHARE,
    theta_cap: float = 1.0,
    gate_mass: GateMass = "sum",
) -> Change:
    """Another cut of the same hidden layer, other devices: all else follows."""

    def change(e: Experiment) -> Experiment:
        hidden, seed = WIDTH // num_experts, e.schedule.seed
        factory = partial(fashion_cnn, num_experts, hidden, k=k, seed=seed, gate_mass=gate_mass)
        return replace(
            e,
            factory=factory,
            clients=with_budgets(e.data, split_state(factory()), (share,)),
            strategy=replace(fedmoe_of(e), min_experts=k, theta_cap=theta_cap),
        )

    return change


def full_mass(e: Experiment) -> Experiment:
    """The gate's softmax keeps its full denominator, so clients are sent all experts' rows."""
    factory = partial(fashion_cnn, k=fashion.HELD, seed=e.schedule.seed, gate_mass="full")
    return replace(e, factory=factory, strategy=replace(fedmoe_of(e), all_rows=True))


def as_it_is(e: Experiment) -> Experiment:
    return e


CHOICES: Mapping[str, Variant] = {
    "fedmoe": Variant("as it is", as_it_is),
    "no-stage-1": Variant(
        "first sub-MoEs drawn, nobody scouts, so without kinship: see kinship-0",
        strategy(explore_rounds=0),
    ),
    "kinship-0": Variant("one shared part for all", strategy(kinship=0.0)),
    "kinship-half": Variant("half of the way to groups' own", strategy(kinship=0.5)),
    "not-balanced": Variant("demand for experts not balanced", strategy(sharpness=0.0)),
    "not-smoothed": Variant("shares not averaged over similar clients", strategy(smooth_over=0)),
    "by-frequency": Variant("by how often experts are activated", strategy(measure=frequency)),
    "by-own-frequency": Variant(
        "that alone, as the paper chooses",
        strategy(measure=frequency, centred=False, smooth_over=0, sharpness=0.0),
    ),
    "router-personal": Variant(
        "gate rows stay on the client", lambda e: replace(e, plan=private_router(e.plan))
    ),
    "router-frozen": Variant(
        "gate rows never move", lambda e: replace(e, plan=frozen_router(e.plan))
    ),
    "gate-mass-full": Variant("the softmax keeps absent experts' share", full_mass),
    "no-balance-loss": Variant(
        "no load-balance loss in training",
        lambda e: replace(e, plan=replace(e.plan, balance=0.0)),
    ),
    "by-examples": Variant("experts weigh by examples, not tokens", strategy(weigh=by_examples)),
    "by-frequency-squared": Variant(
        "experts weigh by examples times squared frequency", strategy(weigh=frequency_power(2))
    ),
    "8-experts": Variant("of twice the width, two for each example", model(8, k=2)),
    "32-experts": Variant("of half the width, eight for each example", model(32, k=8)),
    "k-1": Variant("one expert for each example", model(k=1)),
    "k-2": Variant("two experts for each example", model(k=2)),
    "k-2-averaged": Variant(
        "two experts, their outputs averaged: fedmoe-mean", model(k=2, gate_mass="renormalise")
    ),
    "k-4-averaged": Variant("four experts averaged", model(gate_mass="renormalise")),
    "budget-eighth": Variant(
        "devices hold an eighth of the experts, two, and use both", model(k=2, share=0.125)
    ),
    "budget-half": Variant("devices hold half of them", model(share=0.5)),
    "budget-all": Variant("devices hold all of them", model(share=1.0)),
    "theta-0.5": Variant(
        "all would fit; experts for half of what a client asks for",
        model(share=1.0, theta_cap=0.5),
    ),
    "theta-0.7": Variant("for seven tenths of it", model(share=1.0, theta_cap=0.7)),
    "theta-0.9": Variant("for nine tenths of it", model(share=1.0, theta_cap=0.9)),
}

STAGES: Mapping[str, Variant] = {
    "fedmoe": Variant("as it is", as_it_is),
    "no-stage-2": Variant("sub-MoEs stay as first chosen", strategy(patience=None)),
    "add-only": Variant("a stuck client may gain experts alone", strategy(adjusts="add")),
    "drop-only": Variant("a stuck client may lose experts alone", strategy(adjusts="drop")),
    "patience-1": Variant("advice after one round, as the paper's algorithm", strategy(patience=1)),
    "no-stage-1": Variant("first sub-MoEs drawn", strategy(explore_rounds=0)),
}

EXPLORED = as_published(explore_rounds=2, alpha=1.0)  # full models are trained, and not predicted
MEASURES: Mapping[str, Variant] = {
    "fedmoe": Variant("by activation frequency, as the paper", as_it_is),
    "by-mass": Variant("by the gate's score", strategy(measure=mass)),
    "by-importance": Variant(
        "by gate weight times norm of the output (REAP)",
        lambda e: replace(
            strategy(measure=importance)(e), plan=replace(e.plan, method=Reaping())
        ),
    ),
}


def choices(seed: int = SEED, rounds: int = ROUNDS) -> Mapping[str, Experiment]:
    """FedMoE on *domains*: the choice of experts, the router, the average, sizes."""
    return _varied(fashion.domains(seed, rounds)["fedmoe"], CHOICES)


def stages(seed: int = SEED, rounds: int = ROUNDS) -> Mapping[str, Experiment]:
    """FedMoE on devices of four sizes: where all hold equally many, stage 2 has no say."""
    return _varied(fashion.domains_devices(seed, rounds)["fedmoe"], STAGES)


def measures(seed: int = SEED, rounds: int = ROUNDS) -> Mapping[str, Experiment]:
    """FedMoE that trains the full model while it explores, and then keeps experts for half of what
    they measured: importance takes experts' outputs, which a scout has not.
    """
    whole = model(share=1.0, theta_cap=0.5)
    own = fashion.domains(seed, rounds)["fedmoe"]
    published = replace(EXPLORED, min_experts=fashion.HELD, seed=seed)
    return _varied(whole(replace(own, strategy=published)), MEASURES)


def fewer_experts(
    seed: int = SEED, rounds: int = 40, *, experts: int = 5
) -> Mapping[str, Experiment]:
    """FedJETs with fewer experts and anchors, so with other data; K from 1 to M."""
    name = f"heldout-weak-{experts}-experts"
    runs = unseen.ablations(seed, rounds, quality="weak", experts=experts, k=2, name=name)
    return {m: e for m, e in runs.items() if m in JETS and m.startswith("k-")}


def _varied(own: Experiment, variants: Mapping[str, Variant]) -> Mapping[str, Experiment]:
    return {m: replace(v.change(own), method=m) for m, v in variants.items()}


JETS: Mapping[str, str] = {
    "k-1": "one expert for a client",
    "k-2": "two experts",
    "k-3": "three experts",
    "k-4": "four experts",
    "k-5": "five experts",
    "k-6": "six experts",
    "k-10": "all ten experts",
    "anchors-found": "anchors found from the encoder's statistics",
    "anchors-random": "anchors drawn",
    "no-anchors": "nobody is an anchor",
    "anchors-30-percent": "three anchors among a round's ten clients",
    "anchors-only": "anchors alone take part",
    "experts-from-encoder": "experts begin as the common expert",
    "experts-are-heads": "experts are heads on the encoder's features",
    "server-chooses": "the server chooses, and is told the scores",
    "random-gate": "a gate that nobody trains",
}

BASE = {"heldout-weak": "k-4", "heldout-weak-5-experts": "k-2"}  # else fedmoe
SETTINGS = (
    Setting(f"{__spec__.name}:choices", ROUNDS, label="domains"),
    Setting(f"{__spec__.name}:stages", ROUNDS, label="domains-devices"),
    Setting(f"{__spec__.name}:measures", ROUNDS, label="domains-explored"),
    Setting("heldout-ablations", None, {"quality": "weak"}, "heldout-weak", tuple(JETS)),
    Setting(f"{__spec__.name}:fewer_experts", 40, {"experts": 5}, "heldout-weak-5-experts"),
)
SAYS = {
    "domains": {m: v.says for m, v in CHOICES.items()},
    "domains-devices": {m: v.says for m, v in STAGES.items()},
    "domains-explored": {m: v.says for m, v in MEASURES.items()},
}
HOW_TO_READ = """\
One thing is changed at a time; the first line of each table is the method as it is there, and
*change* is how far a variant's validation accuracy is from its own, in points. Validation accuracy
is that of the clients who train, of the better of the model as received and after local training;
what is chosen from this page must be chosen by it. Test accuracy is on the clients' own test parts,
on *heldout* of the clients who came afterwards. Traffic is all of the run's, both ways."""


def ablation_markdown(rows: Sequence[Row], reference: str) -> str:
    """A section for each protocol: its facts, a line for each variant, and what to mind."""
    sections = []
    for protocol, own in by_protocol(rows).items():
        lines = [f"## {protocol}", "", facts(own), ""]
        lines += _lines(own, BASE.get(protocol, reference), SAYS.get(protocol, JETS))
        # Sizes, where they differ, are what is asked here.
        plain = [{**row, "num_experts_L": None, "experts_held_mean": None} for row in own]
        notes = comparison_notes(judged(plain) or plain)
        lines += ["", *(f"- {note.text}" for note in notes)] if notes else []
        sections.append("\n".join(lines))
    return "\n\n\n".join(sections) + "\n"


def _lines(rows: Sequence[Row], base: str, says: Mapping[str, str]) -> list[str]:
    found = {m.method: m for m in aggregate_rows(rows)}
    served = any("unseen_mean" in row for row in rows)
    test = "unseen_mean" if served else "personal_mean"
    order = [m for m in (base, *says, *found) if m in found]
    lines = [
        "| variant | what is other | validation % | change | test % | experts held | MiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for method in dict.fromkeys(order):
        row = found[method]
        name = method + "‡" * row.control
        cells = [
            name,
            says.get(method, ""),
            _text(row, "validation_mean", Unit.SHARE),
            _change(row, found.get(base)),
            _text(row, test, Unit.SHARE),
            _text(row, "experts_held_mean", Unit.COUNT),
            _text(row, "bytes_total", Unit.BYTES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _change(row: TableRow, base: TableRow | None) -> str:
    key = "validation_mean"
    if base is None or row is base or not (key in row.values and key in base.values):
        return "-"
    return f"{100 * (row.values[key].mean - base.values[key].mean):+.1f}"


def _text(row: TableRow, key: str, unit: Unit) -> str:
    if key not in row.values:
        return "-"
    value = row.values[key]
    text = format_value(value.mean, unit)
    spread = unit is Unit.SHARE and value.std is not None
    return f"{text} ± {format_value(value.std or 0.0, unit)}" if spread else text


TABLE = Table(
    "ablations",
    "FedMoE and FedJETs, one thing changed at a time",
    SETTINGS,
    how_to_read=HOW_TO_READ,
    sections=ablation_markdown,
    script="ablate_methods",
)


def main() -> int:
    parser = options_of(TABLE, __doc__)
    parser.set_defaults(seeds=[SEED], runs=RUNS)
    options = parser.parse_args()
    return carry_out(TABLE, settings_of(TABLE, options.protocols), options)


if __name__ == "__main__":
    raise SystemExit(main())
