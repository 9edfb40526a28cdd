import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.moe import MoE
from fedmoe.nn.vision import small_vit
from fedmoe.profile import (
    FREQUENCY_ERROR,
    MASS_ERROR,
    errors_of,
    open_gates,
    profile_of,
    watch_gates,
)
from fedmoe.state import build_part, layer_sizes, load_state, rows_of, split_state
from fedmoe.types import ActivationProfile, ExpertId, Routing
from tests.tiny import examples, profile, ragged, tiny

FIELDS = ("count_LE", "weight_LE", "score_LE", "token_L")


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in FIELDS)


def routing(weight_TE, score_TE=None):
    weight_TE = torch.tensor(weight_TE)
    return Routing(weight_TE, weight_TE if score_TE is None else torch.tensor(score_TE))


def test_a_profile_worked_by_hand():
    p = profile_of(
        {0: routing([[0.75, 0.25, 0.0], [0.0, 1.0, 0.0]], [[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]])},
        (3,),
    )
    assert p.count_LE.tolist() == [[1, 2, 0]]
    assert p.weight_LE.tolist() == [[0.75, 1.25, 0.0]]
    assert p.score_LE.tolist() == [[0.5, 0.75, 0.75]]
    assert p.token_L.tolist() == [2]
    torch.testing.assert_close(p.frequency_LE, torch.tensor([[1 / 3, 2 / 3, 0.0]]).double())
    assert p.mass_LE.tolist() == [[0.25, 0.375, 0.375]]  # 0.5 / 2, 0.75 / 2, 0.75 / 2


def test_a_layer_of_fewer_experts_has_zeros_behind_its_last():
    p = profile_of({0: routing([[1.0, 0.0]]), 1: routing([[0.2, 0.3, 0.5]])}, (2, 3))
    assert p.count_LE.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert p.token_L.tolist() == [1, 1]


def test_a_layer_that_did_not_run_is_all_zeros_and_has_no_shares():
    p = profile_of({1: routing([[1.0]])}, (2, 1))
    assert p.count_LE.tolist() == [[0, 0], [1, 0]]
    assert p.frequency_LE.tolist() == p.mass_LE.tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_a_profile_says_what_the_gates_decided_token_by_token():
    model, (x_NI, _) = ragged().eval(), examples(20, seed=1)
    with watch_gates(model) as routings:
        model(x_NI)
    p = profile_of(routings, layer_sizes(model))
    slow_LE = torch.zeros(2, 3, dtype=torch.int64)
    hidden_ND = model.norm(x_NI)
    for layer, moe in enumerate((model.first, model.second)):
        for token_D in hidden_ND:
            weight_E = moe.gate(token_D[None], moe.present_E).weight_TE[0]
            for e in range(moe.num_experts):
                slow_LE[layer, e] += int(weight_E[e] > 0)
        hidden_ND = moe(hidden_ND)
    assert p.count_LE.tolist() == slow_LE.tolist()
    assert p.count_LE.sum(-1).tolist() == [2 * 20, 1 * 20]  # k of each layer times tokens
    assert p.token_L.tolist() == [20, 20]


def test_tokens_of_an_image_model_are_its_patches():
    model = small_vit(image=8, patch=4, dim=8, depth=2, heads=2, hidden=4, num_experts=3, k=1)
    with watch_gates(model) as routings:
        model(torch.zeros(5, 1, 8, 8))
    p = profile_of(routings, layer_sizes(model))
    assert p.token_L.tolist() == p.count_LE.sum(-1).tolist() == [20, 20]  # 5 images of 2 x 2


def test_padding_is_not_counted():
    moe = MoE(TopKGate(3, 2, 1), {0: torch.nn.Identity(), 1: torch.nn.Identity()}, 2)
    keep_BS = torch.tensor([[True, True, False], [True, False, False]])
    with watch_gates(moe) as routings:
        moe(torch.ones(2, 3, 3), keep_BS)
    assert profile_of(routings, (2,)).token_L.tolist() == [3]


