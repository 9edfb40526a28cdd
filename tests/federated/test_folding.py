"""Every strategy that folds comes to the same state, wherever and in whatever groups it is done."""

import pickle
from collections import Counter
from dataclasses import dataclass, replace
from itertools import permutations

import pytest
import torch

from fedmoe.checkpoint import content_hash
from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.personal import PersonalStore
from fedmoe.federated.check import Check, RefusedUpdateError
from fedmoe.federated.fedavg import FedAvg, FixedSubMoE, random_choice
from fedmoe.federated.fedjets import FedJETs, FedJETsState
from fedmoe.federated.fedmoe import FedMoE, as_published
from fedmoe.federated.folding import Folded, Folding, fold, folds, without_parameters
from fedmoe.federated.frozen import FedAvgOnFrozen
from fedmoe.federated.local import LocalPlan
from fedmoe.federated.methods.aligned import Aligned
from fedmoe.federated.methods.clusters import by_mass
from fedmoe.federated.methods.flame import frequency_power
from fedmoe.federated.methods.pruning import FrequencyPruning
from fedmoe.federated.methods.scaffold import Controlled, Scaffold
from fedmoe.federated.methods.slices import FedRolex, HeteroFL
from fedmoe.federated.per_group import PerGroup
from fedmoe.federated.rounds import Schedule, run_rounds
from fedmoe.state import parameter_bytes, split_state
from fedmoe.types import ClientFailure, ClientInfo, MoEState, Note, Refusal
from tests.tiny import client_data, tiny

CLIENTS = tuple(ClientInfo(k, num_examples=12) for k in range(6))
SMALL = tuple(ClientInfo(k, 300, num_examples=12) for k in range(6))
MODEL = split_state(tiny())

FOLDING = {
    "fedavg": FedAvg(),
    "flame": FedAvg(weigh=frequency_power(2)),
    "by mass": FedAvg(weigh=by_mass),
    "fixed": FixedSubMoE(choice=random_choice(MODEL, SMALL, 0)),
    "frozen": FedAvgOnFrozen(frozen=lambda name: name.startswith("stem")),
    "per group": PerGroup({c.id: "ab"[c.id % 2] for c in CLIENTS}),
    "heterofl": HeteroFL(),
    "fedrolex": FedRolex(),
    "fedmoe": FedMoE(theta_cap=0.5, patience=1),
    "fedmoe, kin": FedMoE(theta_cap=0.5, kinship=0.5),
    "fedmoe, published": as_published(explore_rounds=1),
    "pruning": FrequencyPruning(theta_cap=0.5),
    "scaffold": Scaffold(),
}


@dataclass
class Places:
    """An exchange that folds in several places, each of which takes what comes to it."""

    exchange: object
    num: int = 1
    backwards: bool = False
    spoil: object = staticmethod(lambda folded: [folded])

    def __post_init__(self):
        self.calls = Counter()

    def __call__(self, assignments):
        self.calls["plain"] += 1
        return self.exchange(assignments)

    def fold(self, assignments, terms, accept, measure):
        self.calls["fold"] += 1
        sent = pickle.dumps((terms, accept))
        places = [Folding(*pickle.loads(sent), measure) for _ in range(self.num)]
        for client in sorted(assignments, reverse=self.backwards):
            [reply] = self.exchange({client: assignments[client]})
            if isinstance(reply, ClientFailure):
                yield reply
            else:
                places[client % self.num].add(reply, assignments[client])
        for place in places:
            yield from self.spoil(pickle.loads(pickle.dumps(place.done())))


def measure(message):
    return 1 + parameter_bytes(message.model.shared)


def run(strategy, exchange, rounds=2, schedule=None):
    reports, clients = [], SMALL if isinstance(strategy, HeteroFL) else CLIENTS
    state = run_rounds(
        strategy,
        strategy.init(MODEL, clients),
        clients,
        exchange,
        schedule or Schedule(rounds),
        measure=measure,
        after_round=reports.append,
    )
    return state, reports


