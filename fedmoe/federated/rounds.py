"""The federated loop, the same in a unit test, on a Ray cluster and over Flower."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic

from fedmoe.federated.check import RefusedUpdateError, check_update
from fedmoe.rng import numpy_generator
from fedmoe.types import (
    ActivationProfile,
    Assignment,
    Change,
    ClientFailure,
    ClientInfo,
    ClientUpdate,
    Exchange,
    Job,
    MoEState,
    S,
    Strategy,
    SubMoE,
)

SAMPLING = 0  # keys the generator that samples clients; clients' own keys are (round, client)


@dataclass
class RoundReport(Generic[S]):
    """What happened in one round, for logs; `state` is the one after it."""

    round: int
    phase: str  # "explore", "train" or "final"
    state: S
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    held: dict[int, SubMoE] = field(default_factory=dict)
    profiles: dict[int, ActivationProfile] = field(default_factory=dict)
    metrics: dict[int, Mapping[str, float]] = field(default_factory=dict)
    num_examples: dict[int, int] = field(default_factory=dict)
    failed: list[ClientFailure] = field(default_factory=list)
    refused: list[ClientFailure] = field(default_factory=list)
    changes: Sequence[Change] = ()


@dataclass(frozen=True)
class Schedule:
    """Which rounds run, who takes part, and when accuracies are measured."""

    rounds: int
    seed: int = 0
    clients_per_round: int | None = None  # None: all of them
    evaluate_every: int = 1  # rounds between evaluations; the last state is always evaluated

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1, got {self.evaluate_every}")
        if self.clients_per_round is not None and self.clients_per_round < 1:
            raise ValueError(f"clients_per_round must be at least 1, got {self.clients_per_round}")

    def participants(self, round: int, clients: Sequence[ClientInfo]) -> list[ClientInfo]:
        """This round's clients, in order of id; every draw keyed by (seed, round).

        Raises:
            ValueError: more are wanted than there are.
        """
        ordered = sorted(clients, key=lambda c: c.id)
        if self.clients_per_round is None:
            return ordered
        if self.clients_per_round > len(ordered):
            raise ValueError(
                f"clients_per_round must be at most the {len(ordered)} clients, "
                f"got {self.clients_per_round}"
            )
        chosen = numpy_generator(self.seed, round, SAMPLING, SAMPLING).choice(
            len(ordered), self.clients_per_round, replace=False
        )
        return [ordered[i] for i in sorted(chosen)]


Measure = Callable[[Assignment | ClientUpdate], int]  # bytes on the wire


def run_rounds(
    strategy: Strategy[S],
    state: S,
    clients: Sequence[ClientInfo],
    exchange: Exchange,
    schedule: Schedule,
    *,
    first: int = 0,
    measure: Measure = lambda message: 0,
    prepare: Callable[[Assignment], Assignment] = lambda assignment: assignment,
    after_round: Callable[[RoundReport[S]], None] = lambda report: None,
) -> S:
    """Assign, exchange, aggregate; at last evaluate what every client would then be given.

    A client that fails, or whose update is refused, is left out of its round and counted; the
    run goes on. An update is folded as it arrives.

    Args:
        first: the round to begin with, when `state` comes from a checkpoint.
        prepare: a last change to what goes down, such as leaving out personal parameters.

    Returns:
        The state after the last round.
    """
    for round in range(first, schedule.rounds):
        evaluate = round % schedule.evaluate_every == 0
        assignments = {
            client: prepare(replace(a, evaluate=evaluate and a.job is Job.TRAIN))
            for client, a in strategy.assign(
                state, schedule.participants(round, clients)
            ).items()
        }
        report = RoundReport(round, strategy.phase(state), state)
        started = time.perf_counter()
        updates = _accepted(exchange, assignments, strategy.merged(state), report, measure)
        state = strategy.aggregate(state, updates)
        for _ in updates:  # a strategy that does not train reads none; let the clients finish
            pass
        report.state, report.changes = state, strategy.changes(state)
        report.seconds = time.perf_counter() - started
        after_round(report)

    if first <= schedule.rounds:
        everyone = sorted(clients, key=lambda c: c.id)
        report = RoundReport(schedule.rounds, "final", state)
        started = time.perf_counter()
        model, given = strategy.merged(state), strategy.assign(state, everyone)
        if late := {k: prepare(a) for k, a in given.items() if a.job is Job.SCOUT}:
            # Who was never sampled holds nothing yet: it scouts first, as in a round to come.
            updates = _accepted(exchange, late, model, report, measure)
            settled = strategy.aggregate(state, updates)
            report.changes = strategy.changes(settled)
            given = strategy.assign(settled, everyone)
        assignments = {}
        for client, a in given.items():
            if a.job is Job.TRAIN:
                a = replace(a, job=Job.EVALUATE, evaluate=True, round=schedule.rounds)
                assignments[client] = prepare(a)
            elif all(client != f.client for f in (*report.failed, *report.refused)):
                report.failed.append(ClientFailure(client, "has been given no experts yet"))
        for _ in _accepted(exchange, assignments, model, report, measure):
            pass
        report.seconds = time.perf_counter() - started
        after_round(report)
    return state


def _accepted(
    exchange: Exchange,
    assignments: Mapping[int, Assignment],
    model: MoEState | None,
    report: RoundReport[S],
    measure: Measure,
) -> Iterator[ClientUpdate]:
    """The updates that may be folded, as they arrive; the rest is written into `report`."""
    report.held |= {client: a.sub_moe for client, a in assignments.items()}
    report.bytes_down += sum(measure(a) for a in assignments.values())
    answered: set[int] = set()
    for reply in exchange(assignments):
        if isinstance(reply, ClientFailure):
            report.failed.append(reply)
            continue
        report.bytes_up += measure(reply)
        try:
            if reply.client not in assignments:
                raise RefusedUpdateError(f"client {reply.client}: was not asked this round")
            if reply.client in answered:
                raise RefusedUpdateError(f"client {reply.client}: has answered this round already")
            assignment = assignments[reply.client]
            check_update(reply, assignment, assignment.model if model is None else model)
        except RefusedUpdateError as why:
            report.refused.append(ClientFailure(reply.client, str(why)))
            continue
        answered.add(reply.client)
        report.profiles[reply.client] = reply.profile
        report.metrics[reply.client] = reply.metrics
        report.num_examples[reply.client] = reply.num_examples
        yield reply
    for client in sorted(set(assignments) - answered):
        if all(client != f.client for f in (*report.failed, *report.refused)):
            report.failed.append(ClientFailure(client, "no answer"))
