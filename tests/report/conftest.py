"""Runs to report on: small ones to work by hand, and a seeded set that looks like real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedmoe.report.log import ClientAccuracy, ClientEntry, RoundRecord, Run, RunInfo, RunLog
from fedmoe.types import Change, ClientFailure, ExpertId

MIB = 2**20
GROUPS = ("clipart", "painting", "photo", "sketch")


def make_info(
    method: str = "fedmoe",
    seed: int = 0,
    rounds: int = 2,
    num_experts_L: Sequence[int] = (4,),
    num_clients: int = 2,
) -> RunInfo:
    """A run's start; clients 0, 1, ... with 100 examples of each part."""
    return RunInfo(
        experiment="tiny",
        method=method,
        seed=seed,
        rounds=rounds,
        num_experts_L=num_experts_L,
        num_classes=10,
        partition_hash=f"part{seed}",
        versions={"fedmoe": "0.1.0"},
        machine={"cores": 2},
        model_parameters=1000,
        full_bytes=4000,
        clients=tuple(ClientEntry(i, None, None, 100, 100, 100) for i in range(num_clients)),
    )


def make_record(round: int, phase: str = "train") -> RoundRecord:
    """A round in which nothing happened; change it with dataclasses.replace."""
    return RoundRecord(round=round, phase=phase, seconds=1.0, bytes_down=0, bytes_up=0)


