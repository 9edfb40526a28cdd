import math

import pytest
import torch

from fedmoe.nn.gates.ranking import RankingGate
from fedmoe.nn.init import seeded

T, D, F, E = 12, 6, 4, 3


def gate(**settings):
    return seeded(lambda: RankingGate(F, 5, E, **settings), seed=0)


def present(*experts):
    present_E = torch.zeros(E, dtype=torch.bool)
    present_E[list(experts)] = True
    return present_E


@pytest.fixture
def x_TD():
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def by_definition(ranking, token_D):
    """Softmax over all experts, in plain Python."""
    x_F = token_D[-F:].tolist()
    hidden = [
        max(0.0, sum(w * x for w, x in zip(row, x_F, strict=True)) + b)
        for row, b in zip(ranking.up.weight.tolist(), ranking.up.bias.tolist(), strict=True)
    ]
    power = [
        math.exp(sum(w * h for w, h in zip(row, hidden, strict=True)) + b)
        for row, b in zip(ranking.down.weight.tolist(), ranking.down.bias.tolist(), strict=True)
    ]
    return [p / sum(power) for p in power]


def test_scores_and_weights_are_those_of_the_definition(x_TD):
    for mass in ("renormalise", "full"):
        ranking = gate(gate_mass=mass)
        routing = ranking(x_TD, present(0, 2))
        for t, token_D in enumerate(x_TD):
            score = by_definition(ranking, token_D)
            over = score[0] + score[2] if mass == "renormalise" else 1.0
            torch.testing.assert_close(routing.score_TE[t], torch.tensor(score))
            weights = torch.tensor([score[0] / over, 0.0, score[2] / over])
            torch.testing.assert_close(routing.weight_TE[t], weights)


def test_only_the_last_columns_are_read(x_TD):
    other_TD = x_TD.clone()
    other_TD[:, : D - F] = 99.0
    routings = [gate()(told_TD, present(0, 1)) for told_TD in (x_TD, other_TD)]
    assert torch.equal(routings[0].score_TE, routings[1].score_TE)
    with pytest.raises(ValueError, match="at least 4 features, got 3"):
        gate()(x_TD[:, :3], present(0))


def test_outside_training_the_best_present_expert_alone_is_used(x_TD):
    ranking = gate().eval()
    routing = ranking(x_TD, present(1, 2))
    assert set(routing.weight_TE.unique().tolist()) == {0.0, 1.0}
    best_T = routing.score_TE[:, 1:].argmax(1) + 1
    assert torch.equal(routing.weight_TE.argmax(1), best_T)
    assert len(best_T.unique()) == 2
    weighted_TE = gate(use="weighted").eval()(x_TD, present(1, 2)).weight_TE
    assert torch.equal(weighted_TE, gate().train()(x_TD, present(1, 2)).weight_TE)


def test_a_scout_without_experts_learns_the_scores_of_all(x_TD):
    for ranking in (gate().train(), gate().eval()):
        routing = ranking(x_TD, present())
        assert not routing.weight_TE.any()
        torch.testing.assert_close(routing.score_TE.sum(1), torch.ones(T))


@pytest.mark.parametrize("name", ["use", "gate_mass"])
def test_settings_that_are_not_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be .* got 'none'"):
        gate(**{name: "none"})
