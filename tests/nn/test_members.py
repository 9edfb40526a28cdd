from functools import partial

import pytest
import torch
from torch import nn

from fedmoe.nn.gates.ranking import RankingGate
from fedmoe.nn.init import seeded
from fedmoe.nn.members import ChosenGate, Members, of_gate
from fedmoe.profile import watch_gates
from fedmoe.state import build_part, load_state, named_by_role, split_state
from fedmoe.types import ExpertId

N, C, M, F = 9, 3, 4, 5
SHAPE = (1, 2, 3)


class Picture(nn.Module):
    """A classifier that needs the shape of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, C)

    def forward(self, image_NCHW):
        assert image_NCHW.shape[1:] == SHAPE
        return self.out(image_NCHW.sum((1, 2)))


class Double(nn.Module):
    """An encoder: six numbers to five."""

    out_dim = F

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, F)

    def forward(self, image_NCHW):
        return self.map(image_NCHW.flatten(1)).relu()


def members(encoder=True, gate=None, gate_mass="renormalise", seed=0, reads="input", **settings):
    def build():
        own = gate or RankingGate(F if encoder else 6, 7, M, gate_mass=gate_mass)
        models = [Picture() if reads == "input" else nn.Linear(F, C) for _ in range(M)]
        more = {"encoder": Double(), "num_features": F} if encoder else {}
        return Members(own, models, C, SHAPE, reads=reads, **more, **settings)

    return seeded(build, seed)


@pytest.fixture
def x():
    return torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(3))


def models_of(model):
    return {int(e): member.model for e, member in model.mixture.experts.items()}


@pytest.mark.parametrize("encoder", [True, False])
def test_the_result_is_the_log_of_the_mixture_of_probabilities(x, encoder):
    model = members(encoder)
    told_NF = model.encoder(x) if encoder else x.flatten(1)
    g_NM = model.mixture.gate(told_NF, torch.ones(M, dtype=torch.bool)).weight_TE
    y_NC = model(x)
    for n in range(N):
        p_C = sum(g_NM[n, m] * f(x[n : n + 1])[0].softmax(-1) for m, f in models_of(model).items())
        torch.testing.assert_close(y_NC[n], p_C.log())
    torch.testing.assert_close(y_NC.exp().sum(1), torch.ones(N))
    label_N = torch.arange(N) % C  # so the cross-entropy is the likelihood of the mixture
    nll = -y_NC[torch.arange(N), label_N].mean()
    torch.testing.assert_close(nn.functional.cross_entropy(y_NC, label_N), nll)


def test_logits_may_be_mixed_instead(x):
    model = members(mixes="logits")
    g_NM = model.mixture.gate(model.encoder(x), torch.ones(M, dtype=torch.bool)).weight_TE
    expected_NC = sum(g_NM[:, m : m + 1] * f(x) for m, f in models_of(model).items())
    torch.testing.assert_close(model(x), expected_NC)


def test_weight_of_absent_members_goes_to_all_classes_evenly(x):
    model = members(gate_mass="full")
    model.mixture.hold([1])
    g_N = model.mixture.gate(model.encoder(x), torch.ones(M, dtype=torch.bool)).score_TE[:, 1:2]
    p_NC = g_N * models_of(model)[1](x).softmax(-1) + (1 - g_N) / C
    torch.testing.assert_close(model(x).exp(), p_NC)
    assert (g_N < 0.9).all()


def test_alone_with_one_member_it_is_that_member(x):
    for part in (members(), members().eval()):
        part.mixture.hold([2])
        torch.testing.assert_close(part(x), models_of(part)[2](x).log_softmax(-1))


def test_a_member_that_is_used_alone_answers_alone(x):
    model = members().eval()
    with watch_gates(model) as seen:
        y_NC = model(x)
    chosen_N = seen[0].weight_TE.argmax(1)
    assert len(chosen_N.unique()) > 1
    for n, m in enumerate(chosen_N.tolist()):
        torch.testing.assert_close(y_NC[n], models_of(model)[m](x[n : n + 1])[0].log_softmax(-1))


def test_rows_hold_the_features_so_that_they_are_not_computed_again(x):
    model = members()
    row_ND = model.rows(x)
    assert torch.equal(row_ND, torch.cat([x.flatten(1), model.encoder(x)], 1))
    assert model.rows(row_ND) is row_ND
    expected_NC = model(x)
    model.encoder.map.weight.data.zero_()
    torch.testing.assert_close(model(row_ND), expected_NC)
    assert not torch.allclose(model(x), expected_NC)


def test_codes_of_symbols_pass_unchanged():
    def build():
        models = [nn.Sequential(Codes(), nn.Linear(6, C)) for _ in range(2)]
        return Members(ChosenGate(2, member=1), models, C, (6,))

    class Codes(nn.Module):
        def forward(self, code_NT):
            return code_NT.long().float() / 255

    model, code_NT = seeded(build, 0), torch.randint(0, 256, (N, 6), dtype=torch.uint8)
    torch.testing.assert_close(model(code_NT), models_of(model)[1](code_NT).log_softmax(-1))


def test_no_gradient_reaches_the_encoder(x):
    model = members()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("encoder."), name


def test_members_may_stand_on_the_features_alone(x):
    model = members(reads="features").eval()
    with watch_gates(model) as seen:
        y_NC = model(x)
    feature_NF = model.encoder(x)
    for n, m in enumerate(seen[0].weight_TE.argmax(1).tolist()):
        torch.testing.assert_close(y_NC[n], models_of(model)[m](feature_NF[n]).log_softmax(-1))


def test_a_client_holds_any_of_the_members_and_no_other_takes_memory(x):
    full, factory = members(seed=5), partial(members, seed=5)
    part = build_part(factory, frozenset({ExpertId(0, 3)}))
    load_state(part, split_state(full).only(frozenset({ExpertId(0, 3)})))
    assert part.mixture.held == (3,)
    torch.testing.assert_close(part(x), models_of(full)[3](x).log_softmax(-1))
    assert set(split_state(full).experts) == {ExpertId(0, m) for m in range(M)}


def test_the_gate_set_from_outside_sends_all_to_one_member(x):
    model = members(encoder=False, gate=ChosenGate(M))
    for m in range(M):
        model.mixture.gate.member = m
        torch.testing.assert_close(model(x), models_of(model)[m](x).log_softmax(-1))
    model.mixture.hold([0, 1])
    torch.testing.assert_close(model(x).exp(), torch.full((N, C), 1 / C))  # member 3 is absent


def test_of_gate_names_the_gate_and_nothing_else():
    names = [name for name, _ in named_by_role(members())]
    assert [n for n in names if of_gate(n)] == [
        f"mixture.gate.{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"num_features": 6}, "the encoder must give 6 features, got 5"),
        ({"gate": RankingGate(6, 7, M)}, "the gate must read the encoder's 5 features, got 6"),
        ({"encoder": None}, "num_features must be .* got 5 without one"),
        ({"encoder": None, "num_features": 0, "reads": "features"}, "no encoder, got \"features\""),
        ({"mixes": "votes"}, "mixes must be \"probabilities\" or \"logits\", got 'votes'"),
        ({"reads": "minds"}, "reads must be \"input\" or \"features\", got 'minds'"),
    ],
)
def test_parts_that_do_not_fit_are_named(settings, text):
    given = {"gate": RankingGate(F, 7, M), "encoder": Double(), "num_features": F} | settings
    with pytest.raises(ValueError, match=text):
        Members(given.pop("gate"), [Picture()] * M, C, SHAPE, **given)


def test_an_input_of_another_shape_is_refused(x):
    with pytest.raises(ValueError, match=r"\(N, 1, 2, 3\), or be rows of 11 numbers, got \(9, 2"):
        members()(x[:, 0])