def realistic_run(method: str, seed: int, num_clients: int, num_experts: int, rounds: int) -> Run:
    """A made-up run of the right look: curves that level off, groups with their own experts."""
    kinds = {  # final accuracy, rate, gain of local training, experts held, merged model's accuracy
        "fedmoe": (0.84, 0.10, 0.02, 5, 0.66),
        "random-sub-moe": (0.70, 0.07, 0.05, 5, 0.52),
        "fedavg": (0.66, 0.09, 0.11, num_experts, 0.67),
        "fedprox": (0.67, 0.08, 0.09, num_experts, 0.68),
        "local": (0.12, 0.30, 0.57, num_experts, 0.11),
    }
    top, rate, gain, num_held, top_global = kinds[method]
    rng = np.random.default_rng([seed, sorted(kinds).index(method)])
    per_group = -(-num_clients // len(GROUPS))
    groups = [GROUPS[c // per_group] for c in range(num_clients)]
    expert_bytes, rest_bytes = 260_000, 1_500_000
    taste = np.full((len(GROUPS), num_experts), 0.15)
    for g in range(len(GROUPS)):
        taste[g, [(g * num_experts // 4 + j) % num_experts for j in range(5)]] += [
            2,
            1.5,
            1,
            0.7,
            0.5,
        ]
    taste[:, num_experts - 3] = 0.0 if method == "fedmoe" else 0.02
    ease = np.repeat(np.array([0.05, -0.02, 0.03, -0.08]), per_group)[:num_clients]
    ease = ease + rng.normal(0, 0.025, num_clients)
    use = np.stack([rng.dirichlet(taste[GROUPS.index(g)] * 4 + 1e-3) for g in groups])

    def choose(client: int) -> set[int]:
        if method == "random-sub-moe":
            return set(rng.permutation(num_experts)[:num_held].tolist())
        count = num_held + int(rng.integers(-1, 2)) if num_held < num_experts else num_experts
        return set(np.argsort(-use[client])[:count].tolist())

    everything = set(range(num_experts))
    held = {c: everything if method == "fedmoe" else choose(c) for c in range(num_clients)}
    frozen: set[int] = set()
    trial: dict[int, set[int]] = {}
    records = []
    for r in range(rounds + 1):
        phase = "final" if r == rounds else "explore" if method == "fedmoe" and r < 2 else "train"
        part = sorted(rng.permutation(num_clients)[: max(2, num_clients * 2 // 3)].tolist())
        part = list(range(num_clients)) if phase != "train" or r == 2 else part
        changes: list[Change] = []
        failed = []
        if method == "fedmoe" and phase == "train":
            if r == 2:
                held = {c: choose(c) for c in range(num_clients)}
                changes = [_change(c, "choose", held[c]) for c in part]
            else:
                for c in part:
                    changes += _adjust(c, held, frozen, trial, use[c], rng)
        if phase == "train" and rng.random() < 0.08:
            lost = part.pop(int(rng.integers(len(part))))
            failed.append(ClientFailure(lost, "no answer within 120 s"))
        count = {}
        for c in part if phase != "final" else []:
            share = np.array([use[c, e] if e in held[c] else 0.0 for e in range(num_experts)])
            share[num_experts - 3] = 0 if method == "fedmoe" else share[num_experts - 3]
            share = share + (1e-4 if share.sum() == 0 else 0)
            count[c] = [rng.multinomial(4000, share / share.sum()).tolist()]
        sent = sum(rest_bytes + expert_bytes * len(held[c]) for c in part)
        silent = method == "local" and phase != "final"
        accuracy = None
        if r % 4 == 0 or phase == "final":
            grown = 1 - np.exp(-rate * r)
            accuracy = {}
            for c in range(num_clients):
                received = 0.1 + (top - 0.1 + ease[c]) * grown
                trained = received + gain * (1 - np.exp(-rate * (r + 3))) + (r == 0) * 0.2
                values = np.clip(rng.normal([received] * 2 + [trained] * 2, 0.012), 0, 1)
                accuracy[c] = ClientAccuracy(*np.round(values, 4).tolist())
        records.append(
            RoundRecord(
                round=r,
                phase=phase,
                seconds=float(rng.uniform(2.5, 4.0)),
                bytes_down=0 if silent else sent,
                bytes_up=0 if silent or phase == "final" else sent,
                bytes_once=sent if phase == "explore" and r == 0 else 0,
                clients=part,
                failed=failed,
                refused=[ClientFailure(num_clients - 1, "needs 5.5 MiB, has 4.0 MiB")]
                if method == "fedavg" and r == 0
                else [],
                loss=float(2.3 * np.exp(-rate * r) + 0.4),
                held={c: [sorted(held[c])] for c in part},
                count=count,
                changes=changes,
                accuracy=accuracy,
                global_accuracy=float(0.1 + (top_global - 0.1) * (1 - np.exp(-rate * r)))
                if accuracy
                else None,
                memory_bytes={c: 3 * (rest_bytes + expert_bytes * len(held[c])) for c in part},
                model_hash=f"{r:08x}",
            )
        )
    info = replace(
        make_info(method, seed, rounds, (num_experts,), num_clients),
        experiment="four-domains",
        partition_hash=f"9f31c07ab2e{seed}",
        versions={"fedmoe": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
        machine={"cpu": "x86_64", "cores": 2, "memory_gib": 8},
        full_bytes=rest_bytes + expert_bytes * num_experts,
        model_parameters=(rest_bytes + expert_bytes * num_experts) // 4,
        clients=tuple(
            ClientEntry(c, groups[c], (4 + 2 * (c % 3)) * MIB, 400, 100, 100)
            for c in range(num_clients)
        ),
    )
    return Run(info, records)


def _adjust(
    client: int,
    held: dict[int, set[int]],
    frozen: set[int],
    trial: dict[int, set[int]],
    use: np.ndarray,
    rng: np.random.Generator,
) -> list[Change]:
    """What a client that no longer improves might do: add, drop, take it back, stop."""
    if client in frozen or rng.random() > 0.12:
        return []
    if client in trial:
        before = trial.pop(client)
        if rng.random() < 0.4:
            undone = held[client] ^ before
            held[client] = before
            frozen.add(client)
            return [_change(client, "revert", undone), _change(client, "freeze", before)]
        return []
    trial[client] = set(held[client])
    rest = [e for e in np.argsort(-use).tolist() if e not in held[client]]
    if rng.random() < 0.45 and rest:
        added = set(rest[: int(rng.integers(1, 3))])
        held[client] = held[client] | added
        return [_change(client, "add", added)]
    dropped = {min(held[client], key=lambda e: float(use[e]))}
    held[client] = held[client] - dropped
    return [_change(client, "drop", dropped)]


def _change(client: int, action: str, experts: set[int]) -> Change:
    return Change(client, action, tuple(ExpertId(0, e) for e in sorted(experts)))


def realistic_runs(
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = ("fedavg", "fedmoe", "fedprox", "local", "random-sub-moe"),
    num_clients: int = 24,
    num_experts: int = 16,
    rounds: int = 40,
) -> list[Run]:
    return [realistic_run(m, s, num_clients, num_experts, rounds) for m in methods for s in seeds]


def write_runs(runs: Sequence[Run], root: Path) -> None:
    """Put runs on disk the way a runner does, round by round."""
    for run in runs:
        log = RunLog.create(root / f"{run.info.method}-seed{run.info.seed}", run.info)
        for record in run.rounds:
            log.append(record)


@pytest.fixture
def info() -> Callable[..., RunInfo]:
    return make_info


@pytest.fixture
def record() -> Callable[..., RoundRecord]:
    return make_record


@pytest.fixture
def on_disk() -> Callable[[Sequence[Run], Path], None]:
    return write_runs


@pytest.fixture(scope="session")
def few_runs() -> list[Run]:
    """Three methods, three seeds, small enough for milliseconds."""
    return realistic_runs(methods=("fedavg", "fedmoe", "local"), num_clients=8, rounds=8)


@pytest.fixture(scope="session")
def many_runs() -> list[Run]:
    """Five methods, three seeds, 24 clients in four groups, 16 experts, 40 rounds."""
    return realistic_runs()
