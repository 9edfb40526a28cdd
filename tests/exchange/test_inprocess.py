from dataclasses import replace

import pytest
import torch

from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.personal import PersonalStore
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.local import LocalPlan, Phase, fedper, work
from fedmoe.federated.rounds import Schedule, run_rounds
from fedmoe.state import split_state, state_hash
from fedmoe.types import (
    Assignment,
    ClientFailure,
    ClientInfo,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
)
from tests.tiny import client_data, tiny

PLAN = LocalPlan((Phase(epochs=1),), lr=0.1, batch_size=5)
WHOLE = frozenset(ExpertId(0, e) for e in range(4))


def is_stem(name):
    return name.startswith("stem.")


PERSONAL = fedper(is_stem, PLAN)


def assignment(round=0, **changes):
    return replace(Assignment(round, split_state(tiny()), WHOLE), **changes)


def test_every_client_does_its_own_work_in_turn():
    exchange = in_process(tiny, client_data, PLAN, seed=3)
    replies = list(exchange({2: assignment(4), 0: assignment(4)}))
    assert [r.client for r in replies] == [2, 0]
    for r in replies:
        wanted, _ = work(r.client, assignment(4), tiny, client_data(r.client), PLAN, None, 3)
        assert state_hash(r.model) == state_hash(wanted.model)
        assert r.metrics == wanted.metrics


def test_work_is_done_when_its_update_is_asked_for():
    begun = []

    def load(client):
        begun.append(client)
        return client_data(client)

    replies = iter(in_process(tiny, load, PLAN, seed=0)({0: assignment(), 1: assignment()}))
    assert begun == []
    next(replies)
    assert begun == [0]
    next(replies)
    assert begun == [0, 1]


def test_whatever_goes_wrong_on_a_client_is_its_failure_alone():
    def load(client):
        if client == 1:
            raise RuntimeError("the disk is gone")
        return client_data(client)

    told = []
    exchange = in_process(tiny, load, PLAN, seed=0, progress=told.append)
    bad = replace(assignment(), sub_moe=WHOLE | {ExpertId(0, 9)})
    replies = list(exchange({0: assignment(), 1: assignment(), 2: bad, 3: assignment()}))
    assert [type(r) for r in replies] == [ClientUpdate, ClientFailure, ClientFailure, ClientUpdate]
    assert replies[1] == ClientFailure(1, "RuntimeError: the disk is gone")
    assert replies[2].reason.startswith("ValueError: client 2 was assigned expert 9 of layer 0")
    assert told == [0, 1, 2, 3]


@pytest.mark.parametrize("what", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_nobodys_failure(what):
    def load(client):
        raise what

    with pytest.raises(what):
        list(in_process(tiny, load, PLAN, seed=0)({0: assignment()}))


def test_a_client_goes_on_with_what_it_had_after_its_last_training(tmp_path):
    store = PersonalStore(tmp_path)
    exchange = in_process(tiny, client_data, PERSONAL, seed=0, store=store)
    own = None
    for round in range(3):
        [reply] = exchange({1: assignment(round)})
        wanted, own = work(1, assignment(round), tiny, client_data(1), PERSONAL, own, 0)
        assert state_hash(reply.model) == state_hash(wanted.model)
        assert state_hash(store.load(1, round + 1)) == state_hash(own)


@pytest.mark.parametrize("job", [Job.SCOUT, Job.EVALUATE])
def test_only_training_writes_what_a_client_keeps(tmp_path, job):
    store = PersonalStore(tmp_path)
    exchange = in_process(tiny, client_data, PERSONAL, seed=0, store=store)
    list(exchange({1: assignment(0)}))
    before = sorted(tmp_path.rglob("*"))
    list(exchange({1: assignment(1, job=job, evaluate=True)}))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_file_of_a_client_is_its_failure(tmp_path):
    store = PersonalStore(tmp_path)
    exchange = in_process(tiny, client_data, PERSONAL, seed=0, store=store)
    list(exchange({0: assignment(0), 1: assignment(0)}))
    path = next((tmp_path / "client-000001").iterdir())
    path.write_bytes(path.read_bytes()[:-5])
    first, second = exchange({0: assignment(1), 1: assignment(1)})
    assert isinstance(first, ClientUpdate)
    assert isinstance(second, ClientFailure) and "is damaged" in second.reason


def test_a_plan_with_personal_parameters_needs_a_place_for_them():
    with pytest.raises(ValueError, match="store must not be None for a plan under which"):
        in_process(tiny, client_data, PERSONAL, seed=0)


def test_a_run_in_process_learns():
    clients = [ClientInfo(k) for k in (0, 2)]  # of one kind
    reports = []
    run_rounds(
        FedAvg(),
        FedAvg().init(split_state(tiny()), clients),
        clients,
        in_process(tiny, client_data, replace(PLAN, lr=0.5), seed=0),
        Schedule(12),
        after_round=reports.append,
    )
    first, last = (
        sum(m["received_test"] for m in r.metrics.values()) / 2 for r in (reports[0], reports[-1])
    )
    assert last > 0.8 and last >= first
    assert not any(r.failed or r.refused for r in reports)
    assert isinstance(reports[-1].state.model, MoEState)
    assert all(torch.isfinite(t).all() for t in reports[-1].state.model.shared.values())


@pytest.mark.parametrize("trainer", ["batched", "compiled"])
def test_a_trainer_leaves_alone_what_it_cannot_train(tmp_path, trainer):
    """The tiny model has a part that no trainer knows; a failure stays one client's."""

    def load(client):
        if client == 1:
            raise OSError("the disk is gone")
        return client_data(client)

    def answers(trainer, folder):
        told = []
        store = PersonalStore(tmp_path / folder)
        exchange = in_process(
            tiny, load, PERSONAL, seed=0, store=store, progress=told.append, trainer=trainer
        )
        got = list(exchange({c: assignment() for c in (2, 1, 0)}))
        assert told == [2, 1, 0]
        kept = {c: state_hash(store.load(c, 99)) for c in (0, 2)}
        return [u if isinstance(u, ClientFailure) else state_hash(u.model) for u in got], kept

    assert answers(trainer, "fast") == answers("one-by-one", "slow")


def test_a_trainer_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="trainer must be one of"):
        in_process(tiny, client_data, PLAN, seed=0, trainer="fast")
