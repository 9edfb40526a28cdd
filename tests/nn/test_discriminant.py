"""Linear discriminants against normal densities, by hand, and on sums that no examples can have."""

import math

import pytest
import torch

from fedmoe.nn.discriminant import (
    Moments,
    discriminant,
    fitted,
    moments_of,
    nothing_told,
    told,
)
from fedmoe.nn.encoder import DiscriminantHead
from fedmoe.nn.gates.discriminant import DiscriminantGate

N, F, C, E = 200, 3, 4, 2


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(0)
    y_N = torch.arange(N) % 3  # class 3 has none
    x_NF = torch.randn(N, F, generator=generator) @ torch.randn(F, F, generator=generator)
    return x_NF + 2.0 * y_N[:, None], y_N


def test_it_is_the_likelihood_of_normal_classes_with_one_covariance(examples):
    x_NF, y_N = examples
    weight_CF, bias_C = discriminant(moments_of(x_NF, y_N, C), shrink=1e-12)
    mean_CF = torch.stack([x_NF[y_N == c].mean(0) for c in range(3)]).double()
    rest_NF = x_NF.double() - mean_CF[y_N]
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(F, dtype=torch.float64), rest_NF.T @ rest_NF / N
    )
    some_NF = 3 * torch.randn(20, F, generator=torch.Generator().manual_seed(1)).double()
    density_NC = torch.stack([normal.log_prob(some_NF - m_F) for m_F in mean_CF], 1)
    found_NC = some_NF @ weight_CF.T + bias_C
    assert (found_NC[:, 3] == -torch.inf).all()
    torch.testing.assert_close(
        found_NC.softmax(1)[:, :3], density_NC.softmax(1), rtol=1e-3, atol=1e-5
    )


def test_two_classes_on_a_line_worked_by_hand():
    x_N1 = torch.tensor([[0.0], [2.0], [5.0], [7.0]])  # means 1 and 6, variance 1 in each
    weight_C1, bias_C = discriminant(moments_of(x_N1, torch.tensor([0, 0, 1, 1]), 2), shrink=1.0)
    # the variance, shrunk by as much again, is 2: logits x m / 2 - m^2 / 4
    assert weight_C1.flatten().tolist() == pytest.approx([0.5, 3.0])
    assert bias_C.tolist() == pytest.approx([-0.25, -9.0])


def test_moments_of_parts_add_up_and_may_be_scaled(examples):
    x_NF, y_N = examples
    whole = moments_of(x_NF, y_N, C)
    parts = [moments_of(x_NF[rows], y_N[rows], C) for rows in (slice(0, 30), slice(30, N))]
    added = Moments(*((a + b) / 7 for a, b in zip(*parts, strict=True)))
    for one, other in zip(discriminant(whole), discriminant(added), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["none", "negative", "no scatter", "impossible"])
def test_whatever_was_told_the_result_is_no_failure(examples, change):
    count_C, sum_CF, second_FF = moments_of(*examples, C)
    if change == "none":
        count_C = torch.zeros(C)
    elif change == "negative":
        count_C = -count_C
    elif change == "no scatter":
        second_FF = torch.zeros(F, F)
    else:
        second_FF = -1e6 * torch.randn(F, F, generator=torch.Generator().manual_seed(0))
    weight_CF, bias_C = discriminant(Moments(count_C, sum_CF, second_FF))
    assert weight_CF.isfinite().all() and not bias_C.isnan().any()


def test_the_mean_of_clients_heads_is_the_head_of_all_their_examples(examples):
    x_NF, y_N = examples
    whole, merged = DiscriminantHead(F, C), DiscriminantHead(F, C)
    parts = [DiscriminantHead(F, C) for _ in range(2)]
    whole.fit(x_NF, y_N)
    for part, rows in zip(parts, (slice(0, 25), slice(25, N)), strict=True):
        part.fit(x_NF[rows], y_N[rows])
    for name, p in merged.named_parameters():
        p.data = torch.stack([part.get_parameter(name).data for part in parts]).mean(0)
    torch.testing.assert_close(merged(x_NF), whole(x_NF), rtol=1e-4, atol=1e-3)
    assert (whole(x_NF).argmax(1) == y_N).float().mean() > 0.8


def gate_of(sums, shrink=0.01):
    gate = DiscriminantGate(F, C, E).eval()
    gate.load_state_dict(fitted(sums, shrink))
    return gate


def test_a_gate_shares_a_class_among_the_anchors_that_have_it(examples):
    x_NF, y_N = examples
    first = (y_N == 0) | ((y_N == 1) & (torch.arange(N) < N // 2))  # half of class 1, all of 0
    sums = nothing_told(F, C, E)
    for e, own in enumerate((first, ~first)):
        part = told(x_NF[own], y_N[own], C, e, E)
        sums = {n: t + part[n] * int(own.sum()) for n, t in sums.items()}
    gate = gate_of(sums)
    count_1 = int(((y_N == 1) & first).sum()) / int((y_N == 1).sum())
    torch.testing.assert_close(
        gate.share_CE.detach(),
        torch.tensor([[1.0, 0.0], [count_1, 1 - count_1], [0.0, 1.0], [0.0, 0.0]]),
    )
    weight_CF, bias_C = discriminant(moments_of(x_NF, y_N, C))
    class_NC = (x_NF.double() @ weight_CF.T + bias_C).softmax(1)
    score_NE = gate(x_NF, torch.ones(E, dtype=torch.bool)).score_TE
    expected_N = class_NC[:, 0] + count_1 * class_NC[:, 1]
    torch.testing.assert_close(score_NE[:, 0].double(), expected_N, rtol=1e-3, atol=1e-4)


def test_before_anybody_told_classes_are_dealt_out_to_experts():
    gate = DiscriminantGate(F, C, E)
    assert gate.share_CE.tolist() == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    score_NE = gate(torch.randn(50, F), torch.ones(E, dtype=torch.bool)).score_TE
    assert score_NE.min() > 0 and math.isclose(float(score_NE.detach().sum()), 50, rel_tol=1e-4)
    nobody = gate_of(nothing_told(F, C, E))  # no class is anybody's: no expert before another
    torch.testing.assert_close(
        nobody(torch.randn(5, F), torch.ones(E, dtype=torch.bool)).score_TE, torch.full((5, E), 0.5)
    )
