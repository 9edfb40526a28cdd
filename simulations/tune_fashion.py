"""Choose every method's learning rate on validation data, with seeds that no table uses.

    python -m simulations.tune_fashion --protocol domains --rates 0.05 0.1 0.2

Writes simulations/results/tuning.json: per protocol, method and rate the mean over clients of the
validation accuracy, of the model as received and after local training, whichever is better on
average. Test parts are never looked at. Runs that are there already are not run again.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec
from fedmoe.experiments.study import folder_of, is_finished, run_study
from fedmoe.experiments.table import default_rounds, find_experiment
from fedmoe.report.log import read_run

RESULTS = Path(__file__).parent / "results" / "tuning.json"
SEED = 100  # tables use 0, 1, 2


def at_rate(seed: int, rounds: int, protocol: str, rate: float) -> Mapping[str, Experiment]:
    """The protocol's methods, all with one learning rate."""
    methods = find_experiment(protocol)(seed=seed, rounds=rounds)
    return {m: replace(e, plan=replace(e.plan, lr=rate)) for m, e in methods.items()}


def validation_accuracy(folder: Path) -> float:
    """Of the last evaluation: mean over clients, as received or trained, the better one."""
    accuracies = read_run(folder).rounds[-1].accuracy or {}
    received = [a.received_validation or 0.0 for a in accuracies.values()]
    trained = [a.trained_validation or 0.0 for a in accuracies.values()]
    return max(sum(received), sum(trained)) / max(len(accuracies), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--protocol", default="domains")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--rates", nargs="+", type=float, required=True)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--runs", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rounds = options.rounds or default_rounds(options.protocol)
    methods = options.methods or list(find_experiment(options.protocol)(seed=options.seed))
    jobs = {}
    for rate in options.rates:
        for method in methods:
            arguments = {"protocol": options.protocol, "rate": rate}
            spec = Spec(f"{__spec__.name}:at_rate", method, options.seed, rounds, arguments)
            root = options.runs / f"{options.protocol}-{rounds}" / f"lr{rate:g}"
            jobs[rate, method] = (spec, folder_of(root, spec))
    run_study(list(jobs.values()), options.workers)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    table = known.setdefault(options.protocol, {}).setdefault(f"{rounds} rounds", {})
    for (rate, method), (_, folder) in jobs.items():
        if is_finished(folder):
            table.setdefault(method, {})[f"{rate:g}"] = round(validation_accuracy(folder), 4)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    for method in sorted(table):
        print(method, table[method])


if __name__ == "__main__":
    main()
