"""What a round costs by how many clients are registered, of whom 100 take part.

    python -m simulations.bench_population --json [--full]

1,000 to 1,000,000 clients of *crowd* are registered. Each size has a process of its own; they take
turns, round by round, so that whatever else the machine does is spread over all. A round is a whole
one of `run_experiment`: sampling, questions, choices, messages measured, averages, the log and the
checkpoint on disk. Times are medians of CPU time after the first round, which also imports and
measures what is measured once.

- server: clients answer at once, so that what is left is the server's. FedMoE with newcomers only,
  as nearly all are among a million; FedAvg.
- clients: FedMoE as it is, newcomers who scout and train a small CNN.
- known: 1,000,000 registered, of whom so many have taken part before; those who take part now have.

Memory is the peak of each process, and what it grows by for each client that is registered; that
is left out where as much as is allowed would be lost in what peaks of equal processes differ by.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmoe.device import keep_freed_memory
from fedmoe.experiments.crowd import crowd
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import run_experiment
from fedmoe.federated.fedmoe import FedMoE, FedMoEState, Progress
from fedmoe.federated.rounds import Schedule
from fedmoe.report.log import RoundRecord
from fedmoe.table import Form, Table
from fedmoe.types import (
    ActivationProfile,
    Assignment,
    ClientInfo,
    ClientUpdate,
    Job,
    MoEState,
    SubMoE,
)

SIZES = (1_000, 10_000, 100_000, 1_000_000)
KNOWN = (1_000, 100_000)  # who have taken part before
PER_ROUND = 100
EXPERTS = 16  # of the model of *crowd*, in one layer
TURNS = 10  # newcomers are drawn from a tenth of all clients each round, so for as many rounds
LIMIT = 200  # bytes a client that memory may grow by
NOISE = 16 * 2**20  # bytes by which peaks of two equal processes may differ


@dataclass(frozen=True)
class Newcomers(Schedule):
    """Draws each round from another tenth of the clients: nobody takes part twice."""

    def participants(self, round: int, clients: Sequence[ClientInfo]) -> list[ClientInfo]:
        return super().participants(round, clients[round % TURNS :: TURNS])


@dataclass(frozen=True)
class Known(Schedule):
    """Draws from the first `first` clients."""

    first: int = field(default=0, kw_only=True)

    def participants(self, round: int, clients: Sequence[ClientInfo]) -> list[ClientInfo]:
        return super().participants(round, clients[: self.first])


@dataclass(frozen=True)
class Experienced(FedMoE):
    """FedMoE as it stands after the first `first` clients have taken part."""

    first: int = field(default=0, kw_only=True)

    def init(self, model: MoEState, clients: Sequence[ClientInfo]) -> FedMoEState:
        experts = tuple(sorted(model.experts))
        rng, shape = np.random.default_rng(self.seed), (1, len(experts))
        ids = np.arange(self.first)
        share_KLE = rng.dirichlet(np.ones(len(experts)), self.first)[:, None]
        held = np.argsort(-share_KLE[:, 0])[:, : len(experts) // 4]
        chosen_KE = np.zeros((self.first, len(experts)), bool)
        np.put_along_axis(chosen_KE, held, True, axis=1)
        p, seen = (Form(torch.Tensor, dtype=d, shape=shape) for d in ("float32", "int32"))
        masks, progress = Form(SubMoE, experts), Form(Progress, experts)
        numbers = np.zeros(self.first, progress.row)
        numbers["value"]["best"] = 0.5
        state = replace(
            super().init(model, clients),
            round=self.explore_rounds,
            p=Table.from_rows(p, ids, share_KLE.astype("f4").view(p.row).reshape(-1)),
            seen=Table.from_rows(seen, ids, np.zeros(self.first, seen.row)),
            whole=Table.from_rows(Form(bool), ids, np.zeros(self.first, Form(bool).row)),
            sub_moes=Table.from_rows(
                masks, ids, np.packbits(chosen_KE, axis=1).view(masks.row).reshape(-1)
            ),
            progress=Table.from_rows(progress, ids, numbers),
        )
        groups = {k: k % 4 for k in range(self.first)}
        kin = Table.of(Form(int), groups)
        return replace(state, kin=kin, shared=dict.fromkeys(range(4), model.shared))


@dataclass(frozen=True)
class Case:
    """One process: how many are registered, and what they do."""

    kind: str  # "server, FedMoE", "server, FedAvg", "clients, FedMoE" or "known"
    registered: int
    known: int = 0

    @property
    def trivial(self) -> bool:
        return self.kind != "clients, FedMoE"

    def experiment(self, rounds: int) -> Experiment:
        """What its process runs."""
        method = "fedavg" if self.kind == "server, FedAvg" else "fedmoe"
        made = crowd(0, rounds, clients=self.registered, per_round=PER_ROUND)[method]
        schedule = Schedule(rounds, 0, PER_ROUND, evaluate_every=rounds + 1, evaluate_clients=1)
        if self.known:
            return replace(
                made,
                strategy=Experienced(**vars(made.strategy), first=self.known),
                schedule=Known(**vars(schedule), first=self.known),
            )
        if isinstance(made.strategy, FedMoE):
            return replace(made, schedule=Newcomers(**vars(schedule)))
        return replace(made, schedule=schedule)


@dataclass(frozen=True)
class Measured:
    """Of one round of one process."""

    cpu_s: float
    wall_s: float
    taking_part: int
    peak_bytes: int  # so far


class SeenEnoughError(Exception):
    """The parent has; the run is not gone on with."""


def at_once(assignments: Mapping[int, Assignment]) -> Iterator[ClientUpdate]:
    """Clients that use their experts in a way of their own, and send back what they got."""
    for client, a in assignments.items():
        score_LE = torch.from_numpy(np.random.default_rng(client).random((1, EXPERTS)))
        if a.job is Job.SCOUT:
            count_LE = torch.full((1, EXPERTS), 10)
            update, metrics = MoEState({}, {}), {}
        else:
            count_LE = torch.zeros(1, EXPERTS, dtype=torch.int64)
            for e in a.sub_moe:
                count_LE[0, e.expert] = 20
            update, metrics = a.model, {"loss": 1.0, "trained_validation": 0.5}
        profile = ActivationProfile(count_LE, score_LE, score_LE, count_LE.sum(1))
        yield ClientUpdate(client, 40, update, profile, metrics)


def work(case: Case, rounds: int, pipe: Connection) -> None:
    """Run a case in this process, a round whenever the parent says so."""
    keep_freed_memory()
    torch.set_num_threads(1)
    before = [time.process_time(), time.perf_counter()]

    def told(record: RoundRecord) -> None:
        now = [time.process_time(), time.perf_counter()]
        cpu_s, wall_s = (a - b for a, b in zip(now, before, strict=True))
        pipe.send(Measured(cpu_s, wall_s, len(record.clients), peak_bytes()))
        if not pipe.recv():
            raise SeenEnoughError
        before[:] = [time.process_time(), time.perf_counter()]

    with tempfile.TemporaryDirectory() as folder, suppress(SeenEnoughError):
        run_experiment(
            case.experiment(rounds),
            Path(folder) / "run",
            on_round=told,
            exchange=(lambda on_client: at_once) if case.trivial else None,
            trainer="compiled",
        )


def peak_bytes() -> int:
    """The most memory that this process has had; getrusage would also know its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status does not tell VmHWM")


