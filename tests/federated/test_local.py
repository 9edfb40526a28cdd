import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from fedmoe.data.examples import ClientData, Examples
from fedmoe.federated.average import average_by_expert
from fedmoe.federated.local import (
    LocalPlan,
    Phase,
    accuracy,
    fedper,
    fedrep,
    frozen_router,
    loss_on,
    own_part,
    private_router,
    profile_data,
    scouted,
    train,
    work,
)
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.init import seeded
from fedmoe.nn.losses import load_balance_loss, z_loss
from fedmoe.nn.moe import MoE
from fedmoe.profile import FREQUENCY_ERROR, MASS_ERROR, watch_gates
from fedmoe.rng import torch_generator
from fedmoe.state import (
    ROW,
    everything,
    is_expert,
    is_gate,
    named_by_role,
    nothing,
    other_than,
    rows_of,
    split_state,
    state_hash,
    take_names,
)
from fedmoe.types import Assignment, ExpertId, Job, MoEState, Routing
from tests.tiny import CLASSES, IN, D, client_data, examples, ragged, tiny

CPU = torch.device("cpu")
DATA = client_data(0)
PLAN = LocalPlan((Phase(epochs=2),), lr=0.1, momentum=0.5, batch_size=5)
WHOLE = frozenset(ExpertId(0, e) for e in range(4))


def held(*numbers):
    return frozenset(ExpertId(0, e) for e in numbers)


def assignment(sub_moe=WHOLE, seed=0, **changes):
    return replace(Assignment(3, split_state(tiny(seed=seed)).only(sub_moe), sub_moe), **changes)


def do(a=None, plan=PLAN, personal=None, data=DATA, client=0, seed=0, factory=tiny):
    return work(client, a or assignment(), factory, data, plan, personal, seed)


def is_stem(name):
    return name.startswith("stem.")


def hashed(state):
    return None if state is None else state_hash(state)


def moved(before, after):
    """The roles of parameters that differ."""
    names = dict(named_by_role(after))
    return {n for n, p in named_by_role(before) if not torch.equal(p, names[n])}


def trained(plan, make=tiny, data=DATA):
    model = make()
    train(model, data.train, plan, torch_generator(0), CPU)
    return model


# Steps, by their definition


def sgd_by_definition(model, data, plan, generator):
    """Every parameter by itself, in explicit arithmetic; dense models."""
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    velocity = {}
    for phase in plan.phases:
        velocity.clear()  # a phase begins anew
        for _ in range(phase.epochs):
            order = torch.randperm(len(data.y), generator=generator)
            for i in range(0, len(order), plan.batch_size):
                batch = order[i : i + plan.batch_size]
                loss = nn.functional.cross_entropy(
                    model(data.x[batch]), data.y[batch], label_smoothing=plan.label_smoothing
                )
                drift = sum(((p - start[n]) ** 2).sum() for n, p in model.named_parameters())
                loss = loss + plan.proximal / 2 * drift
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                with torch.no_grad():
                    for (n, p), g in zip(model.named_parameters(), gradients, strict=True):
                        if not phase.trains(n):
                            continue
                        g = g + plan.weight_decay * p
                        if n in velocity:
                            g = plan.momentum * velocity[n] + g
                        velocity[n] = g
                        p -= plan.lr * g


