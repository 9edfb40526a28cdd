from dataclasses import replace

import pytest
import torch

from fedmoe.data.examples import Examples
from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.personal import PersonalStore
from fedmoe.federated.local import LocalPlan, LocalTask, Phase
from fedmoe.federated.methods.blend import Blend, faults
from fedmoe.federated.methods.kept import packed
from fedmoe.rng import torch_generator
from fedmoe.state import named_by_role, split_state, state_hash
from fedmoe.types import Assignment
from tests.tiny import client_data, tiny

FULL = split_state(tiny())
WHOLE = frozenset(FULL.experts)
PLAN = LocalPlan((Phase(epochs=2),), lr=0.2, batch_size=4)
DATA = client_data(1)
CPU = torch.device("cpu")


def task(plan=PLAN, kept=None, data=DATA, seed=0):
    """A received model, and beside it whatever the client keeps."""
    return LocalTask(
        1, tiny(), data.train, plan, torch_generator(0, seed), CPU, kept or {}, {}, data.validation
    )


def hashed(model):
    return state_hash(split_state(model))


def rounds(tmp_path, plan, num=3):
    """What a client sends back, round by round, if it is sent the start each time."""
    store = PersonalStore(tmp_path)
    exchange = in_process(tiny, client_data, plan, 0, store=store if plan.stores else None)
    return [u for r in range(num) for u in exchange({1: Assignment(r, FULL, WHOLE)})]


def test_only_what_arrived_is_plain_training(tmp_path):
    blended = rounds(tmp_path, replace(PLAN, method=Blend(shares=((0.0, 0.0),))))
    plain = rounds(tmp_path, PLAN)
    for a, b in zip(blended, plain, strict=True):
        assert state_hash(a.model) == state_hash(b.model)


def test_the_blend_with_the_fewest_faults_is_where_training_begins():
    own = tiny(seed=5)
    shares = [(0.0, 0.0), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.25, 0.75)]
    losses = []
    for shared, within in shares:  # the slow way
        model, other = tiny(), dict(named_by_role(own))
        for name, p in named_by_role(model):
            share = within if name.startswith(("experts.", "gates.")) else shared
            p.data = (1 - share) * p.data + share * other[name].data
        losses.append((faults(model, DATA.validation, CPU), hashed(model), model))
    still = replace(PLAN, lr=0.0)
    kept = packed(split_state(own))
    for some in (shares, shares[:3], shares[2:4]):
        t = task(still, kept)
        Blend(shares=some).train(t)
        best = min((losses[shares.index(s)] for s in some), key=lambda item: item[0])
        begun = dict(named_by_role(t.model))
        for name, p in named_by_role(best[2]):
            torch.testing.assert_close(begun[name], p)


def test_the_client_goes_on_with_the_better_of_blend_and_trained_model():
    data, was, now = DATA, 0, 0
    for lr in (0.2, 300.0):  # one that helps, one that ruins
        t = task(replace(PLAN, lr=lr))
        trained = Blend().train(t)
        before, after = (faults(m, data.validation, CPU) for m in (tiny(), t.model))
        better = tiny() if before < after else t.model
        assert trained.used is not None and hashed(trained.used) == hashed(better)
        assert trained.kept.keys() == packed(split_state(better)).keys()
        was, now = was + (before < after), now + (before >= after)
    assert was and now


def test_without_validation_examples_nothing_is_chosen(tmp_path):
    none = Examples(DATA.validation.x[:0], DATA.validation.y[:0])
    data = replace(DATA, validation=none)
    kept = packed(split_state(tiny(seed=5)))
    t = task(kept=kept, data=data)
    trained = Blend().train(t)
    plain = task(data=data)
    plain.plan.method.train(plain)
    assert hashed(t.model) == hashed(plain.model) and trained.used is t.model


def test_faults_are_the_share_wrong_and_then_the_mean_loss():
    x, y = DATA.validation
    with torch.no_grad():
        logit = tiny()(x)
    loss = torch.nn.functional.cross_entropy(logit, y).item()
    wrong = sum(int(row.argmax()) != int(label) for row, label in zip(logit, y, strict=True))
    assert faults(tiny(), DATA.validation, CPU) == pytest.approx((wrong / len(y), loss))


@pytest.mark.parametrize(
    "shares, text",
    [((), "at least one blend"), (((0.5, 1.5),), "from 0 to 1"), (((0.5,),), "pairs of numbers")],
)
def test_shares_that_make_no_sense_are_refused(shares, text):
    with pytest.raises(ValueError, match=text):
        Blend(shares=shares)
