from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from fedmoe.checkpoint import content_hash
from fedmoe.federated.check import MAX_EXAMPLES, MAX_TOKENS
from fedmoe.federated.fedavg import FedAvg, FixedSubMoE
from fedmoe.federated.fedmoe import FedMoE, frequency
from fedmoe.federated.per_group import PerGroup
from fedmoe.federated.rounds import Schedule, run_rounds
from fedmoe.types import (
    Assignment,
    ClientFailure,
    ClientInfo,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
)
from tests.tiny import number, one_layer, profile

MODEL = one_layer(0.0, 1.0, 2.0, 3.0, 4.0)
CLIENTS = tuple(ClientInfo(k) for k in range(4))
E0, E3 = ExpertId(0, 0), ExpertId(0, 3)
EMPTY = MoEState({}, {})


def honest(client: int, a: Assignment) -> ClientUpdate:
    """Adds its number and the round's to all that it was sent, and used each expert."""

    def moved(part):
        return {n: t + 0.1 * (client + 1) + a.round for n, t in part.items()}

    held = [int(ExpertId(0, e) in a.sub_moe) * (client + 2) for e in range(4)]
    if a.job is Job.SCOUT:
        return ClientUpdate(client, 5, EMPTY, profile([client, 1, 1, 1]), {})
    metrics = {"loss": 1.0 + client}
    if a.evaluate:
        metrics["received_test"] = 0.25
    if a.job is Job.EVALUATE:
        return ClientUpdate(client, 5, EMPTY, profile([0] * 4), metrics)
    model = MoEState(moved(a.model.shared), {e: moved(s) for e, s in a.model.experts.items()})
    return ClientUpdate(client, 5 + client, model, profile(held), metrics)


@dataclass
class Clients:
    """An exchange that remembers what it carried; `spoil` may change what a client answers."""

    spoil: Callable = lambda update, a: update
    backwards: bool = False

    def __post_init__(self):
        self.sent = []

    def __call__(self, assignments):
        self.sent.append(dict(assignments))
        for client in sorted(assignments, reverse=self.backwards):
            a = assignments[client]
            answers = self.spoil(honest(client, a), a)
            yield from answers if isinstance(answers, list) else [answers]


def run(exchange=None, strategy=None, schedule=None, clients=CLIENTS, **options):
    """The last state and every round's report."""
    strategy, reports = strategy or FedAvg(), []
    state = run_rounds(
        strategy,
        strategy.init(MODEL, clients),
        clients,
        exchange or Clients(),
        schedule or Schedule(3),
        after_round=reports.append,
        **options,
    )
    return state, reports


def test_every_round_is_reported_and_at_last_an_evaluation():
    exchange = Clients()
    state, reports = run(exchange)
    assert [(r.round, r.phase) for r in reports] == [
        (0, "train"), (1, "train"), (2, "train"), (3, "final")
    ]
    assert [r.state.round for r in reports] == [1, 2, 3, 3] and reports[-1].state is state
    for r in reports:
        whole = frozenset(MODEL.experts)
        assert r.held == dict.fromkeys(range(4), whole)
        assert not r.failed and not r.refused and r.seconds >= 0
        assert r.metrics.keys() == r.profiles.keys() == r.num_examples.keys() == set(range(4))
    assert [{a.job for a in sent.values()} for sent in exchange.sent] == [{Job.TRAIN}] * 3 + [
        {Job.EVALUATE}
    ]
    assert {a.round for a in exchange.sent[3].values()} == {3}


def test_the_closing_evaluation_changes_nothing():
    state, reports = run()
    assert content_hash(state) == content_hash(reports[2].state)


@pytest.mark.parametrize(
    "every, evaluated", [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3, 4]), (9, [0, 4])]
)
def test_accuracies_are_asked_for_as_often_as_scheduled_and_at_the_end(every, evaluated):
    exchange = Clients()
    run(exchange, schedule=Schedule(4, evaluate_every=every))
    asked = [[a.evaluate for a in sent.values()] for sent in exchange.sent]
    assert asked == [[round in evaluated] * 4 for round in range(5)]


def test_who_answers_first_does_not_matter():
    one, other = run(Clients()), run(Clients(backwards=True))
    assert content_hash(one[0]) == content_hash(other[0])


# Who takes part


def test_participants_are_drawn_anew_each_round_by_seed_alone():
    clients = [ClientInfo(k) for k in (9, 3, 7, 1, 5, 0)]
    drawn = [[c.id for c in Schedule(9, 0, 3).participants(r, clients)] for r in range(9)]
    again = [[c.id for c in Schedule(2, 0, 3).participants(r, clients[::-1])] for r in range(9)]
    assert drawn == again
    assert all(ids == sorted(set(ids)) and len(ids) == 3 for ids in drawn)
    assert len({tuple(ids) for ids in drawn}) > 3
    assert set().union(*drawn) == {0, 1, 3, 5, 7, 9}
    other = [[c.id for c in Schedule(9, 1, 3).participants(r, clients)] for r in range(9)]
    assert other != drawn


