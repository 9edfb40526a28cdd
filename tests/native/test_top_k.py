"""The compiled weights of a top-k gate are those that torch makes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.native.top_k import available, top_k_softmax
from fedmoe.nn.gates.topk import top_k_indices

pytestmark = pytest.mark.skipif(not available(), reason="no compiled kernels here")


def in_torch(logit_TE, choosable_E, k):
    logit_TE = logit_TE.masked_fill(~choosable_E, -torch.inf)
    best_TK = top_k_indices(logit_TE.detach(), k)
    weight_TK = logit_TE.gather(-1, best_TK).softmax(-1)
    return torch.zeros_like(logit_TE).scatter(-1, best_TK, weight_TK)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_weights_and_gradients_are_those_of_torch(data):
    E, T = data.draw(st.integers(1, 9), "experts"), data.draw(st.integers(0, 12), "tokens")
    present = data.draw(st.sets(st.integers(0, E - 1), min_size=1), "choosable")
    k = data.draw(st.integers(1, len(present)), "k")
    coarse = data.draw(st.booleans(), "ties")
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    logit_TE = torch.randn(T, E, generator=g) * 3
    if coarse:
        logit_TE = logit_TE.round()
    choosable_E = torch.zeros(E, dtype=torch.bool)
    choosable_E[list(present)] = True
    grad_TE = torch.randn(T, E, generator=g)
    found = []
    for way in (in_torch, top_k_softmax):
        leaf_TE = logit_TE.clone().requires_grad_()
        weight_TE = way(leaf_TE, choosable_E, k)
        weight_TE.backward(grad_TE)
        found.append((weight_TE.detach(), leaf_TE.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0][0] != 0, found[1][0] != 0)


def test_two_of_three_worked_by_hand():
    logit_TE = torch.tensor([[0.0, torch.log(torch.tensor(3.0)), -9.0]])
    weight_TE = top_k_softmax(logit_TE, torch.ones(3, dtype=torch.bool), 2)
    torch.testing.assert_close(weight_TE, torch.tensor([[0.25, 0.75, 0.0]]))


def test_of_equal_logits_the_lower_numbers_win():
    weight_TE = top_k_softmax(torch.zeros(1, 4), torch.tensor([False, True, True, True]), 2)
    assert weight_TE.tolist() == [[0.0, 0.5, 0.5, 0.0]]


def test_what_is_not_a_number_is_chosen_and_shows():
    logit_TE = torch.tensor([[5.0, float("nan"), 1.0]])
    weight_TE = top_k_softmax(logit_TE, torch.ones(3, dtype=torch.bool), 1)
    assert weight_TE.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    "logit_TE, choosable_E, k, message",
    [
        (torch.zeros(1, 3), torch.tensor([True, False, False]), 2, "at most the 1 choosable"),
        (torch.zeros(1, 3), torch.ones(3, dtype=torch.bool), 0, "at least 1 expert"),
        (torch.zeros(1, 3).double(), torch.ones(3, dtype=torch.bool), 1, "float32 on the CPU"),
        (torch.zeros(3), torch.ones(3, dtype=torch.bool), 1, "2 dimensions"),
        (torch.zeros(1, 3), torch.ones(4, dtype=torch.bool), 1, "choosable_E must be bool"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(logit_TE, choosable_E, k, message):
    with pytest.raises(ValueError, match=message):
        top_k_softmax(logit_TE, choosable_E, k)
