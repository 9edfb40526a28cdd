"""Experts in one compiled pass. That it gives what the loop gives stands in nn/test_dispatch.py."""

import pytest
import torch

from fedmoe.native.ffns import Parameters, available, run_ffns

pytestmark = pytest.mark.skipif(not available(), reason="no compiled kernels here")


def parameters(num=1, dim=2, hidden=2, out=1):
    ups, downs = [torch.ones(hidden, dim)] * num, [torch.ones(out, hidden)] * num
    return Parameters(ups, [torch.zeros(hidden)] * num, downs, [torch.zeros(out)] * num)


def test_two_tokens_worked_by_hand():
    up_FD, down_OF = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    leaves = [t.requires_grad_() for t in (up_FD, down_OF)]
    x_TD = torch.tensor([[1.0, -1.0], [2.0, 1.0]], requires_grad=True)
    weight_TE = torch.tensor([[0.0, 0.5], [0.0, 2.0]], requires_grad=True)
    y_TO = run_ffns(x_TD, weight_TE, [1], Parameters([up_FD], [], [down_OF], []))
    # Hidden (1, 0) and (2, 2); outputs 3 and 16; weighed 1.5 and 32.
    assert y_TO.tolist() == [[1.5], [32.0]]
    y_TO.sum().backward()
    assert weight_TE.grad.tolist() == [[0.0, 3.0], [0.0, 16.0]]
    assert down_OF.grad.tolist() == [[0.5 * 1 + 2 * 2, 2 * 2]]
    assert up_FD.grad.tolist() == [[0.5 * 3 + 2 * 3 * 2, 0.5 * 3 * -1 + 2 * 3 * 1], [20.0, 10.0]]
    assert x_TD.grad.tolist() == [[1.5, 0.0], [6.0, 20.0]]
    assert all(leaf.grad is not None for leaf in leaves)


def test_what_is_not_a_number_comes_through():
    x_TD = torch.tensor([[float("nan"), 1.0]])
    assert run_ffns(x_TD, torch.ones(1, 1), [0], parameters()).isnan().all()


def test_the_same_again_has_the_same_bits():
    g = torch.Generator().manual_seed(0)
    x_TD, weight_TE = torch.randn(70, 33, generator=g), torch.rand(70, 3, generator=g)
    p = Parameters(
        [torch.randn(17, 33, generator=g)] * 3, [], [torch.randn(5, 17, generator=g)] * 3, []
    )
    first, *others = (run_ffns(x_TD.clone(), weight_TE, [0, 1, 2], p) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


ONES = torch.ones(4, 2)
UNFIT = {
    "width": (torch.ones(4, 3), torch.ones(4, 1), [0], parameters()),
    "tokens": (torch.ones(3, 2), torch.ones(4, 1), [0], parameters()),
    "dimensions": (torch.ones(4, 2, 1), torch.ones(4, 1), [0], parameters()),
    "dtype": (ONES.double(), torch.ones(4, 1), [0], parameters()),
    "dtype of weights": (ONES, torch.ones(4, 1).half(), [0], parameters()),
    "device": (ONES.to("meta"), torch.ones(4, 1), [0], parameters()),
    "column above": (ONES, torch.ones(4, 1), [1], parameters()),
    "column below": (ONES, torch.ones(4, 1), [-1], parameters()),
    "no expert": (ONES, torch.ones(4, 1), [], parameters(0)),
    "too few experts": (ONES, torch.ones(4, 2), [0, 1], parameters()),
    "too few biases": (
        ONES,
        torch.ones(4, 2),
        [0, 1],
        parameters(2)._replace(up_HF=[torch.ones(2)]),
    ),
    "bias of another width": (
        ONES,
        torch.ones(4, 1),
        [0],
        parameters()._replace(down_HO=[torch.ones(2)]),
    ),
    "down of another width": (
        ONES,
        torch.ones(4, 1),
        [0],
        parameters()._replace(down_HOF=[torch.ones(1, 3)]),
    ),
    "too much": (
        torch.ones(1, 2).expand(2**31, 2),
        torch.ones(1, 1).expand(2**31, 1),
        [0],
        parameters(),
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_compiled_code_would_not_survive_is_left_to_torch(case):
    assert run_ffns(*UNFIT[case]) is None
