import math

import pytest
import torch

from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.init import seeded
from fedmoe.nn.losses import load_balance_loss, z_loss
from fedmoe.types import Routing


def routing(weight, score, logit=None):
    return Routing(
        torch.tensor(weight),
        torch.tensor(score, requires_grad=True),
        None if logit is None else torch.tensor(logit, requires_grad=True),
    )


def test_balance_of_three_tokens_worked_by_hand():
    score = [[0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]
    loss = load_balance_loss(routing([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], score))
    # 2 * (2/3 * (0.6+0.7+0.2)/3 + 1/3 * (0.4+0.3+0.8)/3) = 2 * (2/3 * 0.5 + 1/3 * 0.5)
    assert loss.item() == pytest.approx(1.0)
    skewed = [[0.9, 0.1], [0.9, 0.1], [0.3, 0.7]]
    loss = load_balance_loss(routing([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], skewed))
    # 2 * (2/3 * 0.7 + 1/3 * 0.3)
    assert loss.item() == pytest.approx(2 * (2 / 3 * 0.7 + 1 / 3 * 0.3))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_1_when_perfect_whatever_k(k):
    weight = [[1 / k if (e - t) % 4 < k else 0.0 for e in range(4)] for t in range(8)]
    assert load_balance_loss(routing(weight, [[0.25] * 4] * 8)).item() == pytest.approx(1.0)


def test_balance_is_the_number_of_experts_when_all_go_to_one():
    one = [[0.0, 1.0, 0.0]] * 5
    assert load_balance_loss(routing(one, one)).item() == pytest.approx(3.0)


def test_balance_knows_only_present_experts():
    """Expert 1 is absent: the two others are balanced, whatever part of the score 1 has."""
    weight = [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    score = [[0.3, 0.4, 0.3], [0.1, 0.8, 0.1]]
    present_E = torch.tensor([True, False, True])
    assert load_balance_loss(routing(weight, score), present_E).item() == pytest.approx(1.0)
    logit = [[0.0, -math.inf, 0.0]] * 2  # tells the same
    assert load_balance_loss(routing(weight, score, logit)).item() == pytest.approx(1.0)


def test_the_balance_loss_pulls_scores_away_from_the_crowded_expert():
    r = routing([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [[0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    load_balance_loss(r).backward()
    assert (r.score_TE.grad[:, 0] > 0).all() and (r.score_TE.grad[:, 1] < 0).all()


def test_following_the_balance_loss_spreads_a_gate():
    x_TD = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + 1
    gate = seeded(lambda: TopKGate(4, 4, k=1), seed=0)
    all_E = torch.ones(4, dtype=torch.bool)
    before = load_balance_loss(gate(x_TD, all_E)).item()
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.5)
    for _ in range(50):
        optimizer.zero_grad()
        load_balance_loss(gate(x_TD, all_E)).backward()
        optimizer.step()
    assert load_balance_loss(gate(x_TD, all_E)).item() < before - 0.1


def test_z_loss_of_two_tokens_worked_by_hand():
    logit = [[0.0, 0.0, -math.inf], [math.log(3.0), 0.0, -math.inf]]
    loss = z_loss(routing([[1.0, 0.0, 0.0]] * 2, [[1.0, 0.0, 0.0]] * 2, logit))
    # log(1+1)^2 and log(3+1)^2
    assert loss.item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


@pytest.mark.parametrize("tokens", [0, 3])
def test_losses_without_present_experts_or_tokens_are_0_with_finite_gradients(tokens):
    gate = TopKGate(4, 3, k=1)
    r = gate(torch.ones(tokens, 4), torch.zeros(3, dtype=torch.bool))
    loss = z_loss(r) + load_balance_loss(r)
    assert loss.item() == 0
    loss.backward()
    assert gate.proj.weight.grad.isfinite().all()


def test_the_z_loss_needs_logits():
    with pytest.raises(ValueError, match="logit_TE must not be None"):
        z_loss(routing([[1.0]], [[1.0]]))
