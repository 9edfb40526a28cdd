"""The federated loop, the same in a unit test, on a Ray cluster and over Flower."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, cast

from fedmoe.federated.check import RefusedUpdateError, check_update
from fedmoe.rng import numpy_generator
from fedmoe.state import parameter_bytes
from fedmoe.types import (
    ActivationProfile,
    AskingStrategy,
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
DROPPING_OUT = 1  # and the one that says which of them drop out


@dataclass
class RoundReport(Generic[S]):
    """What happened in one round, for logs; `state` is the one after it."""

    round: int
    phase: str  # "explore", "train" or "final"
    state: S
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_once: int = 0  # the part of bytes_down that is never sent to the same client again
    held: dict[int, SubMoE] = field(default_factory=dict)
    profiles: dict[int, ActivationProfile] = field(default_factory=dict)
    metrics: dict[int, Mapping[str, float]] = field(default_factory=dict)
    num_examples: dict[int, int] = field(default_factory=dict)
    failed: list[ClientFailure] = field(default_factory=list)
    refused: list[ClientFailure] = field(default_factory=list)
    changes: Sequence[Change] = ()
    unseen: dict[int, Mapping[str, float]] = field(default_factory=dict)  # served at the end


@dataclass(frozen=True)
class Schedule:
    """Which rounds run, who takes part, and when accuracies are measured.

    `quotas` has sets of clients, and how many of each take part in a round: for methods whose
    clients have parts to play. `drop_out` is the chance that a client which was sampled and sent
    its assignment never answers, a round's clients each on their own.
    """

    rounds: int
    seed: int = 0
    clients_per_round: int | None = None  # None: all of them
    evaluate_every: int = 1  # rounds between evaluations; the last state is always evaluated
    drop_out: float = 0.0
    quotas: tuple[tuple[frozenset[int], int], ...] = ()  # in place of clients_per_round

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1, got {self.evaluate_every}")
        if self.clients_per_round is not None and self.clients_per_round < 1:
            raise ValueError(f"clients_per_round must be at least 1, got {self.clients_per_round}")
        if self.quotas and self.clients_per_round is not None:
            raise ValueError(
                f"clients_per_round must be None where there are quotas, got "
                f"{self.clients_per_round}"
            )
        for group, count in self.quotas:
            if not 0 <= count <= len(group):
                raise ValueError(
                    f"quotas must be from 0 to the number of clients they are of, got {count} of "
                    f"{len(group)}"
                )
        if not 0 <= self.drop_out < 1:
            raise ValueError(f"drop_out must be at least 0 and below 1, got {self.drop_out}")

    def participants(self, round: int, clients: Sequence[ClientInfo]) -> list[ClientInfo]:
        """This round's clients, in order of id; every draw keyed by (seed, round).

        Raises:
            ValueError: more are wanted than there are, or a quota is of a client that is not.
        """
        ordered = sorted(clients, key=lambda c: c.id)
        if self.quotas:
            return self._by_quota(round, ordered)
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

    def _by_quota(self, round: int, ordered: Sequence[ClientInfo]) -> list[ClientInfo]:
        chosen: set[int] = set()
        for place, (group, count) in enumerate(self.quotas):
            if strangers := group - {c.id for c in ordered}:
                raise ValueError(
                    f"quotas must be of the {len(ordered)} clients that train, got client "
                    f"{min(strangers)} ({len(strangers)} such in all)"
                )
            rng = numpy_generator(self.seed, round, SAMPLING, SAMPLING, place)
            chosen |= {int(c) for c in rng.choice(sorted(group), count, replace=False)}
        return [c for c in ordered if c.id in chosen]

    def drop_outs(self, round: int, clients: Sequence[ClientInfo]) -> frozenset[int]:
        """Who of a round's clients will not answer; every draw keyed by (seed, round, client)."""
        if not self.drop_out:
            return frozenset()
        return frozenset(
            c.id
            for c in clients
            if numpy_generator(self.seed, round, c.id, DROPPING_OUT).random() < self.drop_out
        )


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
    unseen: Sequence[ClientInfo] = (),
) -> S:
    """Assign, exchange, aggregate; at last evaluate what every client would then be given.

    A client that fails, or whose update is refused, is left out of its round and counted; the
    run goes on. An update is folded as it arrives.

    Args:
        first: the round to begin with, when `state` comes from a checkpoint.
        prepare: a last change to what goes down, such as leaving out personal parameters.
        unseen: clients that take part in no round. At the end each is served what the strategy
            gives it, just in time, and says how good that is as it came; `init` must know them.

    Returns:
        The state after the last round.
    """
    for round in range(first, schedule.rounds):
        evaluate = round % schedule.evaluate_every == 0
        taking_part = schedule.participants(round, clients)
        report = RoundReport(round, strategy.phase(state), state)
        started = time.perf_counter()
        reached = _but_for(exchange, schedule.drop_outs(round, taking_part))
        state = _asked(strategy, state, taking_part, reached, report, measure, prepare)
        answering = [c for c in taking_part if c.id not in _lost(report)]
        assignments = {
            client: prepare(replace(a, evaluate=evaluate and a.job is Job.TRAIN))
            for client, a in strategy.assign(state, answering).items()
        }
        updates = _accepted(reached, assignments, strategy.merged(state), report, measure)
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
        given = _given(strategy, state, everyone, exchange, report, measure, prepare)
        assignments = {
            client: prepare(replace(a, job=Job.EVALUATE, evaluate=True, round=schedule.rounds))
            for client, a in given.items()
        }
        model = strategy.merged(state)
        for _ in _accepted(exchange, assignments, model, report, measure):
            pass
        if unseen:
            report.unseen = _served(
                strategy, state, unseen, exchange, schedule.rounds, measure, prepare
            )
        report.seconds = time.perf_counter() - started
        after_round(report)
    return state


