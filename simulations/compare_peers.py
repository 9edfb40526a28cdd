"""FedAvg, FedPer and Ditto beside those of fluke-fl, on the same clients and from the same start.

    make peers
    python -m simulations.compare_peers [--protocols ...] [--methods ...] [--seeds 0 1 2]
                                        [--rounds 10] [--lr 0.02] [--workers 1]

Writes simulations/results/peers.json and, made from it, peers.md: a row per protocol, method, seed,
number of rounds and learning rate. Runs live in runs/peers; what is done is not done again. Both
sides have the same CNN with the same parameters at the start, the same training and test images,
plain SGD, and averages weighted by examples. fluke runs twice: once it shuffles by itself, and once
it is given the batches that our clients draw. The first is fluke as it comes, and agrees as far as
the order of examples lets it; the second tells whether both sides compute the same thing. Ours runs
twice too, the second time with other batches, to tell how far their order alone moves a result.
"""

import argparse
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from statistics import mean, stdev
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedmoe.data.protocols import published
from fedmoe.experiments.definition import definition_of
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec
from fedmoe.experiments.study import folder_of, is_finished, run_study
from fedmoe.federated.average import by_examples
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.local import LocalPlan, Phase, fedper
from fedmoe.federated.methods.ditto import Ditto
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.vision import dense_cnn
from fedmoe.report.atomic import write_atomically
from fedmoe.report.log import read_run
from fedmoe.report.measures import Row, evaluations
from fedmoe.report.rows import read_rows, write_rows
from fedmoe.rng import torch_generator

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PEER_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"  # made by `make peers`

PROTOCOLS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "published-fifth-dirichlet": {"partition": "dirichlet", "share": 0.2},
        "published-fifth-pathological": {"partition": "pathological", "share": 0.2},
    }
)
# What is compared after the last round: the one model of FedAvg as clients receive it, and
# otherwise each client's personal model as it left it.
MEASURE = {"fedavg": "received", "fedper": "trained", "ditto": "trained"}
BATCH_SIZE, EPOCHS = 10, 1
PULL, PERSONAL_EPOCHS = 1.0, 1  # of Ditto's personal model
ORDERS = ("own", "given")  # of fluke's batches
SIDES = {"ours", "ours_again", *(f"theirs_{order}" for order in ORDERS)}

# Ours -> the names in fluke's MNIST_CNN, by how they begin; the values are laid out alike.
FLUKE_NAMES = {"stem.": "_encoder.", "head.up.": "_head.fc1.", "head.down.": "_head.fc2."}


def is_last_layer(name: str) -> bool:
    """Of `dense_cnn`: what FedPer keeps private, here on both sides."""
    return name.startswith("head.down.")


def dense(
    seed: int = 0,
    rounds: int = 10,
    *,
    partition: Literal["dirichlet", "pathological"] = "dirichlet",
    share: float = 0.2,
    lr: float = 0.02,
    order: int = 0,
) -> Mapping[str, Experiment]:
    """Our side: methods on a model without experts. `order` is that of the clients' batches."""
    data = published(seed, partition=partition, share=share)
    plan = LocalPlan((Phase(epochs=EPOCHS),), lr=lr, batch_size=BATCH_SIZE)
    plans = {
        "fedavg": plan,
        "fedper": fedper(is_last_layer, plan),
        "ditto": replace(plan, method=Ditto(pull=PULL, epochs=PERSONAL_EPOCHS)),
    }
    make = partial(dense_cnn, seed=seed)
    # Of the schedule's seed only the batches are drawn: start and data have their own.
    drawn = np.random.SeedSequence([seed, order]).generate_state(1)[0] if order else seed
    strategy, schedule = FedAvg(weigh=by_examples), Schedule(rounds, int(drawn))
    return {
        method: Experiment(data.name, method, make, strategy, own, data, data.clients, schedule)
        for method, own in plans.items()
    }


@dataclass(frozen=True, eq=False)
class Case:
    """What makes a row: our run, and fluke's two, in one folder; beside it ours again."""

    protocol: str
    experiment: Experiment
    spec: Spec  # of our run
    folder: Path
    again: Spec  # of ours with other batches

    @property
    def ours(self) -> list[tuple[Spec, Path]]:
        """Our two runs and their folders."""
        return [(self.spec, self.folder), (self.again, self.folder / "again")]

    @property
    def clients(self) -> Path:
        """The file with what both sides begin with."""
        return self.folder / "clients.npz"

    def result(self, order: str) -> Path:
        """What fluke leaves."""
        return self.folder / f"fluke-{order}.json"

    def job(self, order: str) -> dict[str, Any]:
        """What `peer_fluke.py` is asked for."""
        return {"clients": str(self.clients.resolve()), "order": order, **self.settings}

    @property
    def settings(self) -> dict[str, Any]:
        """The same on both sides."""
        return {
            "method": self.spec.method,
            "seed": self.spec.seed,
            "rounds": self.spec.rounds,
            "lr": self.experiment.plan.lr,
            "batch_size": BATCH_SIZE,
            "epochs": EPOCHS,
            "pull": PULL,
            "personal_epochs": PERSONAL_EPOCHS,
        }


