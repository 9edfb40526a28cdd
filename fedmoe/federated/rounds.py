"""The federated loop, the same in a unit test, on a Ray cluster and over Flower."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeGuard, cast

from fedmoe.federated.check import Check, RefusedUpdateError
from fedmoe.federated.folding import (
    Accept,
    Folded,
    FoldingExchange,
    FoldingStrategy,
    Measure,
    folds,
)
from fedmoe.federated.sums import Sums
from fedmoe.population import by_id, in_order
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
    Terms,
)

SAMPLING = 0  # keys the generator that samples clients; clients' own keys are (round, client)
DROPPING_OUT = 1  # and the one that says which of them drop out
EVALUATING = 2  # and the one that samples those of the closing evaluation

Traffic = Callable[[], tuple[int, int]]  # bytes down and up since it was last called


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

    Of a `Population` only those who take part are looked at, however many there are.
    """

    rounds: int
    seed: int = 0
    clients_per_round: int | None = None  # None: all of them
    evaluate_every: int = 1  # rounds between evaluations; the last state is always evaluated
    drop_out: float = 0.0
    quotas: tuple[tuple[frozenset[int], int], ...] = ()  # in place of clients_per_round
    evaluate_clients: int | None = None  # sampled for the closing evaluation; None: all of them

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1, got {self.evaluate_every}")
        if self.clients_per_round is not None and self.clients_per_round < 1:
            raise ValueError(f"clients_per_round must be at least 1, got {self.clients_per_round}")
        if self.evaluate_clients is not None and self.evaluate_clients < 1:
            raise ValueError(f"evaluate_clients must be at least 1, got {self.evaluate_clients}")
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
        ordered = in_order(clients)
        if self.quotas:
            return self._by_quota(round, ordered)
        if self.clients_per_round is None:
            return list(ordered)
        if self.clients_per_round > len(ordered):
            raise ValueError(
                f"clients_per_round must be at most the {len(ordered)} clients, "
                f"got {self.clients_per_round}"
            )
        chosen = numpy_generator(self.seed, round, SAMPLING, SAMPLING).choice(
            len(ordered), self.clients_per_round, replace=False
        )
        return [ordered[i] for i in sorted(chosen)]

    def evaluated(self, clients: Sequence[ClientInfo]) -> list[ClientInfo]:
        """The clients of the closing evaluation, in order of id; a draw keyed by the seed alone."""
        ordered = in_order(clients)
        if self.evaluate_clients is None or self.evaluate_clients >= len(ordered):
            return list(ordered)
        chosen = numpy_generator(self.seed, SAMPLING, SAMPLING, EVALUATING).choice(
            len(ordered), self.evaluate_clients, replace=False
        )
        return [ordered[i] for i in sorted(chosen)]

    def _by_quota(self, round: int, ordered: Sequence[ClientInfo]) -> list[ClientInfo]:
        known = by_id(ordered)
        chosen: set[int] = set()
        for place, (group, count) in enumerate(self.quotas):
            if strangers := {c for c in group if c not in known}:
                raise ValueError(
                    f"quotas must be of the {len(ordered)} clients that train, got client "
                    f"{min(strangers)} ({len(strangers)} such in all)"
                )
            rng = numpy_generator(self.seed, round, SAMPLING, SAMPLING, place)
            chosen |= {int(c) for c in rng.choice(sorted(group), count, replace=False)}
        return [known[c] for c in sorted(chosen)]

    def drop_outs(self, round: int, clients: Sequence[ClientInfo]) -> frozenset[int]:
        """Who of a round's clients will not answer; every draw keyed by (seed, round, client)."""
        if not self.drop_out:
            return frozenset()
        return frozenset(
            c.id
            for c in clients
            if numpy_generator(self.seed, round, c.id, DROPPING_OUT).random() < self.drop_out
        )


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
    traffic: Traffic | None = None,
) -> S:
    """Assign, exchange, aggregate; at last evaluate what every client would then be given.

    A client that fails, or whose update is refused, is left out of its round and counted; the
    run goes on. An update is folded as it arrives, or, where the strategy says what to add up and
    the exchange can do it, already where its client runs.

    Args:
        first: the round to begin with, when `state` comes from a checkpoint.
        prepare: a last change to what goes down, such as leaving out personal parameters.
        unseen: clients that take part in no round. At the end each is served what the strategy
            gives it, just in time, and says how good that is as it came; `init` must know them.
        traffic: the bytes that really went down and up; None: those that `measure` tells.

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
        state = _aggregated(strategy, state, reached, assignments, report, measure)
        report.state, report.changes = state, strategy.changes(state)
        report.seconds = time.perf_counter() - started
        _count(report, traffic)
        after_round(report)

    if first <= schedule.rounds:
        asked = schedule.evaluated(clients)
        report = RoundReport(schedule.rounds, "final", state)
        started = time.perf_counter()
        given = _given(strategy, state, asked, exchange, report, measure, prepare)
        assignments = {
            client: prepare(replace(a, job=Job.EVALUATE, evaluate=True, round=schedule.rounds))
            for client, a in given.items()
        }
        model = strategy.merged(state)
        for _ in _accepted(exchange, assignments, model, report, measure):
            pass
        _count(report, traffic)
        if unseen:
            report.unseen = _served(
                strategy, state, unseen, exchange, schedule.rounds, measure, prepare, traffic
            )
        report.seconds = time.perf_counter() - started
        after_round(report)
    return state


def _count(report: RoundReport[S], traffic: Traffic | None) -> None:
    if traffic is not None:
        report.bytes_down, report.bytes_up = traffic()
        report.bytes_once = min(report.bytes_once, report.bytes_down)


class SendingExchange(Protocol):
    """An exchange that counts what it sends, so it must also send what nobody will answer."""

    def __call__(
        self, assignments: Mapping[int, Assignment]
    ) -> Iterator[ClientUpdate | ClientFailure]: ...

    def send(self, assignments: Mapping[int, Assignment]) -> None:
        """Send assignments down, and wait for no answer."""
        ...


def _but_for(exchange: Exchange, silent: frozenset[int]) -> Exchange:
    """The exchange, where these clients never answer."""
    if not silent:
        return exchange

    return _FoldingButFor(exchange, silent) if _can_fold(exchange) else _ButFor(exchange, silent)


@dataclass(frozen=True)
class _ButFor:
    exchange: Exchange
    silent: frozenset[int]

    def __call__(
        self, assignments: Mapping[int, Assignment]
    ) -> Iterator[ClientUpdate | ClientFailure]:
        yield from self._lost(assignments)
        yield from self.exchange(self._left(assignments))

    def _lost(self, assignments: Mapping[int, Assignment]) -> Iterator[ClientFailure]:
        lost = {k: assignments[k] for k in sorted(self.silent & assignments.keys())}
        if _can_send(self.exchange):
            self.exchange.send(lost)
        for client in lost:
            yield ClientFailure(client, "dropped out")

    def _left(self, assignments: Mapping[int, Assignment]) -> dict[int, Assignment]:
        return {k: a for k, a in assignments.items() if k not in self.silent}


@dataclass(frozen=True)
class _FoldingButFor(_ButFor):
    exchange: FoldingExchange

    def fold(
        self,
        assignments: Mapping[int, Assignment],
        terms: Terms,
        accept: Accept,
        measure: Measure,
    ) -> Iterator[Folded | ClientFailure]:
        yield from self._lost(assignments)
        yield from self.exchange.fold(self._left(assignments), terms, accept, measure)


def _can_fold(exchange: Exchange) -> TypeGuard[FoldingExchange]:
    return hasattr(exchange, "fold")


def _can_send(exchange: Exchange) -> TypeGuard[SendingExchange]:
    return hasattr(exchange, "send")


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
    traffic: Traffic | None,
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
        _count(report, traffic)
        if client.id in report.metrics:
            moved = {"bytes_down": report.bytes_down, "bytes_up": report.bytes_up}
            served[client.id] = {**report.metrics[client.id], **moved}
    return served


def _aggregated(
    strategy: Strategy[S],
    state: S,
    exchange: Exchange,
    assignments: Mapping[int, Assignment],
    report: RoundReport[S],
    measure: Measure,
) -> S:
    """The state after the clients' work, folded there or here."""
    if folds(strategy) and _can_fold(exchange):
        return _folded(strategy, state, exchange, assignments, report, measure)
    updates = _accepted(exchange, assignments, strategy.merged(state), report, measure)
    state = strategy.aggregate(state, updates)
    for _ in updates:  # a strategy that does not train reads none; let the clients finish
        pass
    return state