def _but_for(exchange: Exchange, silent: frozenset[int]) -> Exchange:
    """The exchange, where these clients never answer."""
    if not silent:
        return exchange

    def reached(
        assignments: Mapping[int, Assignment],
    ) -> Iterator[ClientUpdate | ClientFailure]:
        for client in sorted(silent & assignments.keys()):
            yield ClientFailure(client, "dropped out")
        yield from exchange({k: a for k, a in assignments.items() if k not in silent})

    return reached


def _lost(report: RoundReport[S]) -> set[int]:
    return {f.client for f in (*report.failed, *report.refused)}


def _asked(
    strategy: Strategy[S],
    state: S,
    clients: Sequence[ClientInfo],
    exchange: Exchange,
    report: RoundReport[S],
    measure: Measure,
    prepare: Callable[[Assignment], Assignment],
) -> S:
    """The state once the strategy has heard what it asks before it assigns, if it asks at all."""
    if not hasattr(strategy, "ask"):
        return state
    asking = cast(AskingStrategy[S], strategy)
    questions = {k: prepare(a) for k, a in asking.ask(state, clients).items()}
    if not questions:
        return state
    answers = _accepted(exchange, questions, strategy.merged(state), report, measure)
    state = asking.heard(state, answers)
    for _ in answers:
        pass
    return state


def _given(
    strategy: Strategy[S],
    state: S,
    clients: Sequence[ClientInfo],
    exchange: Exchange,
    report: RoundReport[S],
    measure: Measure,
    prepare: Callable[[Assignment], Assignment],
) -> dict[int, Assignment]:
    """What every client would be given to train next. Who holds nothing yet scouts first."""
    state = _asked(strategy, state, clients, exchange, report, measure, prepare)
    clients = [c for c in clients if c.id not in _lost(report)]
    given = strategy.assign(state, clients)
    if late := {k: prepare(a) for k, a in given.items() if a.job is Job.SCOUT}:
        updates = _accepted(exchange, late, strategy.merged(state), report, measure)
        settled = strategy.aggregate(state, updates)
        report.changes = strategy.changes(settled)
        given = strategy.assign(settled, clients)
    for c in clients:
        if (c.id not in given or given[c.id].job is not Job.TRAIN) and c.id not in _lost(report):
            report.failed.append(ClientFailure(c.id, "has been given no experts yet"))
    return {k: a for k, a in given.items() if a.job is Job.TRAIN}


def _served(
    strategy: Strategy[S],
    state: S,
    clients: Sequence[ClientInfo],
    exchange: Exchange,
    round: int,
    measure: Measure,
    prepare: Callable[[Assignment], Assignment],
) -> dict[int, Mapping[str, float]]:
    """How good what clients get is that arrive now and neither train nor show a label.

    Their messages are of a time after the run, so they are not counted as its traffic: each
    client's bytes, down and up, stand among its metrics.
    """
    served: dict[int, Mapping[str, float]] = {}
    for client in sorted(clients, key=lambda c: c.id):  # each arrives alone
        report = RoundReport(round, "final", state)
        given = _given(strategy, state, [client], exchange, report, measure, prepare)
        jobs = {k: prepare(replace(a, job=Job.SERVE, round=round)) for k, a in given.items()}
        for _ in _accepted(exchange, jobs, strategy.merged(state), report, measure):
            pass
        if client.id in report.metrics:
            traffic = {"bytes_down": report.bytes_down, "bytes_up": report.bytes_up}
            served[client.id] = {**report.metrics[client.id], **traffic}
    return served


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
    report.bytes_once += sum(parameter_bytes(a.once) for a in assignments.values())
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
        if client not in _lost(report):
            report.failed.append(ClientFailure(client, "no answer"))
