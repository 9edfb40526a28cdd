from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from fedmoe.data.examples import Examples
from fedmoe.federated.local import LocalMethod, LocalPlan, LocalTask, Phase
from fedmoe.federated.methods.apfl import (
    APFL,
    LEAST,
    by_mixture,
    mixture,
    tells,
    through_mixture,
)
from fedmoe.federated.methods.kept import packed, unpacked
from fedmoe.rng import torch_generator
from fedmoe.state import is_expert, split_state, state_hash
from tests.tiny import client_data, tiny

CPU = torch.device("cpu")
PLAN = LocalPlan((Phase(epochs=2),), lr=0.1, momentum=0.5, batch_size=5)
ONE_STEP = LocalPlan(lr=0.1, batch_size=12)


def task(method, plan=PLAN, kept=None):
    return LocalTask(
        0, tiny(), client_data(0).train, replace(plan, method=method), torch_generator(7), CPU,
        kept or {}, {},
    )


def done(method, plan=PLAN, kept=None):
    t = task(method, plan, kept)
    return t.plan.method.train(t), t.model


def hashed(model):
    return state_hash(split_state(model))


@pytest.mark.parametrize("method", [APFL(0.3), APFL(0.0, False), APFL(1.0, False)])
def test_what_goes_up_is_what_fedavg_would_send(method):
    mixed, model = done(method)
    plain, other = done(LocalMethod())
    assert hashed(model) == hashed(other)
    assert mixed.loss == plain.loss


def test_with_alpha_1_it_is_training_alone():
    kept = packed(split_state(tiny(seed=5)))
    trained, _ = done(APFL(1.0, adaptive=False), kept=kept)
    alone = replace(task(LocalMethod()), model=tiny(seed=5))
    alone.plan.method.train(alone)
    assert hashed(trained.used) == hashed(alone.model)
    assert state_hash(unpacked(trained.kept)) == hashed(alone.model)


def test_with_alpha_0_it_is_fedavg_and_the_local_model_rests():
    v = split_state(tiny(seed=5))
    trained, model = done(APFL(0.0, adaptive=False), kept=packed(v))
    assert hashed(trained.used) == hashed(model)
    assert state_hash(unpacked(trained.kept)) == state_hash(v)


def slow_step(alpha):
    """One step on the whole part: the local model's parameters after it, and alpha's slope."""
    _, w = done(LocalMethod(), ONE_STEP)
    v, (x, y) = tiny(seed=5), client_data(0).train
    mixed = {
        n: (alpha * p + (1 - alpha) * q).detach().requires_grad_()
        for (n, p), q in zip(v.named_parameters(), w.parameters(), strict=True)
    }
    loss = torch.nn.functional.cross_entropy(functional_call(v, mixed, (x,)), y)
    grads = torch.autograd.grad(loss, list(mixed.values()), materialize_grads=True)
    after, slope = {}, 0.0
    for (name, p), q, g in zip(v.named_parameters(), w.parameters(), grads, strict=True):
        after[name] = (p - 0.1 * alpha * g).detach()  # the chain rule's alpha
        slope += float(((p - q) * g).sum().detach())
    return after, slope


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_step_by_the_papers_formulas(alpha):
    trained, _ = done(APFL(alpha), ONE_STEP, packed(split_state(tiny(seed=5))))
    after, slope = slow_step(alpha)
    state = unpacked(trained.kept)
    torch.testing.assert_close(state.shared["stem.weight"], after["stem.weight"])
    for e, own in state.experts.items():
        torch.testing.assert_close(own["up.weight"], after[f"head.experts.{e.expert}.up.weight"])
    wanted = min(1.0, max(0.0, alpha - 0.1 * slope))
    assert float(trained.kept["alpha"]) == pytest.approx(wanted, abs=1e-6)
    assert wanted != alpha or alpha in (0.0, 1.0)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("alpha", [LEAST, 0.3, 1.0])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip": 0.3, "momentum": 0.9},
        {"balance": 0.3, "label_smoothing": 0.1},
        {"proximal": 0.4, "clip": 0.3},
        {"phases": (Phase(is_expert, 1), Phase(lambda n: not is_expert(n), 2))},
    ],
    ids=["plain", "clip", "losses", "proximal", "phases"],
)
def test_training_the_mixture_is_training_through_it(changes, alpha, adaptive):
    """In float64, to tell a rounding from a wrong formula."""
    plan = replace(PLAN, **changes)
    if not tells(plan, alpha, adaptive):
        assert adaptive and changes.keys() & {"proximal", "phases"}
        return
    ends = []
    for by in (through_mixture, by_mixture):
        t, own = task(APFL(), plan), tiny(seed=5).double()
        t.model.double()
        t = replace(t, examples=Examples(t.examples.x.double(), t.examples.y))
        used, slope = by(t, own, alpha, torch_generator(3), adaptive)
        ends.append((used.state_dict(), own.state_dict(), slope))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("plan, alpha", [(PLAN, 0.0), (replace(PLAN, weight_decay=0.1), 0.5)])
def test_the_mixture_does_not_tell_where_the_local_model_rests_or_decays(plan, alpha):
    assert not tells(plan, alpha, adaptive=False)


def test_alpha_goes_on_from_where_it_was_and_is_mixed_in_from_the_next_round():
    kept = packed(split_state(tiny(seed=5))) | {"alpha": torch.tensor(0.25).double()}
    adaptive, _ = done(APFL(0.9), kept=kept)
    fixed, _ = done(APFL(0.25, adaptive=False), kept={n: t for n, t in kept.items() if "/" in n})
    assert hashed(adaptive.used) == hashed(fixed.used)
    assert float(fixed.kept["alpha"]) == 0.25 != float(adaptive.kept["alpha"])
    assert 0 <= float(adaptive.kept["alpha"]) <= 1


def test_a_mixture_by_hand():
    own, other = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    own.weight.data.fill_(2.0)
    other.weight.data.fill_(10.0)
    assert mixture(own, other, 0.25)["weight"].item() == 8.0  # 0.25 * 2 + 0.75 * 10


def test_alpha_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"alpha must be between 0 and 1, got 1\.5"):
        APFL(1.5)