def test_without_a_number_everybody_takes_part_in_order():
    clients = [ClientInfo(k) for k in (2, 0, 1)]
    assert [c.id for c in Schedule(1).participants(0, clients)] == [0, 1, 2]


def test_sampled_rounds_ask_only_the_sampled_but_everybody_is_evaluated_at_last():
    exchange, schedule = Clients(), Schedule(3, seed=2, clients_per_round=2)
    run(exchange, schedule=schedule)
    for round in range(3):
        ids = [c.id for c in schedule.participants(round, CLIENTS)]
        assert sorted(exchange.sent[round]) == ids and len(ids) == 2
    assert sorted(exchange.sent[3]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"rounds": 1, "evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"rounds": 1, "clients_per_round": 0}, "clients_per_round must be at least 1, got 0"),
    ],
    ids=str,
)
def test_a_schedule_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


def test_more_clients_than_there_are_cannot_be_sampled():
    with pytest.raises(ValueError, match="clients_per_round must be at most the 4 clients, got 5"):
        Schedule(1, clients_per_round=5).participants(0, CLIENTS)


# A bad client is left out, by name, and nothing else changes

BAD = 2


def of_model(change):
    """Spoils one client's model in every round in which it trains."""

    def spoil(update, a):
        if update.client != BAD or a.job is not Job.TRAIN:
            return update
        return replace(update, model=change(update.model))

    return spoil


def of_update(change):
    def spoil(update, a):
        return change(update) if update.client == BAD and a.job is Job.TRAIN else update

    return spoil


def counting(*row):
    return of_update(lambda u: replace(u, profile=profile(list(row))))


NAN = float("nan")
REFUSED = {
    "nan": (
        of_model(lambda m: replace(m, shared={"w": number(NAN)})),
        "'w' must be finite",
    ),
    "infinity": (
        of_model(lambda m: replace(m, experts=m.experts | {E0: {"v": number(float("-inf"))}})),
        "expert 0 of layer 0: 'v' must be finite",
    ),
    "shape": (of_model(lambda m: replace(m, shared={"w": torch.zeros(2)})), "must have shape"),
    "dtype": (
        of_model(lambda m: replace(m, experts=m.experts | {E0: {"v": number(1, torch.float64)}})),
        "'v' must be torch.float32, got torch.float64",
    ),
    "a name too many": (of_model(lambda m: replace(m, shared=m.shared | {"x": number(0)})), "'x'"),
    "a name missing": (of_model(lambda m: replace(m, shared={})), "'w' is missing"),
    "a foreign expert": (
        of_model(lambda m: replace(m, experts=m.experts | {E3: {"v": number(0.0)}})),
        "expert 3 of layer 0 was not assigned",
    ),
    "an expert of no model": (
        of_model(lambda m: replace(m, experts=m.experts | {ExpertId(9, 9): {"v": number(0.0)}})),
        "expert 9 of layer 9 was not assigned",
    ),
    "tokens for an expert it has not": (counting(1, 1, 1, 1), "reports tokens for expert 3"),
    "negative counts": (counting(-1, 1, 1, 0), "must not be negative"),
    "huge counts": (counting(MAX_TOKENS + 1, 1, 1, 0), "must be at most"),
    "a profile of another shape": (counting(1, 1, 1, 0, 0), "count_LE must be"),
    "an accuracy of 7": (
        of_update(lambda u: replace(u, metrics={"trained_validation": 7.0})),
        "'trained_validation' must be between 0 and 1",
    ),
    "a loss that is not finite": (
        of_update(lambda u: replace(u, metrics={"loss": NAN})),
        "'loss' must be finite",
    ),
    "no examples": (of_update(lambda u: replace(u, num_examples=0)), "num_examples"),
    "too many examples": (
        of_update(lambda u: replace(u, num_examples=MAX_EXAMPLES + 1)),
        "num_examples",
    ),
}
FAILED = {
    "an error": (of_update(lambda u: ClientFailure(BAD, "out of memory")), "out of memory"),
    "no answer": (of_update(lambda u: []), "no answer"),
}
# All but client 2 hold expert 3.
CHOICE = {k: frozenset(MODEL.experts) - ({E3} if k == BAD else set()) for k in range(4)}
STRATEGY = FixedSubMoE(choice=CHOICE)