def _folded(
    strategy: FoldingStrategy[S],
    state: S,
    exchange: FoldingExchange,
    assignments: Mapping[int, Assignment],
    report: RoundReport[S],
    measure: Measure,
) -> S:
    """The state after a round whose updates are folded where clients run."""
    _write_down(report, assignments, measure)
    accept = _check_of(strategy.merged(state))
    sums, notes, answered = Sums(), list[ClientUpdate](), set[int]()
    for reply in exchange.fold(assignments, strategy.terms(state), accept, measure):
        if isinstance(reply, ClientFailure):
            report.failed.append(reply)
            continue
        report.bytes_up += sum(note.bytes_up for note in reply.notes)
        report.bytes_up += sum(it.bytes_up for it in reply.refused)
        report.refused += [ClientFailure(it.client, it.reason) for it in reply.refused]
        updates = [note.update for note in reply.notes]
        if why := _why_not(updates, assignments, answered):
            report.refused += [ClientFailure(u.client, why) for u in updates]
            continue
        sums.merge(reply.sums)
        notes += updates
        for update in updates:
            _write_up(report, update, answered)
    _write_missing(report, assignments, answered)
    notes.sort(key=lambda note: note.client)
    return strategy.settle(state, sums, notes)


def _why_not(
    updates: Sequence[ClientUpdate], assignments: Mapping[int, Assignment], answered: set[int]
) -> str | None:
    """Why sums of these updates cannot be used; one that is wrong cannot be taken out of them."""
    seen = set(answered)
    for update in updates:
        if update.client not in assignments:
            return f"client {update.client}: was not asked this round"
        if update.client in seen:
            return f"client {update.client}: has answered this round already"
        seen.add(update.client)
    return None


