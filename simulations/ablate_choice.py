"""Why FedMoE chooses as it does: the first choice made in several ways, on *domains*.

    python -m simulations.ablate_choice [--protocol domains] [--rounds 20]

One seed that no table uses, validation data alone. Writes simulations/results/choice-PROTOCOL.md:
per way of choosing the validation accuracy, how many experts serve more than one domain, and the
traffic. Runs go on where they were stopped.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec
from fedmoe.experiments.study import folder_of, is_finished, run_study
from fedmoe.experiments.table import find_experiment
from fedmoe.federated.fedmoe import FedMoE, frequency
from fedmoe.report.log import Run, read_run
from simulations.tune_fashion import SEED, validation_accuracy

RESULTS = Path(__file__).parent / "results"

WAYS = {
    "own-frequency": FedMoE(measure=frequency, centred=False, smooth_over=0, sharpness=0.0),
    "own-mass": FedMoE(smooth_over=0, sharpness=0.0),
    "smoothed-mass": FedMoE(sharpness=0.0),
    "balanced-frequency": FedMoE(measure=frequency),
    "balanced-mass": FedMoE(),
    "balanced-mass-not-smoothed": FedMoE(smooth_over=0),
    "balanced-mass-capped": FedMoE(theta_cap=0.9),
}


def ways(seed: int, rounds: int, protocol: str) -> Mapping[str, Experiment]:
    """The protocol's FedMoE, choosing in each of the ways; and the controls."""
    methods = find_experiment(protocol)(seed=seed, rounds=rounds)
    own = methods["fedmoe"]
    runs = {
        way: replace(own, method=way, strategy=replace(strategy, seed=seed))
        for way, strategy in WAYS.items()
    }
    return runs | {m: methods[m] for m in ("random", "chosen-by-group")}


def shared_experts(run: Run) -> int:
    """Experts that at the end are held by clients of more than one domain."""
    groups = {c.id: c.group for c in run.info.clients}
    holders: dict[tuple[int, int], set[str | None]] = {}
    for client, layers in run.rounds[-1].held.items():
        for layer, experts in enumerate(layers):
            for e in experts:
                holders.setdefault((layer, e), set()).add(groups[client])
    return sum(len(g) > 1 for g in holders.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--protocol", default="domains")
    parser.add_argument("--ways", nargs="+")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=Path("runs/choice"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    root = options.runs / f"{options.protocol}-{options.rounds}"
    names = options.ways or [*WAYS, "random", "chosen-by-group"]
    jobs = {}
    for way in names:
        target = f"{__spec__.name}:ways"
        spec = Spec(target, way, SEED, options.rounds, {"protocol": options.protocol})
        jobs[way] = (spec, folder_of(root, spec))
    run_study(list(jobs.values()), options.workers)
    lines = [f"## {options.protocol}, {options.rounds} rounds, seed {SEED}, validation data\n"]
    lines.append("| choice | accuracy | experts of several domains | MiB in all |")
    lines.append("|---|---|---|---|")
    for way, (_, folder) in jobs.items():
        if is_finished(folder):
            run = read_run(folder)
            traffic = sum(r.bytes_down + r.bytes_up for r in run.rounds) / 2**20
            lines.append(
                f"| {way} | {100 * validation_accuracy(folder):.1f} | {shared_experts(run)} "
                f"| {traffic:.0f} |"
            )
    text = "\n".join(lines) + "\n"
    place = RESULTS / f"choice-{options.protocol}.md"
    place.parent.mkdir(exist_ok=True)
    place.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