@pytest.fixture(scope="module")
def without_it():
    """How the run ends without the bad client."""
    state, _ = run(strategy=STRATEGY, clients=tuple(c for c in CLIENTS if c.id != BAD))
    return content_hash(state)


@pytest.mark.parametrize("case", [*REFUSED, *FAILED], ids=str)
def test_a_bad_client_is_named_counted_and_left_out_and_the_run_goes_on(case, without_it):
    spoil, message = (REFUSED | FAILED)[case]
    state, reports = run(Clients(spoil), STRATEGY)
    assert content_hash(state) == without_it
    for r in reports[:3]:
        bad, good = (r.refused, r.failed) if case in REFUSED else (r.failed, r.refused)
        assert [f.client for f in bad] == [BAD] and not good
        assert message in bad[0].reason
        assert r.metrics.keys() == {0, 1, 3}
    assert reports[3].metrics.keys() == {0, 1, 2, 3}  # it evaluates well enough


def test_only_the_first_of_several_answers_counts():
    state, reports = run(Clients(of_update(lambda u: [u, u, replace(u, model=EMPTY)])), STRATEGY)
    assert content_hash(state) == content_hash(run(strategy=STRATEGY)[0])
    for r in reports[:3]:
        assert [f.client for f in r.refused] == [BAD, BAD]
        assert "client 2: has answered this round already" in r.refused[0].reason
        assert not r.failed and len(r.metrics) == 4


def test_a_good_answer_after_a_bad_one_counts():
    state, reports = run(Clients(of_update(lambda u: [replace(u, num_examples=0), u])), STRATEGY)
    assert content_hash(state) == content_hash(run(strategy=STRATEGY)[0])
    assert [f.client for f in reports[0].refused] == [BAD]


@pytest.mark.parametrize("stranger", [77, -1])
def test_an_answer_of_somebody_who_was_not_asked_is_refused(stranger, without_it):
    spoil = of_update(lambda u: replace(u, client=stranger))
    state, reports = run(Clients(spoil), STRATEGY)
    assert content_hash(state) == without_it
    for r in reports[:3]:
        assert [f.client for f in r.refused] == [stranger]
        assert f"client {stranger}: was not asked this round" in r.refused[0].reason
        assert [(f.client, f.reason) for f in r.failed] == [(BAD, "no answer")]


def test_a_client_that_was_not_sampled_is_refused_too():
    schedule = Schedule(1, seed=0, clients_per_round=1)
    [asked] = [c.id for c in schedule.participants(0, CLIENTS)]
    other = (asked + 1) % 4
    spoil = lambda u, a: [u, replace(u, client=other)] if a.job is Job.TRAIN else u  # noqa: E731
    _, reports = run(Clients(spoil), schedule=schedule)
    assert [f.client for f in reports[0].refused] == [other]
    assert reports[0].metrics.keys() == {asked}


def test_a_round_in_which_everybody_fails_leaves_the_model_as_it_was():
    state, reports = run(Clients(lambda u, a: ClientFailure(u.client, "gone")), STRATEGY)
    assert state.round == 3
    assert content_hash(replace(state, round=0)) == content_hash(STRATEGY.init(MODEL, CLIENTS))
    assert all(len(r.failed) == 4 and not r.metrics for r in reports)


def test_one_models_clients_are_checked_against_what_they_were_sent():
    strategy = PerGroup(dict.fromkeys(range(4), "all"))
    spoil, message = REFUSED["an expert of no model"]
    state, reports = run(Clients(spoil), strategy)
    assert message in reports[0].refused[0].reason
    assert state.models["all"].shared["w"].item() != 0


# Bytes, preparation, going on


def test_all_bytes_are_counted_those_of_refused_updates_too():
    spoil = of_update(lambda u: replace(u, num_examples=0))

    def measure(message):
        return 1000 if isinstance(message, Assignment) else 1 + message.client

    _, reports = run(Clients(spoil), STRATEGY, measure=measure)
    assert [r.bytes_down for r in reports] == [4000] * 4
    assert [r.bytes_up for r in reports] == [1 + 2 + 3 + 4] * 4


def test_what_is_prepared_is_what_goes_down_and_what_updates_are_checked_against():
    exchange, asked = Clients(), []

    def prepare(a):
        asked.append(a)
        return replace(a, model=replace(a.model, shared={}))

    state, reports = run(exchange, prepare=prepare)
    assert all(not a.model.shared for sent in exchange.sent for a in sent.values())
    assert not any(r.refused for r in reports)
    assert torch.equal(state.model.shared["w"], MODEL.shared["w"])  # nobody sent it
    assert [a.job for a in asked] == [Job.TRAIN] * 12 + [Job.EVALUATE] * 4