def _check_of(model: MoEState | None) -> Check:
    return Check(None if model is None else frozenset(model.experts))


def _write_down(
    report: RoundReport[S], assignments: Mapping[int, Assignment], measure: Measure
) -> None:
    report.held |= {client: a.sub_moe for client, a in assignments.items()}
    report.bytes_down += sum(measure(a) for a in assignments.values())
    report.bytes_once += sum(parameter_bytes(a.once) for a in assignments.values())


def _write_up(report: RoundReport[S], update: ClientUpdate, answered: set[int]) -> None:
    answered.add(update.client)
    report.profiles[update.client] = update.profile
    report.metrics[update.client] = update.metrics
    report.num_examples[update.client] = update.num_examples


def _write_missing(
    report: RoundReport[S], assignments: Mapping[int, Assignment], answered: set[int]
) -> None:
    lost = _lost(report)
    for client in sorted(set(assignments) - answered - lost):
        report.failed.append(ClientFailure(client, "no answer"))


def _accepted(
    exchange: Exchange,
    assignments: Mapping[int, Assignment],
    model: MoEState | None,
    report: RoundReport[S],
    measure: Measure,
) -> Iterator[ClientUpdate]:
    """The updates that may be folded, as they arrive; the rest is written into `report`."""
    _write_down(report, assignments, measure)
    check, answered = _check_of(model), set[int]()
    for reply in exchange(assignments):
        if isinstance(reply, ClientFailure):
            report.failed.append(reply)
            continue
        report.bytes_up += measure(reply)
        try:
            if why_not := _why_not([reply], assignments, answered):
                raise RefusedUpdateError(why_not)
            check(reply, assignments[reply.client])
        except RefusedUpdateError as why:
            report.refused.append(ClientFailure(reply.client, str(why)))
            continue
        _write_up(report, reply, answered)
        yield reply
    _write_missing(report, assignments, answered)
