import gc
import weakref

import pytest
import torch
from torch import nn

from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.init import seeded
from fedmoe.nn.moe import MoE
from fedmoe.types import Routing

T, D, E = 12, 8, 4


def a_moe(held=range(E), k=2, out=None):
    def build():
        return MoE(TopKGate(D, E, k), {e: FFN(D, 16, out) for e in range(E)}, E)

    moe = seeded(build, 0)
    moe.hold(list(held))
    return moe


@pytest.fixture
def x_TD():
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def by_definition(moe, x_TD, out=D):
    """Token by token."""
    weight_TE = moe.gate(x_TD, moe.present_E).weight_TE
    y_TO = torch.zeros(len(x_TD), out)
    for t in range(len(x_TD)):
        for e in moe.held:
            y_TO[t] += weight_TE[t, e] * moe.experts[str(e)](x_TD[t : t + 1])[0]
    return y_TO


class Says(nn.Module):
    """A gate that always returns the same weights."""

    def __init__(self, weight_TE):
        super().__init__()
        self.weight_TE = torch.tensor(weight_TE)

    def forward(self, x_TD, present_E):
        return Routing(self.weight_TE, self.weight_TE)


class Scale(nn.Module):
    """An expert that multiplies by its number and remembers how many tokens it saw."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.tokens = factor, 0

    def forward(self, x_ND):
        self.tokens += len(x_ND)
        return self.factor * x_ND


@pytest.mark.parametrize("out", [D, 3])
@pytest.mark.parametrize("held", [[0, 1, 2, 3], [1, 3], [2], []], ids=str)
def test_moe_equals_its_definition(x_TD, held, out):
    moe = a_moe(held, out=out)
    torch.testing.assert_close(moe(x_TD), by_definition(moe, x_TD, out))


def test_two_tokens_worked_by_hand():
    moe = MoE(Says([[0.25, 0.75], [1.0, 0.0]]), {0: Scale(1.0), 1: Scale(10.0)}, 2)
    y_TD = moe(torch.tensor([[4.0], [2.0]]))
    assert y_TD.tolist() == [[0.25 * 4 + 0.75 * 40], [2.0]]


def test_an_expert_sees_only_its_tokens():
    experts = {0: Scale(1.0), 1: Scale(1.0)}
    moe = MoE(Says([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]]), experts, 2)
    moe(torch.ones(3, 1))
    assert (experts[0].tokens, experts[1].tokens) == (3, 1)


def test_leading_dimensions_are_kept(x_TD):
    moe = a_moe(out=3)
    torch.testing.assert_close(moe(x_TD.view(2, 3, 2, D)), moe(x_TD).view(2, 3, 2, 3))
    torch.testing.assert_close(moe(x_TD[0]), moe(x_TD)[0])


@pytest.mark.parametrize("shape", [(0, D), (3, 0, D)], ids=str)
def test_zero_tokens_give_zero_rows(shape):
    assert a_moe(out=3)(torch.zeros(shape)).shape == (*shape[:-1], 3)


def test_padding_is_neither_gated_nor_dispatched_and_comes_out_as_zeros(x_TD):
    moe = a_moe()
    gated = []
    moe.gate.register_forward_hook(lambda _m, _a, out: gated.append(len(out.weight_TE)))
    x_BSD = x_TD.view(3, 4, D).clone()
    keep_BS = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    x_BSD[~keep_BS] = torch.nan
    y_BSD = moe(x_BSD, keep_BS)
    assert gated == [6]
    assert not y_BSD[~keep_BS].any()
    torch.testing.assert_close(y_BSD[keep_BS], moe(x_BSD[keep_BS]))


def test_an_expert_that_is_chosen_but_not_held_gives_nothing(x_TD):
    moe = a_moe(held=[1])
    moe.present_E.fill_(True)  # a scout's gate
    routing = moe.gate(x_TD, moe.present_E)
    torch.testing.assert_close(moe(x_TD), by_definition(moe, x_TD))
    unserved_T = routing.weight_TE[:, 1] == 0
    assert 0 < unserved_T.sum() < T
    assert not moe(x_TD)[unserved_T].any()


def test_an_expert_without_tokens_has_no_gradient():
    experts = {e: FFN(2, 4) for e in range(3)}
    moe = MoE(Says([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]), experts, 3)
    moe(torch.ones(2, 2)).sum().backward()
    assert all(p.grad is None for p in experts[1].parameters())
    assert all(p.grad is not None for e in (0, 2) for p in experts[e].parameters())


def test_hold_frees_the_others_and_closes_the_gate_to_them(x_TD):
    moe = a_moe()
    gone = weakref.ref(moe.experts["0"].up.weight)
    moe.hold([3, 1])
    gc.collect()
    assert gone() is None
    assert moe.held == (1, 3)
    assert moe.present_E.tolist() == [False, True, False, True]
    assert not moe.gate(x_TD, moe.present_E).weight_TE[:, [0, 2]].any()


def test_held_experts_keep_their_global_number_in_names():
    names = a_moe(held=[1]).state_dict()
    assert "experts.1.up.weight" in names and "experts.0.up.weight" not in names


def test_experts_run_in_the_order_of_their_numbers_also_beyond_nine():
    moe = MoE(TopKGate(D, 12, 2), {e: FFN(D, 2) for e in (11, 2, 10)}, 12)
    assert moe.held == (2, 10, 11)


def test_without_experts_the_output_has_the_width_that_was_given(x_TD):
    assert MoE(TopKGate(D, E, 2), {}, E, out_dim=3)(x_TD).shape == (T, 3)
    assert MoE(TopKGate(D, E, 2), {}, E)(x_TD).shape == (T, D)
    moe = a_moe(out=3)
    moe.hold([])
    assert not moe(x_TD).any() and moe(x_TD).shape == (T, 3)


def test_holding_an_expert_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match=r"held \(1, 3\), got also \[2\]"):
        a_moe(held=[1, 3]).hold([1, 2])


@pytest.mark.parametrize("number", [-1, E])
def test_an_expert_number_out_of_range_is_refused(number):
    with pytest.raises(ValueError, match=rf"from 0 to 3, got \[{number}\]"):
        MoE(TopKGate(D, E, 2), {number: FFN(D, 16)}, E)


def test_experts_of_different_output_width_are_refused():
    with pytest.raises(ValueError, match="agree on out_dim, got {'expert 0': 8, 'expert 1': 3}"):
        MoE(TopKGate(D, E, 2), {0: FFN(D, 16), 1: FFN(D, 16, 3)}, E)


def test_a_gate_of_another_width_than_the_experts_is_refused():
    with pytest.raises(ValueError, match="agree on dim, got {'gate': 8, 'expert 0': 7}"):
        MoE(TopKGate(D, E, 2), {0: FFN(7, 16, D)}, E)


def test_an_input_of_the_wrong_width_is_refused(x_TD):
    with pytest.raises(ValueError, match="width 8, got 7"):
        a_moe()(x_TD[:, :7])


def test_an_expert_that_returns_another_width_is_refused(x_TD):
    moe = MoE(TopKGate(D, 1, 1), {0: nn.Linear(D, 3)}, 1)
    with pytest.raises(ValueError, match=r"expert 0 must return \(12, 8\), got \(12, 3\)"):
        moe(x_TD)


def test_a_gate_for_another_number_of_experts_is_refused(x_TD):
    moe = MoE(Says([[1.0, 0.0]] * T), {0: FFN(D, 16)}, 4)
    with pytest.raises(ValueError, match=r"12 tokens for 4 experts, got .* \(12, 2\)"):
        moe(x_TD)


@pytest.mark.parametrize("keep", [torch.ones(T), torch.ones(T - 1, dtype=torch.bool)], ids=str)
def test_a_mask_of_another_shape_or_kind_is_refused(x_TD, keep):
    with pytest.raises(ValueError, match="keep must be bool"):
        a_moe()(x_TD, keep)
