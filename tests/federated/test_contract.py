"""What the contract offers every method: questions, frozen parts, a store, extras, new clients."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.personal import PersonalStore
from fedmoe.federated.check import RefusedUpdateError, check_update
from fedmoe.federated.fedavg import FedAvg, ServerState
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import (
    LocalMethod,
    LocalPlan,
    LocalTask,
    Trained,
    only_chosen,
    train,
    work,
)
from fedmoe.federated.rounds import RoundReport, Schedule, run_rounds
from fedmoe.state import split_state
from fedmoe.types import (
    ActivationProfile,
    Assignment,
    ClientInfo,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
)
from tests.tiny import client_data, profile, tiny

CLIENTS = tuple(ClientInfo(k, num_examples=12) for k in range(4))
FULL = split_state(tiny())
WHOLE = frozenset(FULL.experts)


@dataclass(frozen=True)
class Asking(FedAvg):
    """Gives each client the one expert that it says it wants most."""

    def ask(
        self, state: ServerState, clients: Sequence[ClientInfo]
    ) -> Mapping[int, Assignment]:
        rows = {e: {n: t for n, t in s.items() if n.startswith("gate:")}
                for e, s in state.model.experts.items()}
        none = state.model.only(frozenset())
        return {
            c.id: Assignment(
                state.round, none, frozenset(), Job.SCOUT, absent_rows=rows, choose=1
            )
            for c in clients
        }

    def heard(self, state: ServerState, answers: Iterable[ClientUpdate]) -> "Heard":
        wanted = {
            a.client: ExpertId(*(int(i) for i in a.profile.count_LE.nonzero()[0])) for a in answers
        }
        return Heard(state.round, state.model, wanted)

    def assign(self, state, clients):
        return {
            c.id: Assignment(state.round, state.model.only(own), own)
            for c in clients
            for own in [frozenset({state.wanted[c.id]})]
        }


@dataclass(frozen=True, eq=False)
class Heard(ServerState):
    wanted: Mapping[int, ExpertId]


def switched():
    return partial(tiny, k=1)


def simulate(strategy, schedule, plan=None, store=None, unseen=()):
    plan = plan or LocalPlan(lr=0.1)
    reports: list[RoundReport] = []
    exchange = in_process(switched(), client_data, plan, schedule.seed, store=store)
    start = strategy.init(split_state(switched()()), (*CLIENTS, *unseen))
    end = run_rounds(
        strategy, start, CLIENTS, exchange, schedule, after_round=reports.append, unseen=unseen
    )
    return end, reports


def test_a_strategy_may_ask_before_it_assigns_and_is_asked_again_for_the_last_evaluation():
    end, reports = simulate(Asking(), Schedule(2))
    assert len(reports) == 3 and not any(r.failed or r.refused for r in reports)
    for r in reports:
        assert r.held.keys() == {0, 1, 2, 3}
        assert all(len(held) == 1 for held in r.held.values())
    assert reports[-1].metrics[0].keys() >= {"received_test", "trained_test"}
    assert end.round == 2


def test_who_drops_out_is_sent_its_work_and_not_counted_in():
    schedule = Schedule(6, seed=3, drop_out=0.5)
    _, reports = simulate(FedAvg(), schedule)
    lost = [{f.client for f in r.failed} for r in reports[:-1]]
    assert lost == [schedule.drop_outs(r, CLIENTS) for r in range(6)]
    assert 0 < sum(map(len, lost)) < 24 and len(set(map(frozenset, lost))) > 1
    assert all(f.reason == "dropped out" for r in reports for f in r.failed)
    for r in reports[:-1]:
        assert r.profiles.keys() == {0, 1, 2, 3} - {f.client for f in r.failed}
    assert not reports[-1].failed  # nobody drops out of the last evaluation


def test_drop_out_happens_as_often_as_it_says():
    many = [ClientInfo(k) for k in range(200)]
    schedule = Schedule(50, drop_out=0.3)
    count = sum(len(schedule.drop_outs(r, many)) for r in range(50))
    assert abs(count / 10_000 - 0.3) < 0.02
    with pytest.raises(ValueError, match="drop_out must be at least 0 and below 1, got 1"):
        Schedule(1, drop_out=1.0)


def test_unseen_clients_get_a_part_just_in_time_and_leave_no_trace():
    unseen = (ClientInfo(9, num_examples=12), ClientInfo(8, num_examples=12))
    for strategy in (FedAvg(), FedMoE(theta_cap=0.5), Asking()):
        alone, _ = simulate(strategy, Schedule(2))
        end, reports = simulate(strategy, Schedule(2), unseen=unseen)
        assert all(not r.unseen for r in reports[:-1])
        assert list(reports[-1].unseen) == [8, 9]
        for metrics in reports[-1].unseen.values():
            assert 0 <= metrics["served_test"] <= 1 and "trained_test" not in metrics
        for e, state in alone.model.experts.items():
            assert all(torch.equal(t, end.model.experts[e][n]) for n, t in state.items())


def test_serving_looks_at_no_label_of_the_training_part():
    data = client_data(0)
    broken = replace(data, train=data.train._replace(y=data.train.y * 0 - 1))
    a = Assignment(0, FULL, WHOLE, Job.SERVE)
    for d in (data, broken):
        update, own = work(0, a, tiny, d, LocalPlan(), None, 0)
        assert update.metrics.keys() == {"served_test"} and own is None
    scout = replace(a, job=Job.SCOUT)
    one, other = (work(0, scout, tiny, d, LocalPlan(), None, 0)[0] for d in (data, broken))
    assert torch.equal(one.profile.score_LE, other.profile.score_LE)


def test_a_scout_that_chooses_tells_the_set_alone():
    p = ActivationProfile(
        torch.tensor([[5, 0, 9, 9], [1, 1, 0, 0]]),
        torch.rand(2, 4).double(),
        torch.tensor([[0.5, 0.1, 0.9, 0.9], [0.2, 0.3, 0.0, 0.0]]).double(),
        torch.tensor([23, 2]),
    )
    marked = only_chosen(p, 2)
    assert marked.count_LE.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert only_chosen(p, 1).count_LE.tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert marked.score_LE.tolist() == marked.count_LE.tolist() == marked.weight_LE.tolist()
    assert marked.token_L.tolist() == [1, 1]
    assert only_chosen(p, 9).count_LE.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@dataclass(frozen=True)
class Counting(LocalMethod):
    """Keeps how often it trained on this client, and sends back what it was sent, doubled."""

    keeps = True

    def train(self, task: LocalTask) -> Trained:
        times = task.kept.get("times", torch.zeros(1)) + 1
        p, loss = train(task.model, task.examples, task.plan, task.generator, task.device)
        return Trained(p, loss, kept={"times": times},
                       extra={n: 2 * t for n, t in task.extra.items()})


def test_a_method_keeps_tensors_on_the_client_beside_personal_parameters(tmp_path):
    plan = LocalPlan(method=Counting(), personal=lambda n: n.startswith("stem."))
    assert plan.stores
    with pytest.raises(ValueError, match="store must not be None"):
        in_process(tiny, client_data, plan, 0)
    store = PersonalStore(tmp_path)
    a = Assignment(0, MoEState({n: t for n, t in FULL.shared.items() if "stem" not in n},
                               FULL.experts), WHOLE)
    exchange = in_process(tiny, client_data, plan, 0, store=store)
    for round in range(3):
        extra = {"c": torch.full((2,), float(round))}
        [update] = exchange({1: replace(a, round=round, extra=extra)})
        assert torch.equal(update.extra["c"], 2 * extra["c"])
        check_update(update, replace(a, extra=extra), a.model)
        stored = store.load(1, round + 1)
        assert stored is not None and stored.shared["kept:times"].item() == round + 1
        assert {n for n in stored.shared if not n.startswith("kept:")} == {
            n for n in FULL.shared if "stem" in n
        }


def test_frozen_parameters_come_once_and_are_neither_trained_nor_sent_back(tmp_path):
    frozen = {n: t + 1 for n, t in FULL.shared.items() if "stem" in n}
    rest = MoEState({n: t for n, t in FULL.shared.items() if n not in frozen}, FULL.experts)
    plan = LocalPlan(
        (replace(LocalPlan().phases[0], trains=lambda n: n not in frozen),), method=Counting()
    )
    store = PersonalStore(tmp_path)
    exchange = in_process(tiny, client_data, plan, 0, store=store)
    for round in range(2):
        a = Assignment(round, rest, WHOLE, once=frozen if round == 0 else {})
        [update] = exchange({1: a})
        assert isinstance(update, ClientUpdate), update
        assert not frozen.keys() & update.model.shared.keys()
        check_update(update, a, FULL)
        stored = store.load(1, round + 1)
        assert all(torch.equal(stored.shared[f"once:{n}"], t) for n, t in frozen.items())


def test_frozen_parameters_count_as_one_off_bytes():
    sent = {"enc": torch.zeros(10)}
    a = Assignment(0, FULL, WHOLE, once=sent)

    @dataclass(frozen=True)
    class Once(FedAvg):
        def assign(self, state, clients):
            return {c.id: replace(a, once=sent if state.round == 0 else {}) for c in clients}

    def nobody(assignments):
        return iter(())

    reports: list[RoundReport] = []
    run_rounds(Once(), Once().init(FULL, CLIENTS), CLIENTS, nobody, Schedule(2),
               after_round=reports.append)
    assert [r.bytes_once for r in reports] == [4 * 40, 0, 0]


@pytest.mark.parametrize(
    "extra, text",
    [
        ({"d": torch.zeros(2)}, "extra 'd' was not sent to it"),
        ({"c": torch.zeros(3)}, r"extra 'c' must have shape \(2,\), got \(3,\)"),
        ({"c": torch.zeros(2).double()}, "extra 'c' must be torch.float32"),
        ({"c": torch.tensor([0.0, torch.nan])}, "extra 'c' must be finite"),
    ],
)
def test_a_bad_extra_is_refused(extra, text):
    a = Assignment(0, FULL, WHOLE, extra={"c": torch.zeros(2)})
    used = profile([1] * len(WHOLE))
    good = ClientUpdate(1, 5, FULL, used, {}, {"c": torch.ones(2)})
    check_update(good, a, FULL)
    with pytest.raises(RefusedUpdateError, match=text):
        check_update(replace(good, extra=extra), a, FULL)


def test_only_an_expert_without_tokens_may_stay_away():
    a = Assignment(0, FULL, WHOLE)
    counts = [1] * len(WHOLE)
    lacking = FULL.only(WHOLE - {ExpertId(0, 2)})
    unused = [int(e != 2) for e in range(len(WHOLE))]
    check_update(ClientUpdate(1, 5, lacking, profile(unused), {}), a, FULL)
    with pytest.raises(RefusedUpdateError, match="expert 2 of layer 0"):
        check_update(ClientUpdate(1, 5, lacking, profile(counts), {}), a, FULL)


def test_data_are_prepared_before_any_job_sees_them():
    seen = []

    def prepare(client, model, data):
        seen.append(client)
        return replace(data, test=data.test._replace(y=data.test.y * 0))

    a = Assignment(0, FULL, WHOLE, evaluate=True)
    update, _ = work(3, a, tiny, client_data(3), LocalPlan(prepare=prepare), None, 0)
    x = client_data(3).test.x
    share = float((tiny()(x).argmax(-1) == 0).float().mean())
    assert seen == [3] and update.metrics["received_test"] == pytest.approx(share)
