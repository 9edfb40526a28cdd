from dataclasses import replace

import pytest
import torch

from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.personal import PersonalStore
from fedmoe.federated.local import LocalMethod, LocalPlan, LocalTask, Phase, accuracy, work
from fedmoe.federated.methods.ditto import Ditto
from fedmoe.federated.methods.kept import packed, unpacked
from fedmoe.rng import torch_generator
from fedmoe.state import everything, split_state, state_hash
from fedmoe.types import Assignment, MoEState
from tests.tiny import client_data, tiny

CPU = torch.device("cpu")
START = split_state(tiny())
WHOLE = frozenset(START.experts)
PLAN = LocalPlan((Phase(epochs=2),), lr=0.1, momentum=0.5, batch_size=5)


def task(method, plan=PLAN, model=None, kept=None):
    return LocalTask(
        0,
        tiny() if model is None else model,
        client_data(0).train,
        replace(plan, method=method),
        torch_generator(7),
        CPU,
        kept or {},
        {},
    )


def hashed(model):
    return state_hash(split_state(model))


def test_what_goes_up_is_what_fedavg_would_send():
    ditto, plain = task(Ditto(0.5)), task(LocalMethod())
    a, b = ditto.plan.method.train(ditto), plain.plan.method.train(plain)
    assert hashed(ditto.model) == hashed(plain.model)
    assert a.loss == b.loss and torch.equal(a.profile.count_LE, b.profile.count_LE)


def test_without_a_pull_the_personal_model_is_training_alone(tmp_path):
    """Round after round, whatever the server sends."""
    alone = replace(PLAN, personal=everything)
    ditto = replace(PLAN, method=Ditto(0.0))
    stores = [PersonalStore(tmp_path / name) for name in ("alone", "ditto")]
    nothing_sent = MoEState({}, {})
    for round in range(3):
        sent = split_state(tiny(seed=round))
        for plan, store, model in zip((alone, ditto), stores, (nothing_sent, sent), strict=True):
            if round == 0:
                model = START if plan is ditto else nothing_sent
            exchange = in_process(tiny, client_data, plan, 0, store=store)
            [answer] = exchange({1: Assignment(round, model, WHOLE, evaluate=True)})
            assert "trained_test" in answer.metrics, answer
        mine, other = (store.load(1, round + 1) for store in stores)
        kept = {n.removeprefix("kept:"): t for n, t in other.shared.items()}
        assert state_hash(mine) == state_hash(unpacked(kept))


def test_one_step_by_hand():
    plan = LocalPlan(lr=0.1, batch_size=12)
    v = split_state(tiny(seed=5))
    t = task(Ditto(0.5), plan, kept=packed(v))
    trained = t.plan.method.train(t)
    model, (x, y) = tiny(seed=5), client_data(0).train
    torch.nn.functional.cross_entropy(model(x), y).backward()
    g, w = model.stem.weight.grad, START.shared["stem.weight"]
    wanted = v.shared["stem.weight"] - 0.1 * (g + 0.5 * (v.shared["stem.weight"] - w))
    torch.testing.assert_close(trained.kept["model/stem.weight"], wanted)


def test_the_stronger_the_pull_the_nearer_the_personal_model_stays():
    far = []
    for pull in (0.0, 0.5, 5.0):
        t = task(Ditto(pull))
        own = unpacked(t.plan.method.train(t).kept).shared["stem.weight"]
        far.append(float((own - START.shared["stem.weight"]).norm()))
    assert far[0] > far[1] > far[2]


def test_the_client_uses_its_personal_model_and_trains_it_as_long_as_it_is_told():
    data = client_data(0)
    a = Assignment(0, START, WHOLE, evaluate=True)
    update, own = work(0, a, tiny, data, replace(PLAN, method=Ditto(0.0, epochs=9)), None, 0)
    nine = replace(PLAN, phases=(Phase(epochs=9),), personal=everything)
    alone, mine = work(0, replace(a, model=MoEState({}, {})), tiny, data, nine, None, 0)
    for part in ("trained_validation", "trained_test"):
        assert update.metrics[part] == alone.metrics[part]
    kept = {n.removeprefix("kept:"): t for n, t in own.shared.items()}
    assert state_hash(unpacked(kept)) == state_hash(mine)
    model = tiny()
    assert update.metrics["received_test"] == accuracy(model, data.test, CPU)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="pull must be a number of 0 or more, got -1"):
        Ditto(-1.0)
    with pytest.raises(ValueError, match="epochs must be at least 1, or None, got 0"):
        Ditto(epochs=0)
