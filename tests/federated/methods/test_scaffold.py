from dataclasses import replace
from itertools import permutations

import pytest
import torch

from fedmoe.checkpoint import content_hash, newest_checkpoint, save_checkpoint
from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.personal import PersonalStore
from fedmoe.federated.check import RefusedUpdateError, check_update
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.local import LocalPlan, Phase, work
from fedmoe.federated.methods.scaffold import (
    Controlled,
    Scaffold,
    ScaffoldState,
    zeros_by_role,
)
from fedmoe.federated.rounds import Schedule, run_rounds
from fedmoe.state import named_by_role, split_state, state_hash
from fedmoe.types import Assignment, ClientInfo
from tests.tiny import client_data, one_layer, ragged, tiny, update

CLIENTS = [ClientInfo(k, num_examples=12) for k in range(4)]
MODEL = split_state(tiny())
WHOLE = frozenset(MODEL.experts)
ONE_STEP = LocalPlan(lr=0.1, batch_size=12, method=Controlled())


def gradient(plan=ONE_STEP, client=0):
    """Of the whole training part at the first parameters, by role; None where there is none."""
    model, (x, y) = tiny(), client_data(client).train
    torch.nn.functional.cross_entropy(model(x), y).backward()
    return {n: p.grad for n, p in named_by_role(model)}


def constant(value):
    return {n: torch.full_like(t, value) for n, t in zeros_by_role(MODEL).items()}


def do(plan=ONE_STEP, control=None, own=None, client=0):
    a = Assignment(0, MODEL, WHOLE, extra=constant(0.0) if control is None else control)
    return work(client, a, tiny, client_data(client), plan, own, 0)


def kept(own):
    return {n.removeprefix("kept:"): t for n, t in own.shared.items() if n.startswith("kept:")}


def test_the_servers_controls_have_the_names_and_shapes_of_the_models_parameters():
    for make in (tiny, ragged):
        zeros = zeros_by_role(split_state(make()))
        parameters = {n: p.shape for n, p in named_by_role(make())}
        assert {n: zeros[n].shape for n in parameters} == parameters
        # What is left over are the statistics of a normalisation.
        assert all("running" in n for n in zeros.keys() - parameters.keys())
        assert not any(t.any() for t in zeros.values())


def test_a_first_step_is_fedavgs_and_its_gradient_becomes_the_control():
    update, own = do()
    plain, _ = do(replace(ONE_STEP, method=LocalPlan().method))
    assert state_hash(update.model) == state_hash(plain.model)
    for name, g in gradient().items():
        if g is None or name not in update.extra:
            continue
        torch.testing.assert_close(update.extra[name], g)
        assert torch.equal(kept(own)[name], update.extra[name])
    assert "stem.weight" in update.extra


def test_a_step_goes_along_g_less_the_clients_plus_the_servers_control():
    _, own = do()
    mine = {n: t + 0.25 for n, t in kept(own).items()}  # any other than its gradient here
    own = replace(own, shared={f"kept:{n}": t for n, t in mine.items()})
    update, after = do(control=constant(0.5), own=own)
    g = gradient()["stem.weight"]
    moved = MODEL.shared["stem.weight"] - 0.1 * (g - mine["stem.weight"] + 0.5)
    torch.testing.assert_close(update.model.shared["stem.weight"], moved)
    # Option II: c_i - c + (x - y) / (K lr), with K = 1.
    step = (MODEL.shared["stem.weight"] - update.model.shared["stem.weight"]) / 0.1
    control = mine["stem.weight"] - 0.5 + step
    torch.testing.assert_close(kept(after)["stem.weight"], control, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        update.extra["stem.weight"], control - mine["stem.weight"], atol=1e-5, rtol=1e-5
    )


def test_over_many_steps_of_plain_sgd_the_control_is_that_of_option_two():
    plan = replace(ONE_STEP, batch_size=5, phases=(Phase(epochs=3),))
    _, own = do(plan)
    update, after = do(plan, control=constant(0.1), own=own)
    steps = 3 * 3  # 12 examples in batches of 5
    for name in ("stem.weight", "stem.bias"):
        change = (MODEL.shared[name] - update.model.shared[name]) / (steps * 0.1)
        control = kept(own)[name] - 0.1 + change
        torch.testing.assert_close(kept(after)[name], control, atol=1e-5, rtol=1e-5)