def test_a_run_goes_on_from_any_round_to_the_same_end():
    end, reports = run()
    strategy = FedAvg()
    for first, state in enumerate([strategy.init(MODEL, CLIENTS)] + [r.state for r in reports[:3]]):
        rest = []
        again = run_rounds(
            strategy, state, CLIENTS, Clients(), Schedule(3), first=first, after_round=rest.append
        )
        assert content_hash(again) == content_hash(end)
        assert [r.round for r in rest] == list(range(first, 4))


def test_an_exchange_that_breaks_breaks_the_run():
    def exchange(assignments):
        yield honest(0, assignments[0])
        raise ConnectionError("the network is gone")

    with pytest.raises(ConnectionError, match="the network is gone"):
        run(exchange)


# FedMoE's phases

PLAIN = FedMoE(measure=frequency, centred=False, smooth_over=0, sharpness=0.0, patience=None)


def test_a_scout_is_not_asked_for_accuracies_and_its_round_is_one_of_exploring():
    exchange = Clients()
    _, reports = run(exchange, PLAIN)
    assert [r.phase for r in reports] == ["explore", "train", "train", "final"]
    assert [r.held[0] for r in reports] == [frozenset()] + [frozenset(MODEL.experts) - {E0}] * 3
    assert not any(a.evaluate for a in exchange.sent[0].values())
    assert [c.action for c in reports[0].changes] == ["choose"] * 4
    assert [c for r in reports[1:] for c in r.changes] == []


def test_who_was_never_sampled_scouts_before_the_closing_evaluation():
    exchange, schedule = Clients(), Schedule(2, seed=0, clients_per_round=1)
    state, reports = run(exchange, PLAIN, schedule)
    met = {c.id for r in range(2) for c in schedule.participants(r, CLIENTS)}
    late = set(range(4)) - met
    assert late and set(state.sub_moes) == met  # the state is that of the last round
    scouts, judged = exchange.sent[2:]
    assert {k: a.job for k, a in scouts.items()} == dict.fromkeys(late, Job.SCOUT)
    assert {k: a.job for k, a in judged.items()} == dict.fromkeys(range(4), Job.EVALUATE)
    assert all(a.sub_moe for a in judged.values())
    final = reports[-1]
    assert {c.client for c in final.changes} == late
    assert final.held == {k: a.sub_moe for k, a in judged.items()}
    assert final.metrics.keys() == set(range(4)) and not final.failed


def test_who_cannot_be_given_experts_is_not_evaluated_and_named():
    def spoil(update, a):
        return ClientFailure(3, "asleep") if update.client == 3 and a.job is Job.SCOUT else update

    _, reports = run(Clients(spoil), PLAIN)
    assert [(f.client, f.reason) for f in reports[-1].failed] == [(3, "asleep")]
    assert reports[-1].metrics.keys() == {0, 1, 2}
    _, reports = run(Clients(), replace(PLAIN, explore_rounds=9))
    assert [f.reason for f in reports[-1].failed] == ["has been given no experts yet"] * 4


def test_quotas_take_so_many_of_each_set_of_clients():
    clients = [ClientInfo(k) for k in range(12)]
    few, many = frozenset({1, 4, 7}), frozenset(range(12)) - {1, 4, 7}
    schedule = Schedule(40, seed=5, quotas=((few, 3), (many, 2)))
    taking_part = [{c.id for c in schedule.participants(r, clients)} for r in range(40)]
    assert all(few <= own and len(own & many) == 2 for own in taking_part)
    assert set().union(*taking_part) == set(range(12)) and len(set(map(frozenset, taking_part))) > 9
    again = replace(schedule).participants(3, clients[::-1])
    assert [c.id for c in again] == sorted(taking_part[3])


def test_a_client_of_two_quotas_comes_once_and_a_quota_may_be_nobody():
    clients = [ClientInfo(k) for k in range(4)]
    both = Schedule(1, quotas=((frozenset({0, 1}), 2), (frozenset({1, 2}), 2), (frozenset({3}), 0)))
    assert [c.id for c in both.participants(0, clients)] == [0, 1, 2]


def test_quotas_that_cannot_be_met_are_named():
    with pytest.raises(ValueError, match="from 0 to the number of clients they are of, got 3 of 2"):
        Schedule(1, quotas=((frozenset({0, 1}), 3),))
    with pytest.raises(ValueError, match="clients_per_round must be None where .* got 2"):
        Schedule(1, clients_per_round=2, quotas=((frozenset({0}), 1),))
    with pytest.raises(ValueError, match="of the 1 clients that train, got client 5"):
        Schedule(1, quotas=((frozenset({0, 5}), 1),)).participants(0, [ClientInfo(0)])