def test_the_latest_routing_is_seen_and_nothing_after_the_block():
    model, (x_NI, _) = tiny(), examples(5, seed=1)
    with watch_gates(model) as routings:
        model(x_NI)
        model(x_NI[:2])
        assert len(routings[0].weight_TE) == 2
    model(x_NI)
    assert len(routings[0].weight_TE) == 2
    assert not model.head.gate._forward_hooks


def test_an_error_within_the_block_leaves_no_watcher_behind():
    model = ragged()
    with pytest.raises(RuntimeError, match="on purpose"), watch_gates(model):
        raise RuntimeError("on purpose")
    assert not model.first.gate._forward_hooks and not model.second.gate._forward_hooks


def test_watching_keeps_the_graph_for_a_loss_on_the_routing():
    model, (x_NI, _) = tiny(), examples(5, seed=1)
    with watch_gates(model) as routings:
        model(x_NI)
    routings[0].score_TE.square().sum().backward()
    assert model.head.gate.proj.weight.grad is not None


def test_the_error_of_shares_worked_by_hand():
    # Shares (1/4, 3/4) and (3/4, 1/4): each expert's varies by 1/8 between the two parts, so by
    # 1/16 in their mean, and there are two experts.
    parts = [profile([1, 3]), profile([3, 1])]
    wanted = {MASS_ERROR: pytest.approx(1 / 8), FREQUENCY_ERROR: pytest.approx(1 / 8)}
    assert errors_of(parts) == wanted
    assert errors_of([parts[0], parts[0]]) == {MASS_ERROR: 0.0, FREQUENCY_ERROR: 0.0}
    assert errors_of(parts[:1]) == {}


counts = st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=2, max_size=2)


@given(counts, counts, counts)
def test_profiles_add_and_the_empty_one_is_their_zero(a, b, c):
    a, b, c = (profile(*rows) for rows in (a, b, c))
    assert same((a + b) + c, a + (b + c))
    assert same(a + b, b + a)
    assert same(a + ActivationProfile.empty(2, 3), a)
    assert (a + b).count_LE.tolist() == (a.count_LE + b.count_LE).tolist()


def test_the_profile_of_two_halves_adds_up_to_that_of_the_whole():
    model, (x_NI, _) = tiny(k=2), examples(20, seed=1)

    def of(x):
        with watch_gates(model) as routings:
            model(x)
        return profile_of(routings, (4,))

    both, whole = of(x_NI[:7]) + of(x_NI[7:]), of(x_NI)
    assert both.count_LE.tolist() == whole.count_LE.tolist()
    torch.testing.assert_close(both.score_LE, whole.score_LE, rtol=1e-6, atol=0)


@given(counts)
def test_a_used_layers_shares_sum_to_1(rows):
    p = profile(*rows)
    for share_LE in (p.frequency_LE, p.mass_LE):
        for row_E, share_E in zip(rows, share_LE, strict=True):
            assert abs(float(share_E.sum()) - (1.0 if any(row_E) else 0.0)) < 1e-12


def test_an_open_gate_chooses_among_all_experts_whose_rows_it_knows():
    x_NI, state = examples(30, seed=1).x, split_state(tiny(seed=3))
    part = build_part(tiny, frozenset())
    absent = frozenset({ExpertId(0, e) for e in (0, 1, 3)})
    load_state(part, state.only(frozenset()), rows_of(state, absent))

    def of(model):
        with watch_gates(model) as routings:
            model(x_NI)
        return profile_of(routings, (4,))

    assert of(part).count_LE.tolist() == [[0, 0, 0, 0]]  # closed: there is nobody to choose
    open_gates(part)
    whole = tiny(seed=3)
    whole.head.hold([0, 1, 3])
    assert same(of(part), of(whole))
    assert of(part).count_LE.sum() == 30


def test_a_gate_that_knows_no_rows_stays_as_it_is():
    class Always(torch.nn.Module):
        def forward(self, x_TD, present_E):
            return Routing(*(present_E.float().expand(len(x_TD), 2),) * 2)

    moe = MoE(Always(), {0: torch.nn.Identity()}, 2)
    open_gates(moe)
    assert moe.present_E.tolist() == [True, False]
