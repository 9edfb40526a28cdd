"""What it costs to have clients answer, beyond their work: Flower's simulation engine and ours.

    python -m simulations.bench_overhead --json [--full]

A client sends back the array of ten numbers that it got, and does nothing else. One ServerApp and
one ClientApp, which know neither engine, run on Flower's `run_simulation` and on our grid, in one
process and on two actors of Ray. In each round the server draws who takes part, makes a message
for each, and has all their replies. Flower's engine gets what is best for it on two cores: two
actors of one CPU each, one thread in each.

Beside them stands fedmoe's own exchange: in process, where every client takes a step of training
of a model with 20 numbers, which is more than nothing; and over two actors, where it answers at
once.

Every side has fresh processes and the sides take turns; Flower's has one for each case, ours one
for all. A round counts from the draw to the last reply, and medians are compared. The first round,
with all that has to start before it (Ray too), is left out and told separately.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedmoe.exchange.grid.apps import run_apps

if TYPE_CHECKING:  # Flower's side and the grid's need no torch
    from fedmoe.types import Assignment, ClientUpdate, Exchange, MoEState

ROOT = Path(__file__).parents[1]
TURNS, FULL_TURNS = 2, 3
GRID_ROUNDS, EXCHANGE_ROUNDS = 60, 20  # after the first, in each turn
CORES = 2  # for which all sides are set up
LONG_S = 900.0
SETTINGS = {  # of every process
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "FLWR_LOG_LEVEL": "ERROR",
}


class Case(NamedTuple):
    nodes: int
    asked: int  # in each round
    rounds: int  # of Flower's engine after the first, in each turn
    by_default: bool = True

    @property
    def name(self) -> str:
        return f"{self.nodes} nodes, {self.asked} a round"


CASES = (
    Case(100, 100, 8),
    Case(1_000, 100, 6),
    Case(10_000, 100, 4),
    Case(10_000, 1_000, 1, by_default=False),
)


class Timing(NamedTuple):
    """Of one process and case."""

    first_s: float  # from nothing to the end of the first round
    rounds_s: tuple[float, ...]  # of the others


client = ClientApp()


@client.train()
def answer(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
    return Message(content, reply_to=message)


def server_of(case: Case, rounds: int, ends: list[float]) -> ServerApp:
    """A server that notes when each of its rounds has begun and ended."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < case.nodes:  # Flower's engine is still at it
            time.sleep(0.05)
        arrays = ArrayRecord({"w": Array(np.zeros(10, np.float32))})
        for number in range(rounds + 1):
            ends.append(time.perf_counter())
            content = RecordDict({"arrays": arrays, "config": ConfigRecord({"round": number})})
            nodes = random.sample(list(grid.get_node_ids()), case.asked)
            messages = [Message(content, node, "train") for node in nodes]
            replies = list(grid.send_and_receive(messages))
            assert len(replies) == case.asked and all(r.has_content() for r in replies)
            ends.append(time.perf_counter())

    return server


def timing(begun_s: float, ends: Sequence[float]) -> Timing:
    """From when rounds began and ended, in turn."""
    spans = tuple(end - start for start, end in zip(ends[::2], ends[1::2], strict=True))
    return Timing(ends[1] - begun_s, spans[1:])


# Sides: each yields a timing for each case that it is given


def flower(cases: Sequence[Case]) -> Iterator[Timing]:
    from flwr.simulation import run_simulation

    for case in cases:
        begun_s, ends = time.perf_counter(), list[float]()
        run_simulation(
            server_of(case, case.rounds, ends),
            client,
            num_supernodes=case.nodes,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": CORES},
            },
        )
        yield timing(begun_s, ends)


def grid_inline(cases: Sequence[Case]) -> Iterator[Timing]:
    for case in cases:
        yield run_on_grid(case, 0, 0.0)


def grid_actors(cases: Sequence[Case]) -> Iterator[Timing]:
    with ray_that_stays() as start_s:
        for case in cases:
            yield run_on_grid(case, CORES, start_s)


def run_on_grid(case: Case, actors: int, start_s: float) -> Timing:
    begun_s, ends = time.perf_counter() - start_s, list[float]()
    run_apps(server_of(case, GRID_ROUNDS, ends), client, case.nodes, actors=actors)
    return timing(begun_s, ends)


@contextmanager
def ray_that_stays() -> Iterator[float]:
    """Ray for all cases of a side; its seconds to start count for each."""
    from fedmoe.exchange.actors import Actors
    from fedmoe.exchange.ray.cluster import connected

    begun_s = time.perf_counter()
    with connected(Actors(CORES)):
        yield time.perf_counter() - begun_s


def exchange_inline(cases: Sequence[Case]) -> Iterator[Timing]:
    import torch
    from torch import nn

    from fedmoe.data.examples import ClientData, Examples
    from fedmoe.exchange.inprocess import in_process
    from fedmoe.federated.local import LocalPlan
    from fedmoe.state import split_state

    torch.set_num_threads(1)
    one = Examples(torch.ones(1, 9), torch.zeros(1, dtype=torch.long))
    exchange = in_process(
        lambda: nn.Linear(9, 2), lambda client: ClientData(one, one, one), LocalPlan(), seed=0
    )
    model = split_state(nn.Linear(9, 2))
    for case in cases:
        yield run_on_exchange(case, model, exchange, time.perf_counter())