def exchange_for(strategy, folder):
    method = Controlled() if isinstance(strategy, Scaffold) else LocalPlan().method
    store = PersonalStore(folder)
    return in_process(tiny, client_data, LocalPlan(lr=0.05, method=method), 0, store=store)


@pytest.mark.parametrize("name", FOLDING)
def test_where_updates_are_folded_changes_no_bit_and_nothing_in_the_reports(name, tmp_path):
    strategy = FOLDING[name]
    assert folds(strategy)
    plain_state, plain = run(strategy, exchange_for(strategy, tmp_path / "plain"))
    places = Places(exchange_for(strategy, tmp_path / "folded"), 3, backwards=True)
    state, reports = run(strategy, places)
    assert content_hash(state) == content_hash(plain_state)
    assert places.calls["fold"] == 2
    for one, other in zip(reports, plain, strict=True):
        for field in ("phase", "bytes_down", "bytes_up", "held", "changes", "failed"):
            assert getattr(one, field) == getattr(other, field)
        assert one.num_examples == other.num_examples and one.metrics == other.metrics
        assert one.profiles.keys() == other.profiles.keys()


def test_fedjets_folds_too_and_its_terms_travel():
    strategy = FedJETs({0: 1}, anchor_weight=3)
    terms = strategy.terms(FedJETsState(0, MODEL, {}))
    assert folds(strategy) and pickle.loads(pickle.dumps(terms)) == terms


def test_who_writes_an_aggregate_of_their_own_is_asked_for_it(tmp_path):
    @dataclass(frozen=True)
    class Mine(FedAvg):
        def aggregate(self, state, updates):
            return replace(state, round=state.round + 1)

    @dataclass(frozen=True)
    class Derived(Mine):
        pass

    for strategy in (Mine(), Derived(), Aligned()):
        assert not folds(strategy)
        places = Places(exchange_for(strategy, tmp_path))
        run(strategy, places, rounds=1)
        assert places.calls == {"plain": 2}  # a round and the evaluation
    assert folds(replace(FedAvg()))


def test_those_who_drop_out_are_left_out_where_updates_are_folded_too(tmp_path):
    schedule = Schedule(3, drop_out=0.4, seed=1)
    plain_state, plain = run(FedAvg(), exchange_for(FedAvg(), tmp_path), schedule=schedule)
    places = Places(exchange_for(FedAvg(), tmp_path), 2)
    state, reports = run(FedAvg(), places, schedule=schedule)
    assert content_hash(state) == content_hash(plain_state) and places.calls["fold"] == 3
    assert [r.failed for r in reports] == [r.failed for r in plain] and plain[0].failed


def failing(exchange, client, how):
    """The exchange, where this client's answers are `how`."""

    def spoiled(assignments):
        for reply in exchange(assignments):
            yield how(reply) if reply.client == client else reply

    return spoiled


@pytest.mark.parametrize(
    "how, refused",
    [
        (lambda u: replace(u, num_examples=0), "num_examples must be between"),
        (lambda u: ClientFailure(u.client, "out of memory"), None),
    ],
    ids=["refused", "failed"],
)
def test_a_bad_client_is_left_out_and_told_as_in_the_plain_way(how, refused, tmp_path):
    bad = failing(exchange_for(FedAvg(), tmp_path), 2, how)
    plain_state, plain = run(FedAvg(), bad)
    state, reports = run(FedAvg(), Places(bad, 2))
    assert content_hash(state) == content_hash(plain_state)
    for one, other in zip(reports, plain, strict=True):
        assert (one.refused, one.failed) == (other.refused, other.failed)
        assert one.bytes_up == other.bytes_up and one.metrics.keys() == other.metrics.keys()
    if refused:
        assert refused in reports[0].refused[0].reason


def test_a_client_that_none_of_the_sums_has_gave_no_answer(tmp_path):
    def lost(folded):
        return [] if any(note.update.client == 1 for note in folded.notes) else [folded]

    _, reports = run(FedAvg(), Places(exchange_for(FedAvg(), tmp_path), 3, spoil=lost), rounds=1)
    assert [(f.client, f.reason) for f in reports[0].failed] == [(1, "no answer"), (4, "no answer")]
    assert reports[0].metrics.keys() == {0, 2, 3, 5}