def cases_of(
    protocols: Iterable[str],
    methods: Sequence[str],
    seeds: Iterable[int],
    rounds: int,
    lr: float,
    root: Path,
) -> list[Case]:
    """One case per protocol, seed and method; other settings or data have other folders."""
    cases = []
    for protocol, seed in product(protocols, seeds):
        arguments = {**PROTOCOLS[protocol], "lr": lr}
        experiments = dense(seed, rounds, **arguments)
        for method in methods:
            spec = Spec("simulations.compare_peers:dense", method, seed, rounds, arguments)
            settings = definition_of(spec, experiments[method]).hash
            folder = folder_of(root / protocol, spec) / settings
            again = replace(spec, arguments={**arguments, "order": 1})
            cases.append(Case(protocol, experiments[method], spec, folder, again))
    return cases


def fluke_name(name: str) -> str:
    """What a parameter of `dense_cnn` is called in fluke's MNIST_CNN."""
    [(ours, theirs)] = [pair for pair in FLUKE_NAMES.items() if name.startswith(pair[0])]
    return theirs + name.removeprefix(ours)


def batch_order(num_examples: int, rounds: int, seed: int, client: int) -> NDArray[np.int64]:
    """How our client shuffles its examples: (rounds, passes, num_examples).

    Ditto's personal model meets them in the same order as the global one.
    """
    order_RPN = np.empty((rounds, max(EPOCHS, PERSONAL_EPOCHS), num_examples), np.int64)
    for round, order_PN in enumerate(order_RPN):
        generator = torch_generator(seed, round, client)
        for order_N in order_PN:
            order_N[:] = torch.randperm(num_examples, generator=generator).numpy()
    return order_RPN


def write_clients(experiment: Experiment, path: Path) -> None:
    """The file of clients that `peer_fluke.py` describes; validation parts stay out of it."""
    parameters = experiment.factory().state_dict()
    arrays = {f"model.{fluke_name(n)}": t.numpy() for n, t in parameters.items()}
    rounds, seed = experiment.schedule.rounds, experiment.schedule.seed
    for c in experiment.clients:
        data = experiment.data.load(c.id)
        for part, (x, y) in (("train", data.train), ("test", data.test)):
            arrays |= {f"{c.id}.{part}.x": x.numpy(), f"{c.id}.{part}.y": y.numpy()}
        arrays[f"{c.id}.order"] = batch_order(len(data.train.y), rounds, seed, c.id)
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    beside.replace(path)


def run_peer(case: Case, order: str) -> None:
    """Run fluke in its own environment, unless its result is there.

    Raises:
        RuntimeError: fluke failed.
    """
    if read_result(case, order) is not None:
        return
    result = case.result(order)
    job = result.with_suffix(".job")
    write_atomically(job, json.dumps(case.job(order)) + "\n")
    command = [PEER_PYTHON, HERE / "peer_fluke.py", job, result]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{job}: fluke failed\n{ended.stderr[-2000:]}")


def read_result(case: Case, order: str) -> Mapping[str, Any] | None:
    """What fluke left of this very job; None if it has not run."""
    path = case.result(order)
    if not path.exists():
        return None
    result: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if result["job"] == case.job(order) else None


def row_of(case: Case) -> Row | None:
    """The case as a row; None while one of its four runs is missing.

    Raises:
        ValueError: a run of ours lost a client's work.
    """
    results = {order: read_result(case, order) for order in ORDERS}
    if None in results.values() or not all(is_finished(folder) for _, folder in case.ours):
        return None
    measure = MEASURE[case.spec.method]
    run = read_run(case.folder)
    ours = [_by_client(folder, measure) for _, folder in case.ours]
    by_client = dict(zip(("ours", "ours_again"), ours, strict=True))
    by_client |= {f"theirs_{order}": r[measure][-1] for order, r in results.items() if r}
    return {
        "protocol": case.protocol,
        **case.settings,
        "partition_hash": run.info.partition_hash,
        "measure": measure,
        **{side: mean(accuracies) for side, accuracies in by_client.items()},
        "by_client": by_client,
        "versions": dict(run.info.versions),
        "peer_versions": next(r["versions"] for r in results.values() if r),
    }


def _by_client(folder: Path, measure: str) -> list[float]:
    """Of a run of ours what is compared, to five decimals, as fluke has it."""
    run = read_run(folder)
    if lost := [f for r in run.rounds for f in (*r.failed, *r.refused)]:
        raise ValueError(
            f"{folder}: every client must have trained in every round, and client "
            f"{lost[0].client} has not: {lost[0].reason}"
        )
    # The closing evaluation has the model after all rounds, and trains it once more.
    last = evaluations(run)[-1 if measure == "received" else -2]
    return [round(getattr(last, measure)[c.id], 5) for c in run.info.clients]


