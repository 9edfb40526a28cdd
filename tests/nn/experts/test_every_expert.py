"""What holds of every expert. A new expert joins by one line in EXPERTS."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.init import seeded

N, D = 6, 8
EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "ffn_relu": lambda: FFN(D, 16),
    "ffn_gelu": lambda: FFN(D, 16, activation="gelu"),
    "ffn_unbiased": lambda: FFN(D, 16, bias=False),
    "ffn_narrow": lambda: FFN(D, 5, out=3),
}


@pytest.fixture(params=EXPERTS, ids=str)
def expert(request):
    return seeded(EXPERTS[request.param], seed=0)


@pytest.fixture
def x_ND():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def test_each_token_is_treated_by_itself(expert, x_ND):
    together_NO = expert(x_ND)
    alone_NO = torch.cat([expert(x_1D) for x_1D in x_ND.split(1)])
    torch.testing.assert_close(together_NO, alone_NO)


def test_the_output_has_the_width_that_the_expert_tells(expert, x_ND):
    assert expert(x_ND).shape == (N, getattr(expert, "out_dim", D))


def test_gradient_reaches_every_parameter(expert, x_ND):
    expert(x_ND).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in expert.parameters())