@pytest.mark.parametrize("client, why", [(77, "was not asked"), (0, "has answered this round")])
def test_sums_with_a_client_too_many_are_left_out_as_a_whole(client, why, tmp_path):
    def more(folded):
        if folded.notes[0].update.client != 1:
            return [folded]
        extra = Note(replace(folded.notes[0].update, client=client), 5)
        return [replace(folded, notes=(*folded.notes, extra))]

    state, reports = run(
        FedAvg(), Places(exchange_for(FedAvg(), tmp_path), 3, spoil=more), rounds=1
    )
    assert [f.client for f in reports[0].refused] == [1, 4, client]
    assert all(f"client {client}: {why}" in f.reason for f in reports[0].refused)
    assert not reports[0].failed

    def silent(assignments):
        return exchange_for(FedAvg(), tmp_path)(
            {k: a for k, a in assignments.items() if k not in (1, 4)}
        )

    assert content_hash(state) == content_hash(run(FedAvg(), silent, rounds=1)[0])


def test_the_same_sums_twice_count_once(tmp_path):
    twice = Places(exchange_for(FedAvg(), tmp_path), 2, spoil=lambda folded: [folded, folded])
    state, reports = run(FedAvg(), twice)
    assert content_hash(state) == content_hash(run(FedAvg(), exchange_for(FedAvg(), tmp_path))[0])
    assert len(reports[0].refused) == 6 and len(reports[0].metrics) == 6


def answers(strategy, tmp_path):
    state = strategy.init(MODEL, CLIENTS)
    assignments = strategy.assign(state, CLIENTS)
    return state, assignments, list(exchange_for(strategy, tmp_path)(assignments))


def test_a_worker_keeps_sums_and_notes_and_says_whom_it_refused(tmp_path):
    strategy = FedAvg()
    state, assignments, updates = answers(strategy, tmp_path)
    folding = Folding(
        strategy.terms(state), Check(frozenset(MODEL.experts)), lambda message: message.client
    )
    folding.add(replace(updates[3], num_examples=0), assignments[3])
    for update in updates[:3]:
        folding.add(update, assignments[update.client])
    done = folding.done()
    assert isinstance(done, Folded)
    assert [(n.update.client, n.bytes_up) for n in done.notes] == [(0, 0), (1, 1), (2, 2)]
    assert [(r.client, r.bytes_up) for r in done.refused] == [(3, 3)]
    assert isinstance(done.refused[0], Refusal) and "num_examples" in done.refused[0].reason
    for note in done.notes:
        assert not note.update.model.shared and not note.update.model.experts
    settled = strategy.settle(state, done.sums, [n.update for n in done.notes])
    assert content_hash(settled) == content_hash(strategy.aggregate(state, updates[:3]))


def test_a_check_needs_no_parameters_and_says_the_same(tmp_path):
    _, assignments, updates = answers(FedAvg(), tmp_path)
    foreign = replace(updates[0], model=MoEState(updates[0].model.shared, {}))
    for experts in (frozenset(MODEL.experts), None):
        Check(experts)(updates[0], assignments[0])
        with pytest.raises(RefusedUpdateError, match="client 0: expert"):
            Check(experts)(foreign, assignments[0])


def test_notes_come_sorted_whoever_answers_first(tmp_path):
    seen = []

    @dataclass(frozen=True)
    class Noting(FedAvg):
        def settle(self, state, sums, notes):
            seen.append([note.client for note in notes])
            return super().settle(state, sums, notes)

    state, _, updates = answers(FedAvg(), tmp_path)
    hashes = {content_hash(fold(Noting(), state, order)) for order in permutations(updates[:4])}
    assert len(hashes) == 1 and seen == [[0, 1, 2, 3]] * 24


def test_what_is_small_of_an_update_is_all_but_its_parameters(tmp_path):
    _, _, [update, *_] = answers(FedAvg(), tmp_path)
    note = without_parameters(replace(update, extra={"c": torch.zeros(3)}))
    assert not note.extra and not note.model.shared and not note.model.experts
    assert note.profile is update.profile and note.metrics is update.metrics
