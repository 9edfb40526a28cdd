"""What holds of every gate. A new gate joins by one line in GATES."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedmoe.nn.gates.discriminant import DiscriminantGate
from fedmoe.nn.gates.ranking import RankingGate
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.init import seeded

T, D, E = 16, 8, 4
GATES: dict[str, Callable[[], nn.Module]] = {
    "topk": lambda: TopKGate(D, E, k=2),
    "topk_full": lambda: TopKGate(D, E, k=2, gate_mass="full"),
    "ranking": lambda: RankingGate(D, 6, E),
    "discriminant": lambda: DiscriminantGate(D, 5, E),
    "ranking_full": lambda: RankingGate(D, 6, E, gate_mass="full"),
}
SHARES_SUM_TO_1 = {"topk", "ranking", "discriminant"}  # the weights of the others may sum to less


@pytest.fixture(params=GATES, ids=str)
def named_gate(request):
    return request.param, seeded(GATES[request.param], seed=0)


@pytest.fixture
def x_TD():
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def present(*experts):
    present_E = torch.zeros(E, dtype=torch.bool)
    present_E[list(experts)] = True
    return present_E


@pytest.mark.parametrize("experts", [[0, 1, 2, 3], [1, 3], [2]], ids=str)
def test_weights_are_shares_of_present_experts_alone(named_gate, x_TD, experts):
    name, gate = named_gate
    weight_TE = gate(x_TD, present(*experts)).weight_TE
    assert (weight_TE >= 0).all()
    assert (weight_TE.sum(-1) <= 1 + 1e-6).all()
    assert (weight_TE.sum(-1) > 0).all()
    assert not weight_TE[:, ~present(*experts)].any()
    if name in SHARES_SUM_TO_1:
        torch.testing.assert_close(weight_TE.sum(-1), torch.ones(T))


def test_without_present_experts_all_weights_are_0_and_gradients_finite(named_gate, x_TD):
    _, gate = named_gate
    routing = gate(x_TD.requires_grad_(), present())
    assert not routing.weight_TE.any()
    (routing.weight_TE.sum() + routing.score_TE.sum()).backward()
    assert x_TD.grad is not None and x_TD.grad.isfinite().all()


def test_logits_of_absent_experts_are_minus_infinity(named_gate, x_TD):
    _, gate = named_gate
    logit_TE = gate(x_TD, present(0, 2)).logit_TE
    if logit_TE is not None:
        assert logit_TE[:, [0, 2]].isfinite().all()
        assert (logit_TE[:, [1, 3]] == -torch.inf).all()


def test_zero_tokens_give_an_empty_routing(named_gate):
    _, gate = named_gate
    routing = gate(torch.zeros(0, D), present(0, 1, 2, 3))
    assert routing.weight_TE.shape == routing.score_TE.shape == (0, E)


def test_gradient_reaches_every_parameter(named_gate, x_TD):
    _, gate = named_gate
    weight_TE = gate(x_TD, present(0, 1, 2, 3)).weight_TE
    (weight_TE**2).sum().backward()
    for p in gate.parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any()


def test_a_token_is_weighed_without_regard_to_its_batch(named_gate, x_TD):
    _, gate = named_gate
    together_TE = gate(x_TD, present(0, 1, 3)).weight_TE
    alone_TE = torch.cat([gate(x_1D, present(0, 1, 3)).weight_TE for x_1D in x_TD.split(1)])
    torch.testing.assert_close(together_TE, alone_TE)


def test_every_parameter_named_in_row_names_has_a_row_for_each_expert(named_gate):
    _, gate = named_gate
    for name in gate.row_names:
        assert len(gate.get_parameter(name)) == E


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weights_have_at_least_single_precision(named_gate, x_TD, dtype):
    _, gate = named_gate
    weight_TE = gate.to(dtype)(x_TD.to(dtype), present(0, 1, 2, 3)).weight_TE
    assert weight_TE.dtype == torch.promote_types(dtype, torch.float32)


def test_autocast_does_not_change_a_weight(named_gate, x_TD):
    _, gate = named_gate
    expected_TE = gate(x_TD, present(0, 1, 2, 3)).weight_TE
    with torch.autocast("cpu", torch.bfloat16):
        weight_TE = gate(x_TD, present(0, 1, 2, 3)).weight_TE
    torch.testing.assert_close(weight_TE, expected_TE)