def test_momentum_and_clipping_do_not_reach_the_controls():
    bent = replace(ONE_STEP, momentum=0.9, clip=1e-3, weight_decay=0.1)
    assert torch.equal(do(bent)[0].extra["stem.weight"], do()[0].extra["stem.weight"])


def test_an_expert_without_tokens_keeps_its_control():
    update, _ = do()
    unused = [e for e in WHOLE if e not in update.model.experts]
    assert unused
    names = {f"experts.{e.layer}.{e.expert}.up.weight" for e in unused}
    own = {f"kept:{n}": torch.ones_like(zeros_by_role(MODEL)[n]) for n in names}
    update, after = do(own=replace(MODEL, shared=own, experts={}))
    for name in names:
        assert name not in update.extra
        assert torch.equal(kept(after)[name], torch.ones_like(kept(after)[name]))


def test_the_servers_control_moves_by_the_mean_change_times_the_share_that_took_part():
    strategy = Scaffold()
    state = strategy.init(one_layer(0.0, 0.0), [ClientInfo(k) for k in range(3)])
    state = replace(state, control={"w": torch.tensor([1.0]), "experts.0.0.v": torch.zeros(1)})
    one = update(0, one_layer(1.0, 1.0), [1], num_examples=3)
    other = update(2, one_layer(5.0, 5.0), [0], num_examples=1)
    one = replace(
        one, extra={"w": torch.tensor([2.0]), "experts.0.0.v": torch.tensor([6.0])}
    )
    other = replace(other, extra={"w": torch.tensor([4.0])})
    end = strategy.aggregate(state, [one, other])
    assert end.model.shared["w"].item() == 2.0  # (3*1 + 1*5) / 4
    assert end.control["w"].item() == 3.0  # 1 + (2 + 4) / 2 * 2 / 3
    assert end.control["experts.0.0.v"].item() == 2.0  # 6 / 1 * 1 / 3: one client's expert alone
    assert (end.round, end.num_clients) == (1, 3)


def test_the_order_of_updates_does_not_matter():
    strategy = Scaffold()
    start = strategy.init(MODEL, CLIENTS)
    updates = [do(client=k)[0] for k in range(3)]
    hashes = {content_hash(strategy.aggregate(start, iter(p))) for p in permutations(updates)}
    assert len(hashes) == 1


def test_the_servers_control_stays_the_mean_of_all_clients_controls(tmp_path):
    """The invariant of the method, whoever takes part."""
    strategy, store = Scaffold(), PersonalStore(tmp_path)
    plan = LocalPlan(lr=0.1, batch_size=5, momentum=0.5, method=Controlled())
    exchange = in_process(tiny, client_data, plan, 0, store=store)
    schedule = Schedule(3, clients_per_round=2)

    def check(report):
        if report.phase == "final":
            return
        own = [store.load(k, 10) for k in range(4)]
        for name, c in report.state.control.items():
            mine = [kept(o).get(name, torch.zeros_like(c)) for o in own if o is not None]
            mean = sum(mine) / 4
            torch.testing.assert_close(c, mean if mine else torch.zeros_like(c))
        assert not report.failed and not report.refused

    end = run_rounds(
        strategy, strategy.init(MODEL, CLIENTS), CLIENTS, exchange, schedule, after_round=check
    )
    assert any(c.any() for c in end.control.values())


def test_a_server_that_sends_no_controls_refuses_what_such_clients_send_back():
    a = FedAvg().assign(FedAvg().init(MODEL, CLIENTS), CLIENTS)[0]
    update, _ = work(0, a, tiny, client_data(0), ONE_STEP, None, 0)
    with pytest.raises(RefusedUpdateError, match="extra .* was not sent to it"):
        check_update(update, a, MODEL)


def test_the_state_can_be_saved(tmp_path):
    state = Scaffold().init(MODEL, CLIENTS)
    digest = save_checkpoint(tmp_path, 1, replace(state, round=1))
    found = newest_checkpoint(tmp_path, ScaffoldState, pytest.fail)
    assert found is not None and content_hash(found[1]) == digest
