"""Local training and whole rounds: ours, torch's loop, Flower's simulation, fluke-fl and pfl.

    python -m simulations.bench_training --json [--full] [--part steps|rounds]

Steps: many clients' local training, by one thread. *eager* is the plain loop: a model, an
optimizer, forward, backward, step, one client after another. *one by one* is fedmoe's definition of
a client's training, which also watches the gates; *batched* and *compiled* give the same result by
other means. The ceiling is what no training can beat: the matrix products alone, in memory set
aside before, as many numbers as the routed model needs but all through one expert. All take turns
in one process; times are medians of CPU time.

Rounds: everybody takes part, trains one epoch by plain SGD and is averaged by number of examples;
nothing is evaluated. *published CNN* is the job of public leaderboards, 20 clients by
Dirichlet(0.1) in batches of ten, with a fifth of the images unless --full; *small MoE* has 100
clients and a model of 184,010 numbers. Ours train as a measurement chooses, unless said otherwise.
Flower's simulation runs the same client code (`local.train`, one by one) under its own FedAvg, on
two actors of one CPU each. fluke-fl and pfl have the same clients, networks and settings, and run
in the environment that `make peers` makes; without it their rows are left out. Every side has a
fresh process, one thread in each, and the sides take turns; rounds are medians of wall time, and
the first one, with all that starts before it, is left out.

Shape suffixes: B examples, D width, F hidden width, C classes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmoe.data.examples import ClientData, Examples, FederatedData
from fedmoe.data.protocols import dirichlet, published
from fedmoe.device import keep_freed_memory
from fedmoe.exchange.inprocess import in_process
from fedmoe.federated import batched, compiled
from fedmoe.federated.average import by_examples
from fedmoe.federated.cohort import AT_ONCE, Trainer, choose
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.local import LocalPlan, LocalTask, train
from fedmoe.federated.rounds import RoundReport, Schedule, run_rounds
from fedmoe.native import client as native
from fedmoe.nn.vision import dense_cnn, fashion_cnn, flat_moe
from fedmoe.rng import torch_generator
from fedmoe.state import split_state
from fedmoe.types import Exchange
from simulations.bench_overhead import CORES, SETTINGS

ROOT = Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"  # made by `make peers`
PEERS = ("fluke-fl", "pfl")
CPU = torch.device("cpu")
LONG_S = 1800.0
FULL_TURNS = 3  # of whole rounds


# Steps


@dataclass(frozen=True)
class Case:
    name: str
    factory: Callable[[], nn.Module]
    clients: int
    batch: int
    steps: int  # of each client
    turns: int
    floor: bool = True  # whether the ceiling is known: of the small MoE


STEPS = (
    Case("small MoE, 20 clients, B16", flat_moe, 20, 16, 20, 7),
    Case("small MoE, 20 clients, B32", flat_moe, 20, 32, 20, 7),
    Case("small MoE, 100 clients, B16", flat_moe, 100, 16, 10, 3),
    Case("small MoE, 100 clients, B32", flat_moe, 100, 32, 10, 3),
    Case("dense CNN, B10", dense_cnn, 2, 10, 20, 5, floor=False),
    Case("MoE CNN, B10", fashion_cnn, 2, 10, 20, 5, floor=False),
    Case("MoE CNN with norms, B10", partial(fashion_cnn, norm="batch"), 2, 10, 20, 5, floor=False),
)


def time_steps(case: Case, turns: int) -> dict[str, float]:
    """Median microseconds of a step, by way."""
    draw = torch.Generator().manual_seed(0)
    data = [
        Examples(
            torch.randn(case.batch * case.steps, 1, 28, 28, generator=draw),
            torch.randint(0, 10, (case.batch * case.steps,), generator=draw),
        )
        for _ in range(case.clients)
    ]
    plan = LocalPlan(lr=0.01, batch_size=case.batch)
    models = [case.factory() for _ in data]
    ways: dict[str, Callable[[], object]] = {
        "eager": partial(eager, models, data, plan),
        "one by one": partial(one_by_one, models, data, plan),
        "compiled": partial(by_compiled, models, data, plan),
    }
    if not native.available():
        del ways["compiled"]
    if case.floor:
        ways["batched"] = partial(by_batched, models, data, plan)
        ways["ceiling"] = partial(ceiling, case, draw)
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            before_s = time.thread_time()
            way()
            if turn:  # the first one warms up
                times_s[name].append(time.thread_time() - before_s)
    steps = case.clients * case.steps
    return {name: statistics.median(t) / steps * 1e6 for name, t in times_s.items()}


def eager(models: Sequence[nn.Module], data: Sequence[Examples], plan: LocalPlan) -> None:
    for model, examples in zip(models, data, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=plan.lr)
        for index_B in torch.split(torch.randperm(len(examples.y)), plan.batch_size):
            logit_BC = model(examples.x[index_B])
            loss = nn.functional.cross_entropy(logit_BC, examples.y[index_B])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def one_by_one(models: Sequence[nn.Module], data: Sequence[Examples], plan: LocalPlan) -> None:
    for task in tasks_of(models, data, plan):
        plan.method.train(task)


def by_compiled(models: Sequence[nn.Module], data: Sequence[Examples], plan: LocalPlan) -> None:
    for task in tasks_of(models, data, plan):
        stages = compiled.stages_for(task.model, task.device)
        assert not isinstance(stages, str), stages
        plan.method.train(replace(task, fit=compiled.train))


def by_batched(models: Sequence[nn.Module], data: Sequence[Examples], plan: LocalPlan) -> None:
    tasks = list(tasks_of(models, data, plan))
    for first in range(0, len(tasks), AT_ONCE):
        for trained in batched.train_many(tasks[first : first + AT_ONCE]):
            assert not isinstance(trained, Exception), trained


def tasks_of(
    models: Sequence[nn.Module], data: Sequence[Examples], plan: LocalPlan
) -> Iterator[LocalTask]:
    for client, (model, examples) in enumerate(zip(models, data, strict=True)):
        yield LocalTask(client, model, examples, plan, torch_generator(client), CPU, {}, {})


def ceiling(case: Case, draw: torch.Generator) -> None:
    """The products of as many steps of `flat_moe`."""
    batch, pixels, dim, hidden, experts, classes = case.batch, 784, 64, 128, 8, 10
    x, h, a, y, gy = (
        torch.randn(batch, n, generator=draw) for n in (pixels, dim, hidden, dim, dim)
    )
    ga, gh, p, z = torch.empty_like(a), torch.empty_like(h), *(
        torch.randn(batch, n, generator=draw) for n in (experts, classes)
    )
    w, r, up, down, o = (
        torch.randn(*shape, generator=draw)
        for shape in ((pixels, dim), (dim, experts), (dim, hidden), (hidden, dim), (dim, classes))
    )
    gw, gr, gup, gdown, go = (torch.empty_like(t) for t in (w, r, up, down, o))
    for _ in range(case.clients * case.steps):
        torch.mm(x, w, out=h)
        torch.mm(h, r, out=p)
        torch.mm(h, up, out=a)
        torch.mm(a, down, out=y)
        torch.mm(y, o, out=z)
        torch.mm(y.t(), z, out=go)
        torch.mm(z, o.t(), out=gy)
        torch.mm(a.t(), gy, out=gdown)
        torch.mm(gy, down.t(), out=ga)
        torch.mm(h.t(), ga, out=gup)
        torch.mm(ga, up.t(), out=gh)
        torch.mm(h.t(), p, out=gr)
        torch.mm(p, r.t(), out=gh)
        torch.mm(x.t(), gh, out=gw)


def step_rows(case: Case, us: Mapping[str, float]) -> list[dict[str, object]]:
    """Each of our ways beside the plain loop and, if it is known, the ceiling."""
    return [
        {
            "case": case.name,
            "side": side,
            "peer": peer,
            "ours": round(us[side], 1),
            "theirs": round(us[peer], 1),
            "unit": "us per step",
            "ratio": round(us[peer] / us[side], 3),
        }
        for side in ("one by one", "batched", "compiled")
        if side in us
        for peer in ("eager", "ceiling")
        if peer in us
    ]


# Rounds


@dataclass(frozen=True)
class Job:
    name: str
    net: str  # as the peers call it
    factory: Callable[[], nn.Module]
    data: Callable[[float], FederatedData]  # of a share of the images
    share: float
    batch: int
    lr: float
    rounds: int  # after the first, in each turn


JOBS = {
    "cnn": Job(
        "published CNN", "cnn", dense_cnn,
        lambda share: published(0, partition="dirichlet", share=share),
        0.2, 10, 0.005, 3,
    ),
    "moe": Job(
        "small MoE", "moe", flat_moe,
        lambda share: dirichlet(0, 0.5, num_clients=100, share=share),
        1.0, 16, 0.05, 3,
    ),
}  # fmt: skip


@lru_cache(maxsize=1)
def federated(job: str, share: float) -> FederatedData:
    return JOBS[job].data(share)


@cache
def client_data(job: str, share: float, client: int) -> ClientData:
    """Kept by each process, on every side."""
    return federated(job, share).load(client)


def plan_of(job: Job) -> LocalPlan:
    return LocalPlan(lr=job.lr, batch_size=job.batch)


def ours(
    name: str, share: float, actors: int = 0, trainer: Trainer | None = None
) -> Iterator[float]:
    """Seconds of rounds; without a trainer the fastest one, which is measured before."""
    job = JOBS[name]
    clients = federated(name, share).clients
    plan, load = plan_of(job), partial(client_data, name, share)
    if trainer is None:
        trainer = choose(job.factory, load(0).train, plan)
    strategy = FedAvg(weigh=by_examples)
    start = strategy.init(split_state(job.factory()), clients)
    # From the second round on, and with one client in the closing evaluation, nothing is measured.
    schedule = Schedule(job.rounds + 2, evaluate_every=10**6, evaluate_clients=1)
    spans: list[float] = []

    def note(report: RoundReport[Any]) -> None:
        assert not report.failed and not report.refused, (report.failed, report.refused)
        if report.phase == "train":
            spans.append(report.seconds)

    def run(exchange: Exchange) -> None:
        run_rounds(strategy, start, clients, exchange, schedule, first=1, after_round=note)

    if actors:
        from fedmoe.exchange.actors import Actors
        from fedmoe.exchange.ray.exchange import in_actors

        with in_actors(
            job.factory, load, plan, 0, Actors(actors), trainer=trainer
        ) as exchange:
            run(exchange)
    else:
        run(in_process(job.factory, load, plan, 0, trainer=trainer))
    yield from spans


def flower(name: str, share: float) -> Iterator[float]:
    """Flower's FedAvg and simulation around `local.train`."""
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
    from flwr.simulation import run_simulation

    job = JOBS[name]
    clients = federated(name, share).clients
    client, server = ClientApp(), ServerApp()
    starts: list[float] = []

    @client.train()
    def work(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        number = int(context.node_config["partition-id"])
        model = job.factory()
        arrays, config = message.content["arrays"], message.content["config"]
        assert isinstance(arrays, ArrayRecord) and isinstance(config, ConfigRecord)
        model.load_state_dict(arrays.to_torch_state_dict())
        examples = client_data(name, share, number).train
        generator = torch_generator(0, int(str(config["server-round"])), number)
        _, loss = train(model, examples, plan_of(job), generator, CPU, number)
        metrics = MetricRecord({"num-examples": len(examples.y), "loss": loss})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    class Timed(FlowerFedAvg):
        def configure_train(self, *args: Any) -> Any:
            starts.append(time.perf_counter())
            return super().configure_train(*args)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            replies = list(replies)
            assert len(replies) == len(clients) and all(r.has_content() for r in replies)
            return super().aggregate_train(server_round, replies)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=len(clients),
                         min_available_nodes=len(clients))  # fmt: skip
        arrays = ArrayRecord(job.factory().state_dict())
        strategy.start(grid, arrays, num_rounds=job.rounds + 1)
        starts.append(time.perf_counter())

    run_simulation(
        server,
        client,
        num_supernodes=len(clients),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": CORES},
        },
    )
    assert len(starts) == job.rounds + 2, starts
    yield from (b - a for a, b in pairwise(starts))