def dense():
    return seeded(lambda: nn.Sequential(nn.Linear(IN, D), nn.Tanh(), nn.Linear(D, CLASSES)), 0)


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        replace(PLAN, weight_decay=0.1),
        replace(PLAN, proximal=0.5, momentum=0.0),
        replace(PLAN, proximal=0.5, weight_decay=0.1, label_smoothing=0.2),
        replace(PLAN, phases=(Phase(lambda n: "0." in n, 1), Phase(lambda n: "2." in n, 2))),
        replace(PLAN, phases=(Phase(epochs=1), Phase(lambda n: "bias" in n, 1), Phase(epochs=1))),
    ],
    ids=["momentum", "decay", "proximal", "all", "two phases", "three phases"],
)
def test_training_equals_its_definition(plan):
    model, slow = dense(), dense()
    train(model, DATA.train, plan, torch_generator(7), CPU)
    sgd_by_definition(slow, DATA.train, plan, torch_generator(7))
    for p, q in zip(model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_two_fedprox_steps_worked_by_hand():
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    one = Examples(torch.ones(1, 1), torch.tensor([0]))
    plan = LocalPlan((Phase(epochs=2),), lr=1.0, batch_size=1, proximal=0.1)
    train(model, one, plan, torch_generator(0), CPU)
    # Step 1 from 0: softmax - label is (-0.5, 0.5), and there is nothing to pull back to yet.
    # Step 2 from (0.5, -0.5): (s - 1, 1 - s) with s = sigmoid(1), plus 0.1 * (0.5, -0.5).
    gradient = 1 / (1 + math.exp(-1.0)) - 1 + 0.1 * 0.5
    torch.testing.assert_close(
        model.weight.detach(), torch.tensor([[0.5 - gradient], [gradient - 0.5]])
    )


@pytest.mark.parametrize(
    "clip, step",
    [(None, 0.5), (10.0, 0.5), (0.1 * math.sqrt(2), 0.1)],
    ids=["none", "wide", "tight"],
)
def test_a_clipped_step_worked_by_hand(clip, step):
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    one = Examples(torch.ones(1, 1), torch.tensor([0]))
    train(model, one, LocalPlan(lr=1.0, batch_size=1, clip=clip), torch_generator(0), CPU)
    # The gradient from 0 is (-0.5, 0.5), of norm sqrt(0.5); 0.1 * sqrt(2) makes it (-0.1, 0.1).
    torch.testing.assert_close(
        model.weight.detach(), torch.tensor([[step], [-step]]), rtol=1e-5, atol=1e-5
    )


def test_routing_losses_are_added_with_their_weights_for_every_layer():
    data, plans = DATA.train, {}
    for name in ("plain", "balance", "z"):
        extra = {} if name == "plain" else {name: 0.3}
        plans[name] = LocalPlan((Phase(epochs=1),), lr=1.0, batch_size=len(data.y), **extra)
    step = {n: trained(plan, ragged) for n, plan in plans.items()}
    for name in ("balance", "z"):
        model = ragged().train()
        with watch_gates(model) as routings:
            model(data.x)
        pairs = [(routings[0], model.first.present_E), (routings[1], model.second.present_E)]
        loss = sum(load_balance_loss(r, e) if name == "balance" else z_loss(r) for r, e in pairs)
        gradients = torch.autograd.grad(0.3 * loss, list(model.parameters()), allow_unused=True)
        for p, q, g in zip(
            step["plain"].parameters(), step[name].parameters(), gradients, strict=True
        ):
            torch.testing.assert_close(p - q, torch.zeros_like(p) if g is None else g)


def test_the_loss_is_the_mean_over_examples_and_epochs():
    model = tiny()
    # Batches of 5, 5 and 2; without what is added for balance.
    plan = LocalPlan((Phase(epochs=3),), lr=0.0, batch_size=5, balance=9.0)
    _, loss = train(model, DATA.train, plan, torch_generator(0), CPU)
    wanted = nn.functional.cross_entropy(model(DATA.train.x), DATA.train.y)
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-6)


# Unused experts stay as they are


class ByFirst(nn.Module):
    """A gate that sends each token to the expert that its first number names."""

    def forward(self, x_TD, present_E):
        chosen_TE = nn.functional.one_hot(x_TD[:, 0].long(), len(present_E)).float() * present_E
        return Routing(chosen_TE, chosen_TE)


class ZeroGradients(MoE):
    """A layer whose unused experts have gradients of 0, where `MoE` gives them none."""

    def forward(self, x, keep=None):
        return super().forward(x, keep) + 0 * sum(p.sum() for p in self.experts.parameters())


def switched(layer=MoE):
    return seeded(
        lambda: nn.Sequential(layer(ByFirst(), {e: FFN(IN, 3, CLASSES) for e in range(3)}, 3)), 3
    )


def tokens_for(*experts):
    x_NI = torch.randn(len(experts), IN, generator=torch.Generator().manual_seed(2))
    x_NI[:, 0] = torch.tensor(experts)
    return Examples(x_NI, torch.arange(len(experts)) % CLASSES)