def in_turns(cases: Sequence[Case], rounds: int) -> dict[Case, list[Measured]]:
    """So many rounds of each case after its first, one case at a time."""
    context = get_context("spawn")
    found: dict[Case, list[Measured]] = {case: [] for case in cases}
    with ExitStack() as stack:
        pipes = {}
        for case in cases:  # each starts and runs its first round alone
            here, there = context.Pipe()
            process = context.Process(target=work, args=(case, rounds + 1, there), daemon=True)
            process.start()
            there.close()
            stack.callback(process.join)
            stack.callback(here.close)
            found[case].append(here.recv())
            pipes[case] = here
        for turn in range(rounds):
            order = cases if turn % 2 == 0 else cases[::-1]
            for case in order:
                pipes[case].send(True)
                found[case].append(pipes[case].recv())
        for pipe in pipes.values():
            pipe.send(False)
    return found


def time_rows(found: Mapping[Case, Sequence[Measured]], told: str) -> list[dict[str, Any]]:
    """Each case against the first of its kind; `told` names what differs."""
    first = next(iter(found))
    base = median(found[first], lambda m: m.cpu_s)
    rows = []
    for case, measured in found.items():
        ours = median(measured, lambda m: m.cpu_s)
        rows.append(
            {
                "case": f"{case.kind}: {getattr(case, told):,} {told}",
                "peer": f"{getattr(first, told):,} {told}",
                "ours": ours,
                "theirs": base,
                "unit": "s of CPU a round",
                "ratio": base / ours,
                "wall_s": median(measured, lambda m: m.wall_s),
                "first_s": measured[0].wall_s,
                "rounds": len(measured) - 1,
            }
        )
    return rows