def peer(which: str, name: str, share: float) -> Iterator[float]:
    """In the peers' environment, on the same clients and from the same start."""
    job = JOBS[name]
    with tempfile.TemporaryDirectory() as folder:
        clients = Path(folder) / "clients.npz"
        arrays = {f"model.{n}": t.numpy() for n, t in job.factory().state_dict().items()}
        for c in federated(name, share).clients:
            x, y = client_data(name, share, c.id).train
            arrays |= {f"{c.id}.x": x.numpy(), f"{c.id}.y": y.numpy()}
        np.savez(clients, allow_pickle=False, **arrays)
        asked = {
            "peer": which, "net": job.net, "clients": str(clients), "rounds": job.rounds + 1,
            "lr": job.lr, "batch_size": job.batch,
        }  # fmt: skip
        run = subprocess.run(
            [PEER_PYTHON, ROOT / "simulations" / "peer_training.py"],
            input=json.dumps(asked), capture_output=True, text=True, timeout=LONG_S, check=False,
        )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"{which} failed:\n{run.stderr}"[-4000:])
    yield from json.loads(run.stdout.splitlines()[-1])


SIDES: Mapping[str, Callable[[str, float], Iterator[float]]] = {
    "in process": ours,
    "1 actor": partial(ours, actors=1),
    "2 actors": partial(ours, actors=2),
    "in process, one by one": partial(ours, trainer="one-by-one"),
    "Flower": flower,
    **{which: partial(peer, which) for which in PEERS},
}
THEIRS = ("Flower", *PEERS)


