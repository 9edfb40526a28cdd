import math

import pytest
import torch

from fedmoe.nn.gates.topk import TopKGate, keep_top_k

ALL_4 = torch.ones(4, dtype=torch.bool)


def gate_with_scores(k, *, gate_mass="renormalise", scores=(1.0, 4.0, 2.0, 3.0)):
    """A gate for tokens of width 1; a token of value 1 has probabilities in ratio `scores`."""
    gate = TopKGate(1, len(scores), k, gate_mass=gate_mass)
    gate.proj.weight.data = torch.tensor([[math.log(s)] for s in scores])
    return gate


ONE = torch.ones(1, 1)


def test_renormalised_weights_are_shares_among_the_k_highest():
    [weight_E] = gate_with_scores(2)(ONE, ALL_4).weight_TE
    torch.testing.assert_close(weight_E, torch.tensor([0, 4 / 7, 0, 3 / 7]))


def test_summed_weights_are_those_shares_times_how_many_are_used():
    [weight_E] = gate_with_scores(2, gate_mass="sum")(ONE, ALL_4).weight_TE
    torch.testing.assert_close(weight_E, torch.tensor([0, 8 / 7, 0, 6 / 7]))
    present_E = torch.tensor([False, False, True, False])
    [alone_E] = gate_with_scores(2, gate_mass="sum")(ONE, present_E).weight_TE
    assert alone_E.tolist() == [0, 0, 1, 0]


def test_full_weights_are_shares_among_all_experts():
    [weight_E] = gate_with_scores(2, gate_mass="full")(ONE, ALL_4).weight_TE
    torch.testing.assert_close(weight_E, torch.tensor([0, 4 / 10, 0, 3 / 10]))


def test_with_full_an_absent_expert_keeps_its_part_of_the_denominator():
    present_E = torch.tensor([True, False, True, True])
    routing = gate_with_scores(2, gate_mass="full")(ONE, present_E)
    torch.testing.assert_close(routing.weight_TE[0], torch.tensor([0, 0, 0.2, 0.3]))
    torch.testing.assert_close(routing.score_TE[0], torch.tensor([0.1, 0.4, 0.2, 0.3]))


def test_with_full_an_unknown_expert_is_in_no_denominator():
    gate = gate_with_scores(2, gate_mass="full")
    gate.known_E[1] = False
    routing = gate(ONE, torch.tensor([True, False, True, True]))
    torch.testing.assert_close(routing.weight_TE[0], torch.tensor([0, 0, 2 / 6, 3 / 6]))


@pytest.mark.parametrize("gate_mass", ["renormalise", "full", "sum"])
def test_an_unknown_expert_is_not_chosen_though_present(gate_mass):
    gate = gate_with_scores(1, gate_mass=gate_mass)
    gate.known_E[1] = False
    [weight_E] = gate(ONE, ALL_4).weight_TE
    assert weight_E.nonzero().flatten().tolist() == [3]


def test_a_full_gate_weighs_kept_experts_the_same_after_the_others_are_gone():
    gate = gate_with_scores(2, gate_mass="full")
    x_T1 = torch.linspace(-2, 2, 9)[:, None]
    whole_TE = gate(x_T1, ALL_4).weight_TE
    present_E = torch.tensor([True, False, True, True])
    part_TE = gate(x_T1, present_E).weight_TE
    untouched_T = whole_TE[:, 1] == 0
    assert 0 < untouched_T.sum() < len(x_T1)
    assert torch.equal(part_TE[untouched_T], whole_TE[untouched_T])


def test_fewer_present_than_k_are_all_used():
    [weight_E] = gate_with_scores(3)(ONE, torch.tensor([True, False, True, False])).weight_TE
    torch.testing.assert_close(weight_E, torch.tensor([1 / 3, 0, 2 / 3, 0]))


@pytest.mark.parametrize("num_experts", [3, 17, 64])
@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_of_equal_scores_the_lower_expert_numbers_win(k, num_experts):
    kept_TE = keep_top_k(torch.full((5, num_experts), 0.25), k)
    first = list(range(min(k, num_experts)))
    assert [row.nonzero().flatten().tolist() for row in kept_TE] == [first] * 5


@pytest.mark.parametrize("k", [1, 2, 5, 8, 11])
def test_keep_top_k_keeps_the_k_highest(k):
    score_TE = torch.rand(50, 11, generator=torch.Generator().manual_seed(0))
    for row_E, kept_E in zip(score_TE, keep_top_k(score_TE, k), strict=True):
        best = sorted(range(11), key=lambda e: -row_E[e].item())[:k]
        expected_E = torch.zeros(11)
        expected_E[best] = row_E[best]
        assert torch.equal(kept_E, expected_E)


def test_extreme_logits_still_give_finite_weights():
    gate = gate_with_scores(2)
    for value in (1e30, -1e30):
        weight_TE = gate(torch.tensor([[value]]), ALL_4).weight_TE
        torch.testing.assert_close(weight_TE.sum(), torch.tensor(1.0))


def test_known_rows_are_no_part_of_a_checkpoint():
    assert set(TopKGate(3, 4, 1).state_dict()) == {"proj.weight"}


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=f"between 1 and the 4 experts, got {k}"):
        TopKGate(3, 4, k)


def test_an_unknown_gate_mass_is_refused():
    with pytest.raises(ValueError, match="gate_mass must be"):
        TopKGate(3, 4, 1, gate_mass="half")
