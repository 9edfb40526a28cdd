"""A model is told as stages only where every part of it is known exactly."""

import pytest
import torch
from torch import nn

from fedmoe.nn.classifier import dense_classifier
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.members import ChosenGate, Members
from fedmoe.nn.moe import MoE
from fedmoe.nn.sensors import motion_cnn
from fedmoe.nn.stages import (
    Convolution,
    Dense,
    Embedding,
    Mixture,
    UnknownPartError,
    only_member,
    parameters_of,
    stages_of,
)
from fedmoe.nn.tabular import vowel_mlp
from fedmoe.nn.text import CharacterStem, character_model
from fedmoe.nn.vision import ConvStem, Residual, dense_cnn, fashion_cnn, flat_moe, small_vit


def told(model):
    letters = {Dense: "d", Mixture: "m", Convolution: "c", Embedding: "e"}
    return "".join(letters[type(s)] for s in stages_of(model))


def moe(expert=FFN, gate=TopKGate):
    return MoE(gate(4, 3, 1), {e: expert(4, 5) for e in range(3)}, 3)


@pytest.mark.parametrize(
    "make, stages",
    [
        (flat_moe, "dmd"),
        (vowel_mlp, "dm"),
        (dense_cnn, "ccdd"),
        (fashion_cnn, "ccm"),
        (lambda: fashion_cnn(norm="batch"), "ccm"),
        (motion_cnn, "ccm"),
        (character_model, "edm"),
        (lambda: dense_classifier(nn.Flatten, 12, 5, 3), "dd"),
        (lambda: nn.Sequential(Residual(moe()), nn.Sequential(moe(), nn.Linear(4, 2))), "mmd"),
    ],
    ids=["flat", "vowel", "dense cnn", "cnn", "norms", "motion", "characters", "dense", "nested"],
)
def test_stages_are_told_in_order_with_every_parameter_once(make, stages):
    model = make()
    assert told(model) == stages
    ids = [id(p) for s in stages_of(model) for p in parameters_of(s)]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_activations_and_residuals_belong_to_their_stage():
    first, second, third = stages_of(
        nn.Sequential(nn.Linear(3, 4), nn.GELU(), Residual(moe()), nn.Linear(4, 2))
    )
    assert (first.activation, second.residual, third.activation) == ("gelu", True, None)
    assert [*second.experts] == [0, 1, 2]
    codes, mix = stages_of(CharacterStem(num_codes=9, context=5, embedding=3, dim=2))
    assert (codes.length, mix.activation) == (5, "relu")


class Other(FFN):
    def forward(self, x_ND):
        return 2 * super().forward(x_ND)


def hooked():
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].register_forward_hook(lambda *_: None)
    return model


def shared():
    one = nn.Linear(3, 3)
    return nn.Sequential(one, one)


def reading(**options):
    stem = CharacterStem(num_codes=9, context=5, embedding=3, dim=2)
    stem.embed = nn.Embedding(9, **{"embedding_dim": 3} | options)
    return stem


def normed(norm):
    stem = ConvStem((4, 8), norm="batch")
    stem.norm2 = norm
    return stem


def with_buffer():
    model = nn.Sequential(nn.Linear(3, 2))
    model.register_buffer("scale", torch.ones(1))
    return model


@pytest.mark.parametrize(
    "make, why",
    [
        (small_vit, "ViT is not known"),
        (lambda: nn.Sequential(nn.Embedding(9, 3)), "Embedding is not known"),
        (lambda: nn.Sequential(nn.Linear(3, 5), reading()), "what the model is given"),
        (lambda: reading(max_norm=1.0), "any norm"),
        (lambda: reading(padding_idx=0), "all must learn"),
        (lambda: reading(sparse=True), "must be dense"),
        (lambda: reading(scale_grad_by_freq=True), "must be dense, and as it is"),
        (lambda: reading(embedding_dim=4), "whole rows"),
        (lambda: normed(nn.GroupNorm(2, 8)), "normalisation GroupNorm is not known"),
        (lambda: normed(nn.BatchNorm2d(8, affine=False)), "must have a weight"),
        (lambda: normed(nn.BatchNorm2d(8, track_running_stats=False)), "running statistics"),
        (lambda: normed(nn.BatchNorm2d(8, momentum=None)), "with a momentum"),
        (lambda: normed(nn.BatchNorm2d(4)), "of 8 channels"),
        (lambda: normed(hooked()[0]), "Linear has a hook"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()), "Tanh is not known"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout()), "Dropout is not known"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), "ReLU must follow a linear map"),
        (lambda: nn.Sequential(moe(), nn.ReLU()), "ReLU must follow a linear map"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.GELU("tanh")), "GELU must be exact"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Flatten()), "before all linear maps"),
        (lambda: nn.Sequential(nn.Flatten(0), nn.Linear(3, 2)), "keep the examples apart"),
        (lambda: moe(expert=Other), "expert Other is not known"),
        (lambda: moe(gate=type("OtherGate", (TopKGate,), {})), "gate OtherGate is not known"),
        (lambda: Residual(nn.Linear(3, 3)), "Residual is not known"),
        (nn.Sequential, "got none"),
        (hooked, "has a hook"),
        (shared, "to one alone"),
        (with_buffer, "buffers"),
    ],
)
def test_what_is_not_known_is_not_told(make, why):
    with pytest.raises(UnknownPartError, match=why):
        stages_of(make())


def members(gate, **changes):
    inner = [nn.Linear(4, 3) for _ in range(2)]
    return Members(gate, inner, 3, changes.pop("shape", (4,)), **changes)


def test_of_several_members_the_chosen_one_is_told_with_its_inputs():
    model = members(ChosenGate(2, 1), shape=(2, 2))
    only = only_member(model)
    assert (only.member, only.num_members) == (1, 2)
    assert only.model is model.mixture.experts["1"].model
    rows, pictures = torch.arange(8.0).view(2, 4), torch.arange(8.0).view(2, 2, 2)
    assert torch.equal(only.inputs(rows), pictures) and torch.equal(only.inputs(pictures), pictures)
    assert only.inputs(torch.zeros(2, 4, 1)) is None


def absent():
    model = members(ChosenGate(2, 1))
    model.mixture.hold([0])
    return model


def with_hooked_member():
    model = members(ChosenGate(2, 1))
    model.mixture.experts["1"].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: members(ChosenGate(2)),
        lambda: members(TopKGate(4, 2, 1)),
        lambda: members(ChosenGate(2, 1), encoder=nn.Linear(4, 5), num_features=5),
        lambda: type("Other", (Members,), {})(ChosenGate(2, 1), [nn.Linear(4, 3)] * 2, 3, (4,)),
        lambda: nn.Linear(4, 3),
        absent,
        with_hooked_member,
    ],
    ids=["none chosen", "another gate", "encoder", "subclass", "no members", "absent", "hooked"],
)
def test_no_member_is_the_only_one(make):
    assert only_member(make()) is None