def apart(side: str, job: str, share: float) -> list[float]:
    """The rounds of a side in a process of its own, the first one left out."""
    run = subprocess.run(
        # Not by -m: what actors are to call must be found by its module's name.
        [sys.executable, "-c", "from simulations.bench_training import main; main()",
         "--side", side, "--job", job, "--share", str(share)],
        cwd=ROOT, env={**os.environ, **SETTINGS, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=LONG_S, check=False,
    )  # fmt: skip
    lines = [line for line in run.stdout.splitlines() if line.startswith("[")]
    if run.returncode or not lines:
        raise RuntimeError(f"{side} failed ({run.returncode}):\n{run.stdout}\n{run.stderr}"[-8000:])
    spans: list[float] = json.loads(lines[-1])
    return spans[1:]


def round_rows(found: Mapping[tuple[str, str], Sequence[float]]) -> list[dict[str, object]]:
    """Each of our sides beside each of the others."""
    middle = {key: statistics.median(spans) for key, spans in found.items()}
    return [
        {
            "case": JOBS[job].name,
            "side": side,
            "peer": other,
            "ours": round(middle[job, side], 3),
            "theirs": round(middle[job, other], 3),
            "unit": "s per round",
            "ratio": round(middle[job, other] / middle[job, side], 3),
        }
        for job in JOBS
        for side in SIDES
        if side not in THEIRS and (job, side) in middle
        for other in THEIRS
        if (job, other) in middle
    ]


# The command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--full", action="store_true", help="all images, and more turns")
    parser.add_argument("--part", choices=("steps", "rounds"), help="only this part")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = keep_freed_memory()
    if args.side:
        print(json.dumps(list(SIDES[args.side](args.job, args.share))), flush=True)
        return
    print(", ".join(f"{name} {v}" for name, v in versions().items()), end="; ")
    print(f"one thread a process, load {os.getloadavg()[0]:.1f} at the start", flush=True)
    rows = []
    if args.part != "rounds":
        for case in STEPS:
            us = time_steps(case, case.turns * (2 if args.full else 1))
            rows += step_rows(case, us)
            told = ", ".join(f"{n} {t:.0f}" for n, t in us.items())
            print(f"{case.name:28} us per step: {told}", flush=True)
    if args.part != "steps":
        rows += rounds(args.full)
    for row in rows:
        print(f"{row['case']:28} {row['side']:22} {row['ours']:8} against {row['peer']:8} "
              f"{row['theirs']:8} {row['unit']}: x{row['ratio']}")
    if args.json:
        report = {
            "bench": "training",
            "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
            "allocator": "keeps freed memory" if kept else "default",
            "settings": SETTINGS,
            "versions": versions(),
            "rows": rows,
        }
        print(json.dumps(report))


def rounds(full: bool) -> list[dict[str, object]]:
    sides = [s for s in SIDES if s not in PEERS or PEER_PYTHON.exists()]
    if len(sides) < len(SIDES):
        print(f"{PEER_PYTHON} is missing (make peers): no rows of {' and '.join(PEERS)}")
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for turn in range(FULL_TURNS if full else 1):
        for job in JOBS:
            share = 1.0 if full else JOBS[job].share
            for side in sides:
                spans = apart(side, job, share)
                found[job, side] += spans
                told = ", ".join(f"{s:.2f}" for s in spans)
                print(f"turn {turn + 1}, {JOBS[job].name:14} {side:24} {told} s", flush=True)
    return round_rows(found)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("torch", "flwr", "ray")}
    if PEER_PYTHON.exists():
        asked = "import importlib.metadata as m; print(m.version('fluke-fl'), m.version('pfl'))"
        told = subprocess.run([PEER_PYTHON, "-c", asked], capture_output=True, text=True)
        found |= dict(zip(PEERS, told.stdout.split(), strict=False))
    return found


if __name__ == "__main__":
    main()