def exchange_actors(cases: Sequence[Case]) -> Iterator[Timing]:
    import torch

    from fedmoe.exchange.actors import Actors
    from fedmoe.exchange.ray.exchange import over_actors
    from fedmoe.types import MoEState

    model = MoEState({"w": torch.zeros(10)}, {})
    with ray_that_stays() as start_s:
        for case in cases:
            begun_s = time.perf_counter() - start_s
            with over_actors(at_once, Actors(CORES)) as exchange:
                yield run_on_exchange(case, model, exchange, begun_s)


def at_once() -> Exchange:
    """An exchange whose clients send back what they got."""
    from fedmoe.types import ActivationProfile, ClientUpdate

    def exchange(assignments: Mapping[int, Assignment]) -> Iterator[ClientUpdate]:
        for client, assignment in assignments.items():
            profile = ActivationProfile.empty(0, 0)
            yield ClientUpdate(client, 1, assignment.model, profile, {})

    return exchange


def run_on_exchange(case: Case, model: MoEState, exchange: Exchange, begun_s: float) -> Timing:
    from fedmoe.types import Assignment, ClientFailure

    ends: list[float] = []
    for number in range(EXCHANGE_ROUNDS + 1):
        ends.append(time.perf_counter())
        clients = random.sample(range(case.nodes), case.asked)
        assignments = {c: Assignment(number, model, frozenset()) for c in clients}
        updates = list(exchange(assignments))
        assert len(updates) == case.asked
        assert not any(isinstance(u, ClientFailure) for u in updates)
        ends.append(time.perf_counter())
    return timing(begun_s, ends)


OURS: Mapping[str, Callable[[Sequence[Case]], Iterator[Timing]]] = {
    "grid, one process": grid_inline,
    "grid, 2 actors": grid_actors,
    "exchange, one process": exchange_inline,
    "exchange, 2 actors": exchange_actors,
}
QUICK = "grid, one process"
SIDES = {"Flower": flower, **OURS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--full", action="store_true", help="all cases, and more turns")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, action="append", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        for timed in SIDES[args.side]([CASES[i] for i in args.case]):
            print(json.dumps(timed), flush=True)
        return

    numbers = [i for i, case in enumerate(CASES) if args.full or case.by_default]
    for name in ("python", "flwr", "ray"):
        print(f"{name} {versions()[name]}", end=", ")
    print(f"one thread a process, load {os.getloadavg()[0]:.1f} at the start")
    found: dict[tuple[str, int], list[Timing]] = defaultdict(list)
    for turn in range(FULL_TURNS if args.full else TURNS):
        for side, some in turns_of(numbers):
            for number, timed in zip(some, apart(side, some), strict=True):
                found[side, number].append(timed)
                speed = CASES[number].asked / statistics.median(timed.rounds_s)
                print(f"turn {turn + 1}, {CASES[number].name:26} {side:22} {speed:8.0f} clients/s, "
                      f"{timed.first_s:5.1f} s with the first round", flush=True)
    rows = rows_of(found)
    for row in rows:
        print(f"{row['case']:42} {row['peer']:7} {row['side']:22} "
              f"{row['ours']:9} against {row['theirs']:8} {row['unit']}: x{row['ratio']}")
    if args.json:
        report = {
            "bench": "overhead",
            "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
            "settings": SETTINGS,
            "versions": versions(),
            "rows": rows,
        }
        print(json.dumps(report))


def turns_of(numbers: Sequence[int]) -> Iterator[tuple[str, Sequence[int]]]:
    """Sides in turn, and the cases of each: after each of Flower's the one that starts at once."""
    slow = [side for side in OURS if side != QUICK]
    for number, side in zip_longest(numbers, slow):
        if number is not None:
            yield "Flower", [number]
        yield QUICK, numbers
        if side is not None:
            yield side, numbers


def apart(side: str, numbers: Sequence[int]) -> list[Timing]:
    """Time a side in a process of its own."""
    command = [sys.executable, "-m", "simulations.bench_overhead", "--side", side]
    command += [word for number in numbers for word in ("--case", str(number))]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **SETTINGS},
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("[")]
    if run.returncode or len(lines) != len(numbers):
        raise RuntimeError(f"{side} failed ({run.returncode}):\n{run.stdout}\n{run.stderr}"[-8000:])
    return [Timing(first, tuple(others)) for first, others in map(json.loads, lines)]


def rows_of(found: Mapping[tuple[str, int], Sequence[Timing]]) -> list[dict[str, object]]:
    """Each of our sides beside Flower's engine: clients per second, and how long a start takes."""
    rows = []
    for (side, number), timed in sorted(found.items(), key=lambda item: item[0][1]):
        if side == "Flower":
            continue
        case, peer = CASES[number], found["Flower", number]
        ours, theirs = (
            case.asked / statistics.median(s for t in timings for s in t.rounds_s)
            for timings in (timed, peer)
        )
        rows.append(_row(case.name, side, ours, theirs, "clients/s", ours / theirs))
        ours, theirs = (statistics.median(t.first_s for t in timings) for timings in (timed, peer))
        rows.append(_row(f"{case.name}, first", side, ours, theirs, "s", theirs / ours))
    return rows


def _row(
    case: str, side: str, ours: float, theirs: float, unit: str, ratio: float
) -> dict[str, object]:
    return {
        "case": case,
        "side": side,
        "peer": "Flower",
        "ours": round(ours, 2 if unit == "s" else 1),
        "theirs": round(theirs, 2 if unit == "s" else 1),
        "unit": unit,
        "ratio": round(ratio, 2),
    }


def versions() -> dict[str, str]:
    packages = ("flwr", "ray", "numpy", "torch")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


if __name__ == "__main__":
    main()
