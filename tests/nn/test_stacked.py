"""Models side by side give what each gives by itself, and hold no more than they hold apart."""

from functools import partial

import pytest
import torch
from torch import nn

from fedmoe.nn.classifier import dense_classifier
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.moe import MoE
from fedmoe.nn.stacked import forward, likeness, stack_models
from fedmoe.nn.stages import stages_of
from fedmoe.nn.tabular import vowel_mlp
from fedmoe.nn.vision import dense_cnn, flat_moe
from fedmoe.state import moe_layers

HELD = ([0, 1, 2, 3], [1, 3], [0, 2, 3])
CPU = torch.device("cpu")


def models(make):
    made = [make(seed=i) for i in range(len(HELD))]
    for model, own in zip(made, HELD, strict=True):
        for _, moe in moe_layers(model):
            moe.hold(own)
    return made


def side_by_side(made, x_KBD, keep_KB=None, first=None):
    stacked = stack_models([stages_of(m) for m in made], CPU)
    num = len(made) if first is None else first
    leaves = {id(s): s.values[: stacked.pairs(s, num)] for s in stacked.stacks}
    return stacked, forward(stacked, leaves, x_KBD[:num], keep_KB)


@pytest.mark.parametrize(
    "make",
    [
        partial(flat_moe, 10, 8, 4, 6, num_classes=3),
        partial(vowel_mlp, 10, 8, 4, 6, 2, 3),
        partial(vowel_mlp, 10, 8, 4, 6, 2, 3, gate_mass="full"),
        partial(vowel_mlp, 10, 8, 4, 6, 2, 3, gate_mass="sum"),
    ],
    ids=["residual", "renormalised", "full", "summed"],
)
@pytest.mark.parametrize("first", [1, 2, 3])
def test_the_first_models_give_what_each_gives_alone(make, first):
    made = models(make)
    x_KBD = torch.randn(3, 7, 10, generator=torch.Generator().manual_seed(0))
    _, (logit_PBO, [choices]) = side_by_side(made, x_KBD, first=first)
    assert len(logit_PBO) == first
    for model, x_BD, logit_BO in zip(made, x_KBD, logit_PBO, strict=False):
        torch.testing.assert_close(logit_BO, model(x_BD), rtol=0, atol=1e-6)
    for own, best_BC in zip(HELD, choices.best_PBC, strict=False):
        assert set(best_BC.flatten().tolist()) <= set(own)


def test_an_example_that_is_padding_weighs_nothing():
    made = models(partial(flat_moe, 10, 8, 4, 6, num_classes=3))
    keep_KB = torch.tensor([[True, True], [True, False], [False, True]])
    _, (_, [choices]) = side_by_side(made, torch.ones(3, 2, 10), keep_KB)
    assert ((choices.weight_PBC != 0).all(-1) == keep_KB).all()


def test_an_expert_that_is_not_held_takes_no_memory():
    stacked, _ = side_by_side(models(partial(flat_moe, 10, 8, 4, 6)), torch.ones(3, 2, 10))
    [mixture] = stacked.mixtures
    assert len(mixture.up.values) == len(mixture.down.values) == sum(map(len, HELD))
    assert mixture.ends == [0, 4, 6, 9]


def test_what_was_changed_side_by_side_is_given_back_to_each():
    made = models(partial(vowel_mlp, 10, 8, 4, 6, 2, 3))
    stacked = stack_models([stages_of(m) for m in made], CPU)
    before = [[p.detach().clone() for p in m.parameters()] for m in made]
    for s in stacked.stacks:
        s.values.add_(1.0)
        s.give_back()
    for model, old in zip(made, before, strict=True):
        for p, q in zip(model.parameters(), old, strict=True):
            assert torch.equal(p.detach(), q + 1.0)


def test_only_models_of_the_same_shapes_are_alike():
    def of(make):
        return likeness(stages_of(make()))

    flat = partial(flat_moe, 10, 8, 4, 6)
    part = flat()
    part[3].inner.hold([1])
    assert of(flat) == likeness(stages_of(part))
    assert of(flat) != of(partial(flat, k=2)) != of(partial(flat, k=2, gate_mass="renormalise"))
    assert of(flat) != of(partial(flat_moe, 10, 8, 4, 7))
    dense = partial(dense_classifier, nn.Flatten, 10, 5, 3)
    assert of(dense) is not None and of(dense) != of(flat)
    assert of(dense_cnn) is None
    unlike = MoE(TopKGate(4, 2, 1), {0: FFN(4, 5), 1: FFN(4, 6)}, 2)
    assert likeness(stages_of(unlike)) is None