ROUGH = LocalPlan((Phase(epochs=3),), lr=0.1, momentum=0.9, weight_decay=0.3, batch_size=1)


def numbers(model, e):
    return [p.detach().clone() for p in model[0].experts[str(e)].parameters()]


LAYERS = pytest.mark.parametrize("layer", [MoE, ZeroGradients], ids=lambda c: c.__name__)


@LAYERS
def test_an_expert_without_a_token_in_a_round_does_not_drift_by_momentum_or_decay(layer):
    model = switched(layer)
    before = split_state(model)
    profile, _ = train(model, tokens_for(0, 2, 2, 0), ROUGH, torch_generator(0), CPU)
    assert profile.count_LE.tolist() == [[6, 0, 6]]
    after = split_state(model)
    for e in range(3):
        same = all(
            torch.equal(t, after.experts[ExpertId(0, e)][n])
            for n, t in before.experts[ExpertId(0, e)].items()
        )
        assert same == (e == 1)


@LAYERS
def test_an_expert_without_a_token_in_a_step_does_not_drift_in_that_step(layer):
    # So it ends where it would have ended had the other experts' examples not been there.
    data = tokens_for(0, 1, 0, 1, 1, 0)
    model, alone = switched(layer), switched()
    order = torch.cat([torch.randperm(6, generator=g) for g in [torch_generator(0)] for _ in "abc"])
    train(model, data, ROUGH, torch_generator(0), CPU)
    optimizer = torch.optim.SGD(
        alone[0].experts["1"].parameters(), lr=0.1, momentum=0.9, weight_decay=0.3
    )
    for i in order.tolist():
        if data.x[i, 0] == 1:
            loss = nn.functional.cross_entropy(alone(data.x[i : i + 1]), data.y[i : i + 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for p, q in zip(numbers(model, 1), numbers(alone, 1), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("proximal", [0.0, 0.5])
def test_what_no_client_used_is_the_same_bit_for_bit_after_the_average_too(proximal):
    plan = LocalPlan(
        (Phase(epochs=3),), lr=0.1, momentum=0.9, weight_decay=0.3, balance=0.1, proximal=proximal
    )
    factory, updates = partial(tiny, num_experts=8), []
    model = split_state(factory())
    whole = frozenset(model.experts)
    for client in (0, 2):
        a = Assignment(0, model, whole)
        data = client_data(client, num_train=3)  # too few for eight experts
        updates.append(do(a, plan, data=data, client=client, factory=factory)[0])
    counts = sum(u.profile.count_LE for u in updates)[0]
    assert 0 < (counts == 0).sum() < 8
    merged = average_by_expert(model, updates)
    for e in sorted(whole):
        same = all(torch.equal(t, merged.experts[e][n]) for n, t in model.experts[e].items())
        assert same == (counts[e.expert] == 0)
    # Experts that a client did not use are not sent back; they did not move on it either.
    for u in updates:
        assert u.model.experts.keys() == {e for e in whole if u.profile.count_LE[e]}
    after = tiny(num_experts=8)
    profile, _ = train(after, client_data(0, num_train=3).train, plan, torch_generator(0), CPU)
    for e, own in split_state(after).experts.items():
        if not profile.count_LE[e]:
            assert all(
                n.startswith(ROW) or torch.equal(t, model.experts[e][n]) for n, t in own.items()
            )


# Phases


def test_a_phase_moves_only_what_it_names():
    roles = {n for n, _ in named_by_role(tiny())}
    for test in (is_stem, is_gate, is_expert, lambda n: n.startswith("experts.0.2.")):
        plan = replace(PLAN, phases=(Phase(test, 2),), balance=0.1, weight_decay=0.1)
        assert moved(tiny(), trained(plan)) <= {n for n in roles if test(n)}
    stem = replace(PLAN, phases=(Phase(is_stem, 1),))
    assert moved(tiny(), trained(stem)) == {"stem.weight", "stem.bias"}


def test_a_phase_of_experts_that_a_batch_does_not_use_leaves_them_alone_in_it():
    plan = replace(ROUGH, phases=(Phase(lambda n: n.startswith("experts.0.1."), 2),))
    model, untouched = switched(), switched()
    train(model, tokens_for(0, 2, 0), plan, torch_generator(0), CPU)
    assert hashed(split_state(model)) == hashed(split_state(untouched))
    train(model, tokens_for(0, 1, 0), plan, torch_generator(0), CPU)
    assert {n.split(".")[2] for n in moved(untouched, model)} == {"1"}


def test_phases_follow_one_another_on_what_those_before_left():
    two = replace(PLAN, phases=(Phase(is_stem, 1), Phase(is_expert, 1)), momentum=0.0)
    model, generator = tiny(), torch_generator(0)
    for phase in two.phases:
        train(model, DATA.train, replace(two, phases=(phase,)), generator, CPU)
    assert hashed(split_state(model)) == hashed(split_state(trained(two)))


def test_the_profile_is_of_all_phases_and_epochs():
    plan = replace(PLAN, phases=(Phase(is_stem, 1), Phase(is_expert, 2), Phase(nothing, 5)))
    profile, _ = train(tiny(k=2), DATA.train, plan, torch_generator(0), CPU)
    assert profile.token_L.tolist() == [3 * 12]
    assert profile.count_LE.sum().item() == 2 * 3 * 12


def test_everything_can_be_trained_again_after_a_phase_that_could_not():
    model = tiny()
    train(model, DATA.train, replace(PLAN, phases=(Phase(is_stem, 1),)), torch_generator(0), CPU)
    assert all(p.requires_grad for p in model.parameters())


def test_a_frozen_router_never_moves():
    plan = frozen_router(replace(PLAN, balance=1.0, weight_decay=0.1))
    assert not {n for n in moved(tiny(), trained(plan)) if is_gate(n)}
    assert moved(tiny(), trained(plan)) and plan.personal is nothing


# What stays on the client


def test_without_personal_parameters_all_that_came_goes_back_and_nothing_is_kept():
    for sub_moe in (WHOLE, held(1), held(0, 3)):
        update, mine = do(assignment(sub_moe))
        used = {e for e in sub_moe if update.profile.count_LE[e]}
        assert used and update.model.experts.keys() == used
        sent = assignment(sub_moe).model
        assert update.model.shared.keys() == sent.shared.keys()
        assert all(update.model.experts[e].keys() == sent.experts[e].keys() for e in used)
        assert mine is not None and not mine.shared and not mine.experts
        assert (update.client, update.num_examples) == (0, 12)


def test_a_personal_head_is_never_sent_and_the_next_round_begins_with_it():
    plan = fedper(is_stem, PLAN)
    first, mine = do(plan=plan)
    assert not any(is_stem(n) for n in first.model.shared)
    assert mine.shared.keys() == {"stem.weight", "stem.bias"} and not mine.experts
    # At first it is what the factory makes, whatever the server sends along.
    other = assignment(seed=5)
    bare = replace(other, model=take_names(other.model, other_than(is_stem)))
    again, kept = do(bare, plan, mine)
    assert hashed(kept) != hashed(mine)
    lazy = replace(plan, lr=0.0)
    assert hashed(do(bare, lazy, mine)[1]) == hashed(mine)
    start = take_names(split_state(tiny()), is_stem)
    assert hashed(do(bare, lazy)[1]) == hashed(start)
    assert hashed(do(other, plan, mine)[0].model) == hashed(again.model)


def test_fedrep_trains_the_head_first_on_the_body_as_it_arrived_and_then_the_body():
    plan = fedrep(is_stem, PLAN, head_epochs=3)
    head, body = plan.phases
    assert (head.trains("stem.bias"), head.trains("experts.0.1.up.bias"), head.epochs) == (1, 0, 3)
    assert (body.trains("stem.bias"), body.trains("experts.0.1.up.bias"), body.epochs) == (0, 1, 2)
    assert plan.personal is is_stem
    update, mine = do(plan=plan)
    assert not any(is_stem(n) for n in update.model.shared) and mine.shared.keys() == {
        "stem.weight", "stem.bias"
    }


def test_a_private_router_stays_and_its_experts_go():
    update, mine = do(assignment(held(1, 2)), private_router(PLAN))
    assert all(not n.startswith(ROW) for s in update.model.experts.values() for n in s)
    assert {e: set(s) for e, s in mine.experts.items()} == {
        e: {ROW + "proj.weight"} for e in held(1, 2)
    }
    both = private_router(fedper(is_stem, PLAN)).personal
    assert both("gates.0.proj.weight") and both("stem.bias") and not both("experts.0.0.up.bias")


def test_with_everything_personal_rounds_are_local_training_alone():
    plan, personal = replace(PLAN, personal=everything), None
    model = tiny()
    for round in range(3):
        nothing_sent = Assignment(round, MoEState({}, {}), WHOLE)
        update, personal = do(nothing_sent, plan, personal)
        assert not update.model.shared and not update.model.experts
        train(model, DATA.train, plan, torch_generator(0, round, 0), CPU)
    assert hashed(personal) == hashed(split_state(model))


def test_personal_experts_begin_as_the_factory_makes_them_and_wait_while_not_held():
    plan = replace(PLAN, personal=is_expert)

    def sent(sub_moe):
        state = take_names(split_state(tiny()), other_than(is_expert))
        return Assignment(3, state.only(sub_moe), sub_moe)

    _, mine = do(sent(held(0, 1)), plan)
    assert mine.experts.keys() == held(0, 1)
    start = take_names(split_state(tiny()), is_expert)
    _, later = do(sent(held(1, 2)), replace(plan, lr=0.0), mine)
    assert later.experts.keys() == held(0, 1, 2)
    for e, wanted in ((0, mine), (1, mine), (2, start)):
        for n, t in wanted.experts[ExpertId(0, e)].items():
            assert torch.equal(later.experts[ExpertId(0, e)][n], t)
    part = own_part(tiny, held(2, 0), is_expert, mine)
    assert part.experts.keys() == held(0, 2)
    assert own_part(tiny, held(0), nothing, None).experts == {}


def test_an_expert_that_nobody_sent_is_missed_by_name():
    a = replace(assignment(held(0)), sub_moe=held(0, 2, 3))
    with pytest.raises(ValueError, match=r"was assigned expert 2 of layer 0.*\(2 in all\)"):
        do(a)


def test_an_expert_that_was_not_assigned_is_refused():
    with pytest.raises(ValueError, match="expert 1 of layer 0 is not in the model"):
        do(replace(assignment(held(0, 1)), sub_moe=held(0)))


# Jobs

FOUR = {"received_validation", "received_test", "trained_validation", "trained_test"}


def scout_job(sub_moe=frozenset(), model=None):
    model = model or split_state(tiny())
    absent = frozenset(model.experts) - sub_moe
    rows = rows_of(model, absent)
    return Assignment(
        0, model.only(sub_moe), sub_moe, Job.SCOUT, evaluate=True, absent_rows=rows
    )


def test_a_scout_takes_no_step_and_says_where_its_data_would_go():
    update, mine = do(scout_job(), personal=None)
    assert not update.model.shared and not update.model.experts and mine is None
    assert update.metrics.keys() == {MASS_ERROR, FREQUENCY_ERROR} and update.num_examples == 12
    wanted = profile_data(tiny(), DATA.train, CPU)
    for name in ("count_LE", "token_L"):
        assert torch.equal(getattr(update.profile, name), getattr(wanted, name))
    for name in ("weight_LE", "score_LE"):
        torch.testing.assert_close(getattr(update.profile, name), getattr(wanted, name))
    assert update.profile.token_L.tolist() == [12]


def test_a_scout_tells_how_far_off_its_shares_may_be():
    model = tiny()
    x_N = torch.randn(8000, 3, generator=torch.Generator().manual_seed(0))
    many = Examples(x_N, torch.zeros(8000, dtype=torch.int64))
    errors = [
        scouted(model, Examples(*(t[i : i + 50] for t in many)), torch_generator(0, 0, i), CPU)[1]
        for i in range(0, 8000, 50)
    ]
    # What they say is what happens: the mean squared distance of 50 examples' shares from all's.
    whole = profile_data(model, many, CPU)
    parts = [
        profile_data(model, Examples(*(t[i : i + 50] for t in many)), CPU)
        for i in range(0, 8000, 50)
    ]
    for name, share in ((MASS_ERROR, "mass_LE"), (FREQUENCY_ERROR, "frequency_LE")):
        off = [((getattr(p, share) - getattr(whole, share)) ** 2).sum() for p in parts]
        told = sum(e[name] for e in errors) / len(errors)
        assert told == pytest.approx(float(sum(off)) / len(off), rel=0.15)


def test_of_one_example_there_is_no_error_to_tell():
    one = Examples(DATA.train.x[:1], DATA.train.y[:1])
    profile, errors = scouted(tiny(), one, torch_generator(0, 0, 0), CPU)
    assert errors == {} and profile.token_L.tolist() == [1]


@pytest.mark.parametrize("test", [is_gate, everything], ids=["router", "everything"])
def test_a_scout_whose_router_is_its_own_looks_through_that(test):
    plan = replace(PLAN, personal=test)
    # With what it trained last time, or at first with what everybody starts from.
    for model, personal in ((tiny(seed=4), True), (tiny(), False)):
        own = take_names(split_state(model), test) if personal else None
        job = scout_job(model=split_state(model))
        sent = take_names(job.model, other_than(test))
        update, mine = do(replace(job, model=sent, absent_rows={}), plan, own)
        wanted = profile_data(model, DATA.train, CPU)
        assert update.profile.count_LE.tolist() == wanted.count_LE.tolist()
        assert mine is own


def test_evaluation_tells_four_accuracies_and_keeps_what_it_trained_to_itself():
    a = assignment(held(0, 2), job=Job.EVALUATE, evaluate=True)
    plan = fedper(is_stem, PLAN)
    own = take_names(split_state(tiny(seed=3)), is_stem)
    update, mine = do(a, plan, own)
    assert not update.model.shared and not update.model.experts and mine is own
    assert not update.profile.count_LE.any() and update.profile.count_LE.shape == (1, 4)
    assert update.metrics.keys() == {"loss", *FOUR}


def test_the_four_accuracies_are_those_before_and_after_training():
    a = assignment(evaluate=True)
    update, _ = do(a)
    before, after = tiny(), tiny()
    train(after, DATA.train, PLAN, torch_generator(0, 3, 0), CPU)
    for name, model in (("received", before), ("trained", after)):
        for part in ("validation", "test"):
            x, y = getattr(DATA, part)
            right = sum(int(model(x[i : i + 1]).argmax()) == int(y[i]) for i in range(len(y)))
            assert update.metrics[f"{name}_{part}"] == right / len(y)
    assert hashed(update.model) == hashed(split_state(after).only(frozenset(update.model.experts)))


@pytest.mark.parametrize(
    "validate, evaluate, names",
    [
        (False, False, set()),
        (True, False, {"trained_validation"}),
        (False, True, FOUR),
    ],
)
def test_accuracies_are_measured_only_when_asked_for(validate, evaluate, names):
    update, _ = do(assignment(validate=validate, evaluate=evaluate))
    assert update.metrics.keys() - {"loss"} == names


def test_being_evaluated_does_not_change_what_is_trained():
    plain, _ = do(assignment())
    judged, _ = do(assignment(evaluate=True, validate=True))
    assert hashed(plain.model) == hashed(judged.model)


def test_parts_without_examples_have_no_accuracy():
    none = examples(0, 1)
    data = ClientData(DATA.train, none, DATA.test)
    update, _ = do(assignment(evaluate=True), data=data)
    assert update.metrics.keys() == {"received_test", "trained_test", "loss"}
    assert math.isnan(accuracy(tiny(), none, CPU))


def test_accuracy_and_profile_are_over_all_batches():
    many = examples(1203, seed=5)  # more than two batches of an evaluation
    model = tiny()
    right = (model(many.x).argmax(-1) == many.y).double().mean()
    assert accuracy(model, many, CPU) == pytest.approx(float(right), abs=1e-12)
    assert profile_data(model, many, CPU).token_L.tolist() == [1203]


@pytest.mark.parametrize("look", [accuracy, profile_data], ids=lambda f: f.__name__)
def test_looking_at_a_model_changes_nothing_of_it(look):
    model = ragged().train()  # whose normalisation moves with what it sees while training
    before = hashed(split_state(model))
    first = look(model, DATA.train, CPU)
    assert hashed(split_state(model)) == before
    again = look(model, DATA.train, CPU)
    assert first == again or torch.equal(first.score_LE, again.score_LE)


# Determinism


def test_the_same_seed_round_and_client_give_the_same_bits_and_others_do_not():
    def of(seed=0, round=3, client=0):
        return hashed(do(assignment(round=round), seed=seed, client=client)[0].model)

    assert of() == of()
    assert len({of(), of(seed=1), of(round=4), of(client=1)}) == 4


def test_the_global_generator_is_left_alone_and_does_not_matter():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = do()[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert hashed(do()[0].model) == hashed(first.model)


def test_work_changes_neither_the_assignment_nor_what_the_client_had():
    plan = fedper(is_stem, PLAN)
    a, own = assignment(), take_names(split_state(tiny(seed=3)), is_stem)
    before = hashed(a.model), hashed(own)
    do(a, plan, own)
    assert (hashed(a.model), hashed(own)) == before


def test_a_model_of_several_layers_is_trained_in_parts_too():
    sub_moe = frozenset({ExpertId(0, 0), ExpertId(0, 2), ExpertId(1, 1)})
    model = split_state(ragged())
    update, _ = do(Assignment(0, model.only(sub_moe), sub_moe), factory=ragged)
    assert update.model.experts.keys() == sub_moe
    assert update.profile.count_LE[1].tolist() == [0, 24, 0]  # 2 epochs of 12 examples
    assert update.profile.count_LE[0, 1] == 0
    # 2 epochs of 3 batches, counted by the normalisation, which is shared.
    assert update.model.shared["norm.num_batches_tracked"].item() == 6


# What is refused


def test_a_client_without_training_data_is_named():
    empty = ClientData(examples(0, 1), DATA.validation, DATA.test)
    with pytest.raises(ValueError, match="client 7 has no training examples"):
        do(data=empty, client=7)


def test_the_loss_on_examples_is_the_mean_however_many_fit_into_memory_at_once():
    model, (x, y) = tiny(), examples(1203, seed=4)
    wanted = nn.functional.cross_entropy(model(x), y).item()
    assert loss_on(model, Examples(x, y), CPU) == pytest.approx(wanted)
    assert math.isnan(loss_on(model, Examples(x[:0], y[:0]), CPU))


@pytest.mark.parametrize("lr", [1e30, 3e38])
def test_a_loss_that_is_not_finite_is_an_error_that_names_client_and_rate(lr):
    with pytest.raises(ValueError, match=r"client 7: the training loss must be finite.*lr than"):
        do(plan=replace(PLAN, lr=lr), client=7)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"phases": ()}, "phases must train for at least 1 epoch in all, got none"),
        ({"phases": (Phase(epochs=0),)}, "phases must train for at least 1 epoch"),
        ({"batch_size": 0}, "batch_size must be at least 1 example, got 0"),
        ({"lr": -0.1}, "lr must be a number of 0 or more, got -0.1"),
        ({"momentum": math.nan}, "momentum must be a number of 0 or more, got nan"),
        ({"weight_decay": math.inf}, "weight_decay must be a number of 0 or more, got inf"),
        ({"proximal": -1.0}, "proximal must be a number"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"balance": -1.0}, "balance must be a number"),
        ({"z": -1.0}, "z must be a number"),
        ({"label_smoothing": 1.5}, "label_smoothing must be between 0 and 1, got 1.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be between 0 and 1"),
    ],
)
def test_a_plan_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LocalPlan(**fields)


def test_numbers_too_small_for_their_exponent_count_as_nothing_where_clients_work():
    """They would slow every product down; see `device.flush_denormals`."""
    model = tiny()
    whole = split_state(model)
    held = frozenset(whole.experts)
    work(0, Assignment(0, whole, held), tiny, client_data(0), LocalPlan(), None, 0)
    smallest_normal = torch.tensor([torch.finfo(torch.float32).tiny])
    assert (smallest_normal / 2).item() == 0.0
    assert smallest_normal.item() > 0.0