def write_results(cases: Iterable[Case], place: Path = RESULTS) -> None:
    """peers.json and peers.md: what the file had, and these cases as far as they are done."""
    read = read_rows(place / "peers.json")
    rows = {_key(row): row for row in read if set(row["by_client"]) >= SIDES}
    rows |= {_key(row): row for case in cases if (row := row_of(case)) is not None}
    ordered = [rows[key] for key in sorted(rows)]
    write_rows(place / "peers.json", ordered)
    write_atomically(place / "peers.md", markdown(ordered))


def _key(row: Row) -> tuple[Any, ...]:
    method = list(MEASURE).index(row["method"])
    return row["protocol"], row["rounds"], row["lr"], method, row["seed"]


ABOUT = f"""# Baselines beside fluke-fl's

Made by `python -m simulations.compare_peers`. Mean over clients of the accuracy on their own test
parts, in per cent, after the last round: of the averaged model as every client receives it
(FedAvg), of each client's personal model when it has trained in that round (FedPer, Ditto).

Both sides have the same clients with the same images, the same CNN of 582,026 parameters with the
same values at the start, all clients in every round, {EPOCHS} epoch in batches of {BATCH_SIZE},
plain SGD, and averages weighted by examples; neither uses validation parts. FedPer keeps the last
linear layer private. Ditto's lambda is {PULL:g}; its personal model trains {PERSONAL_EPOCHS} epoch
a round, after the global one and towards that as it was received. For it ours takes the same
batches again, and fluke shuffles anew.

*Ours again* is ours with other batches, so its points are what the order of examples does alone.
fluke's *own order* is fluke as it comes, which shuffles by itself; with *our order* it is given the
batches that our clients draw. Points are ours less the column before; ± is the standard deviation
over seeds, *furthest* the largest difference of one client with our order."""

HEADER = (
    "| method | seed | ours | ours again | points | own order | points | our order | points "
    "| furthest |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
)


def markdown(rows: Sequence[Row]) -> str:
    """A table per protocol, number of rounds and learning rate."""
    lines = [ABOUT]
    for (protocol, rounds, lr), group in groupby(rows, lambda row: _key(row)[:3]):
        lines += [f"\n## {protocol}, {rounds} rounds, learning rate {lr:g}\n", *HEADER]
        for method, own in groupby(group, lambda row: row["method"]):
            runs = list(own)
            lines += [_line(method, str(run["seed"]), [run]) for run in runs]
            if len(runs) > 1:
                lines.append(_line(method, f"mean of {len(runs)}", runs))
    for who, side in (("Ours", "versions"), ("Theirs", "peer_versions")):
        found = {f"{name} {version}" for row in rows for name, version in row[side].items()}
        lines.append(f"\n{who}: {', '.join(sorted(found))}.")
    return "\n".join(lines) + "\n"


def _line(method: str, seed: str, rows: Sequence[Row]) -> str:
    cells = [method, seed, _percent([row["ours"] for row in rows])]
    for side in ("ours_again", *(f"theirs_{order}" for order in ORDERS)):
        points = [row["ours"] - row[side] for row in rows]
        cells += [_percent([row[side] for row in rows]), _percent(points, sign="+")]
    furthest = max(
        abs(ours - theirs)
        for row in rows
        for ours, theirs in zip(
            row["by_client"]["ours"], row["by_client"]["theirs_given"], strict=True
        )
    )
    return f"| {' | '.join([*cells, _percent([furthest])])} |"


def _percent(values: Sequence[float], sign: str = "") -> str:
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):{sign}.2f}{spread}"


def compare(cases: Sequence[Case], workers: int, place: Path = RESULTS) -> list[str]:
    """Run what is not done, and write the results as they come; returns what failed."""
    ours = run_study([run for case in cases for run in case.ours], workers, every_s=5.0)
    failed = [f"{p.folder}: {p.error}" for p in ours if p.error]
    ready = [case for case in cases if all(is_finished(folder) for _, folder in case.ours)]
    for case in ready:
        if not case.clients.exists():
            write_clients(case.experiment, case.clients)
    write_results(ready, place)
    pool = ThreadPoolExecutor(workers)
    try:
        for done in as_completed(pool.submit(run_peer, c, o) for c in ready for o in ORDERS):
            if why := done.exception():
                failed.append(str(why))
            write_results(ready, place)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    parser.add_argument("--methods", nargs="+", default=list(MEASURE), choices=MEASURE)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--runs", type=Path, default=Path("runs/peers"))
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    if not PEER_PYTHON.exists():
        raise SystemExit(f"{PEER_PYTHON} is missing: run `make peers` first")
    cases = cases_of(
        options.protocols,
        options.methods,
        options.seeds,
        options.rounds,
        options.lr,
        options.runs,
    )
    failed = compare(cases, options.workers)
    print((RESULTS / "peers.md").read_text(encoding="utf-8"))
    for line in failed:
        print(f"failed: {line}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