def memory_rows(found: Mapping[Case, Sequence[Measured]]) -> list[dict[str, Any]]:
    """By how much peaks grow over that of the smallest case; None where that is noise."""
    first = next(iter(found))
    base = found[first][-1].peak_bytes
    rows = []
    for case, measured in found.items():
        peak = measured[-1].peak_bytes
        grown = None
        if abs(peak - base) > NOISE or case.registered * LIMIT > NOISE:
            grown = (peak - base) / (case.registered - first.registered)
        rows.append(
            {
                "case": f"memory, {case.kind}: {case.registered:,} registered",
                "peer": "limit",
                "ours": grown,
                "theirs": LIMIT,
                "unit": "bytes a client",
                "ratio": None if grown is None else LIMIT / max(grown, 1.0),
                "peak_bytes": peak,
            }
        )
    return rows


def median(measured: Sequence[Measured], value: Callable[[Measured], float]) -> float:
    """Over the rounds after the first."""
    return statistics.median(value(m) for m in measured[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--full", action="store_true", help="more rounds of each")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that are started
    quick, slow = (TURNS - 1, TURNS - 1) if options.full else (TURNS - 1, 4)
    rows: list[dict[str, Any]] = []
    for kind, rounds in (
        ("server, FedMoE", quick), ("server, FedAvg", quick), ("clients, FedMoE", slow)
    ):
        found = in_turns([Case(kind, size) for size in SIZES], rounds)
        rows += time_rows(found, "registered")
        if kind != "server, FedAvg":
            rows += memory_rows(found)
        show(rows[-2 * len(SIZES) :] if kind != "server, FedAvg" else rows[-len(SIZES) :])
    cases = [Case("known", SIZES[-1], known) for known in KNOWN]
    rows += time_rows(in_turns(cases, quick), "known")
    show(rows[-len(KNOWN) :])
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": 1}
    versions = {n: version(n) for n in ("torch", "numpy")} | {"python": platform.python_version()}
    print(f"{machine} {versions}")
    if options.json:
        report = {
            "bench": "population", "machine": machine, "versions": versions, "rows": rows
        }
        print(json.dumps(report))


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        if row["unit"] == "bytes a client":
            grown = "-" if row["ours"] is None else f"{row['ours']:.0f}"
            print(f"{row['case']:52} {row['peak_bytes'] / 2**20:8.0f} MiB  {grown:>5} bytes each")
        else:
            print(
                f"{row['case']:52} {row['ours']:8.3f} s CPU {row['wall_s']:8.3f} s  "
                f"x{row['ours'] / row['theirs']:.2f}  start {row['first_s']:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
