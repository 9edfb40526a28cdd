from dataclasses import replace

import torch

from fedmoe.federated.local import LocalPlan, LocalTask
from fedmoe.federated.methods.kept import kept_with, own_model, packed, unpacked, values_of
from fedmoe.rng import torch_generator
from fedmoe.state import build_part, load_state, named_by_role, rows_of, split_state, state_hash
from fedmoe.types import ExpertId
from tests.tiny import client_data, ragged, tiny

CPU = torch.device("cpu")


def held(*numbers):
    return frozenset(ExpertId(0, e) for e in numbers)


def part(numbers, seed=0, rows=False):
    """A tiny model with these experts; with `rows` it knows the gate rows of the others too."""
    state = split_state(tiny(seed=seed))
    model = build_part(tiny, held(*numbers))
    absent = rows_of(state, frozenset(state.experts) - held(*numbers)) if rows else {}
    load_state(model, state.only(held(*numbers)), absent)
    return model


def task(model, kept=None):
    return LocalTask(
        0, model, client_data(0).train, LocalPlan(), torch_generator(0), CPU, kept or {}, {}
    )


def test_packing_loses_nothing_and_unpacking_leaves_other_tensors_out():
    for make in (tiny, ragged):
        state = split_state(make())
        flat = packed(state) | {"alpha": torch.zeros(())}
        assert state_hash(unpacked(flat)) == state_hash(state)


def test_a_client_without_a_model_of_its_own_takes_what_it_was_sent_and_shares_no_memory():
    model = part([0, 2])
    own = own_model(task(model))
    assert state_hash(split_state(own)) == state_hash(split_state(model))
    next(own.parameters()).data.add_(1.0)
    assert state_hash(split_state(own)) != state_hash(split_state(model))


def test_experts_that_a_client_no_longer_holds_stay_stored_and_come_back():
    first = part([0, 1], seed=1)
    kept = kept_with(task(first), first)
    second = part([1, 2])
    own = own_model(task(second, kept))
    state, sent, left = split_state(own), split_state(second), split_state(first)
    assert state_hash(state.only(held(1))) == state_hash(left.only(held(1)))
    assert torch.equal(
        state.experts[ExpertId(0, 2)]["up.weight"], sent.experts[ExpertId(0, 2)]["up.weight"]
    )
    kept = kept_with(task(second, kept), own)
    again = own_model(task(part([0, 2]), kept))
    assert state_hash(split_state(again).only(held(0))) == state_hash(left.only(held(0)))
    assert kept.keys() >= {"expert/0.0/up.weight", "expert/0.1/up.weight", "expert/0.2/up.weight"}


def test_gate_rows_of_experts_that_are_not_held_stay_known():
    model = part([0, 1], rows=True)
    own = own_model(task(model))
    assert own.head.gate.known_E.all()
    assert torch.equal(own.head.gate.proj.weight, model.head.gate.proj.weight)


def test_what_a_method_kept_beside_a_model_stays():
    model = part([0])
    kept = kept_with(replace(task(model), kept={"alpha": torch.ones(())}), model)
    assert kept["alpha"] == 1.0


def test_values_are_copies_by_role():
    model = tiny()
    values = values_of(model)
    before = {n: p.detach().clone() for n, p in named_by_role(model)}
    for p in model.parameters():
        p.data.add_(1.0)
    assert values.keys() == before.keys()
    assert all(torch.equal(values[n], t) for n, t in before.items())
