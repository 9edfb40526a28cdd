import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.federated.similar import (
    advice,
    alike_groups,
    balanced_demand,
    neighbours,
    similarity,
    smoothed,
    smoothed_in_groups,
)

# Three clients, one layer of three experts. Dot products: 0-1 is 0.5*0.6 + 0.5*0.4 = 0.5,
# 0-2 is 0.5*0.2 = 0.1, 1-2 is 0.4*0.2 = 0.08; squared norms are 0.5, 0.52 and 0.68.
P_KLE = torch.tensor(
    [[[0.5, 0.5, 0.0]], [[0.6, 0.4, 0.0]], [[0.0, 0.2, 0.8]]], dtype=torch.float64
)
SIM_01 = 0.5 / math.sqrt(0.5 * 0.52)
SIM_02 = 0.1 / math.sqrt(0.5 * 0.68)
SIM_12 = 0.08 / math.sqrt(0.52 * 0.68)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=torch.float64), rtol=0, atol=atol)


def test_similarity_worked_by_hand():
    wanted = [[1, SIM_01, SIM_02], [SIM_01, 1, SIM_12], [SIM_02, SIM_12, 1]]
    close(similarity(P_KLE), wanted)


def test_similarity_is_over_all_layers_together():
    # Alike in the first layer, opposed in the second: (1*1 + 0*1) / (sqrt(2) * sqrt(2)).
    p_KLE = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    close(similarity(p_KLE), [[1, 0.5], [0.5, 1]])


def test_centred_similarity_tells_apart_what_the_plain_one_does_not():
    p_KLE = torch.tensor([[[0.53125, 0.46875]], [[0.5, 0.5]], [[0.46875, 0.53125]]])
    assert similarity(p_KLE).min() > 0.99
    centred_KK = similarity(p_KLE, centred=True)
    close(centred_KK[0, 2], -1.0)
    close(centred_KK[1], [0.0, 0.0, 0.0])  # the mean client is like nobody


def test_what_is_centred_is_each_expert_by_itself():
    # The mean client is (0.7, 0.3); all differ from it along (1, -1), to one side or the other.
    p_KLE = torch.tensor([[[0.75, 0.25]], [[0.72, 0.28]], [[0.63, 0.37]]], dtype=torch.float64)
    wanted = [[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]
    close(similarity(p_KLE, centred=True), wanted)


def test_similarity_without_errors_worked_by_hand():
    # 0.5 / sqrt((0.5 - 0.1) (0.52 - 0.02)); client 2 is no more than half error: 0.68 - 0.34.
    sim_KK = similarity(P_KLE, error_K=torch.tensor([0.1, 0.02, 0.5]))
    s_01, s_02, s_12 = (0.5 / math.sqrt(0.2), 0.1 / math.sqrt(0.136), 0.08 / math.sqrt(0.17))
    assert s_01 > 1  # more alike than alike
    close(sim_KK, [[1, 1, s_02], [1, 1, s_12], [s_02, s_12, 1]], atol=1e-8)


def test_similarity_without_errors_between_centred_clients_worked_by_hand():
    # The mean client is (0, 0), so that (2, 0), (-1, 2), (-1, -2) stay. Each one's error
    # is 0.6, and centring leaves 0.6 (1 - 1/3) = 0.4 of it in a square and -0.2 in a dot.
    p_KLE = torch.tensor([[[2.0, 0.0]], [[-1.0, 2.0]], [[-1.0, -2.0]]], dtype=torch.float64)
    sim_KK = similarity(p_KLE, centred=True, error_K=torch.full((3,), 0.6, dtype=torch.float64))
    across, below = -1.8 / math.sqrt(3.6 * 4.6), -2.8 / 4.6
    close(sim_KK, [[1, across, across], [across, 1, below], [across, below, 1]])


@given(st.integers(0, 10**6), st.booleans())
def test_similarity_without_errors_against_the_slow_definition(seed, centred):
    g = torch.Generator().manual_seed(seed)
    p_KN = torch.rand(6, 8, generator=g, dtype=torch.float64)
    error_K = 0.5 * torch.rand(6, generator=g, dtype=torch.float64)
    centre_KK = torch.eye(6, dtype=torch.float64) - (1 / 6 if centred else 0)
    x_KN = centre_KK @ p_KN
    allowed = [min(float(e), float(x @ x) / 2) for e, x in zip(error_K, x_KN, strict=True)]
    blur_KK = centre_KK @ torch.tensor(allowed, dtype=torch.float64).diag() @ centre_KK
    true_KK = x_KN @ x_KN.T - blur_KK
    size = [max(float(true_KK[k, k]), float(x_KN[k] @ x_KN[k]) / 2) ** 0.5 for k in range(6)]
    wanted = [
        [1.0 if i == j else max(-1.0, min(1.0, float(true_KK[i, j]) / size[i] / size[j]))
         for j in range(6)]
        for i in range(6)
    ]  # fmt: skip
    close(similarity(p_KN[:, None], centred=centred, error_K=error_K), wanted, atol=1e-9)


@pytest.mark.parametrize("lie", [1e9, -1e9])
def test_what_one_client_says_of_its_error_hardly_moves_the_others(lie):
    p_KLE = torch.rand(30, 1, 4, generator=torch.Generator().manual_seed(0)).softmax(-1).double()
    told_K = torch.zeros(30, dtype=torch.float64)
    told_K[7] = lie
    others = [k for k in range(30) if k != 7]
    plain_KK, seen_KK = (similarity(p_KLE, centred=True, error_K=e) for e in (0 * told_K, told_K))
    assert (seen_KK - plain_KK)[others][:, others].abs().max() < 0.05


@given(st.integers(0, 10**6), st.booleans())
def test_without_an_error_it_is_the_plain_similarity(seed, centred):
    p_KLE = torch.rand(5, 2, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    plain_KK = similarity(p_KLE, centred=centred)
    close(similarity(p_KLE, centred=centred, error_K=torch.zeros(5)), plain_KK, atol=1e-9)


def test_what_few_examples_blur_is_seen_through():
    # Clients of two kinds, whose shares are measured with an error of a third of their distance.
    g = torch.Generator().manual_seed(0)
    kinds_KLE = torch.tensor([[[0.4, 0.6, 0.0, 0.0]], [[0.0, 0.0, 0.6, 0.4]]]).double()
    kind_KLE = kinds_KLE.repeat(20, 1, 1)
    p_KLE = kind_KLE + 0.15 * torch.randn(40, 1, 4, generator=g, dtype=torch.float64)
    same_KK = (kind_KLE[:, None] == kind_KLE[None]).all(-1).all(-1)
    same_KK.fill_diagonal_(False)
    plain_KK = similarity(p_KLE, centred=True)
    seen_KK = similarity(p_KLE, centred=True, error_K=torch.full((40,), 4 * 0.15**2))
    assert plain_KK[same_KK].mean() < 0.75 and seen_KK[same_KK].mean() > 0.9


def test_a_client_without_activations_is_similar_to_none():
    p_KLE = torch.cat([P_KLE, torch.zeros(1, 1, 3)])
    close(similarity(p_KLE)[3], [0.0, 0.0, 0.0, 0.0])


@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_similarity_is_symmetric_and_at_most_1(rows):
    sim_KK = similarity(torch.tensor(rows, dtype=torch.float64).reshape(-1, 2, 2))
    assert torch.equal(sim_KK, sim_KK.T)
    assert sim_KK.max() <= 1 + 1e-12 and sim_KK.min() >= 0


def test_neighbours_are_the_most_similar_without_oneself():
    sim_KK = similarity(P_KLE)
    assert neighbours(sim_KK, 0, 1, range(3)) == [1]
    assert neighbours(sim_KK, 2, 2, range(3)) == [0, 1]  # 0.171 before 0.135
    assert neighbours(sim_KK, 0, 5, range(3)) == [1, 2]
    assert neighbours(sim_KK, 0, 2, [0, 2]) == [2]
    assert neighbours(sim_KK, 0, 2, []) == []


def test_equally_similar_neighbours_come_in_order_of_position():
    assert neighbours(torch.ones(5, 5), 2, 3, [4, 3, 2, 1, 0]) == [0, 1, 3]


def test_advice_worked_by_hand():
    told_LE = advice(P_KLE, similarity(P_KLE), 0, [1, 2])
    total = SIM_01 + SIM_02
    close(told_LE, [[0.6 * SIM_01 / total, (0.4 * SIM_01 + 0.2 * SIM_02) / total,
                     0.8 * SIM_02 / total]])


def test_advice_weighs_by_data_too_where_asked():
    told_LE = advice(P_KLE, similarity(P_KLE), 0, [1, 2], torch.tensor([99, 1, 10]))
    total = SIM_01 + 10 * SIM_02
    close(told_LE[0, 0], 0.6 * SIM_01 / total)


def test_without_a_similar_client_there_is_no_advice():
    sim_KK = similarity(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    assert advice(torch.zeros(2, 1, 2), sim_KK, 0, [1]) is None
    assert advice(torch.zeros(2, 1, 2), sim_KK, 0, []) is None


def test_an_opposed_client_is_not_listened_to():
    p_KLE = torch.tensor([[[1.0, 0.0]], [[0.8, 0.2]], [[0.0, 1.0]]])
    sim_KK = torch.tensor([[1.0, 0.5, -0.9], [0.5, 1.0, 0.0], [-0.9, 0.0, 1.0]]).double()
    close(advice(p_KLE, sim_KK, 0, [1, 2]), [[0.8, 0.2]], atol=1e-6)


def test_smoothed_shares_worked_by_hand():
    out_KLE = smoothed(P_KLE, similarity(P_KLE), 1)
    close(out_KLE[0, 0, 0], (0.5 + 0.6 * SIM_01) / (1 + SIM_01))
    close(out_KLE[1, 0, 0], (0.6 + 0.5 * SIM_01) / (1 + SIM_01))
    close(out_KLE[2, 0, 2], 0.8 / (1 + SIM_02))  # client 0 is nearer than client 1


def test_smoothing_leaves_a_client_without_neighbours_as_it_is():
    p_KLE = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).double()
    close(smoothed(p_KLE, similarity(p_KLE), 3), p_KLE)
    nobody_KLE = torch.zeros(2, 1, 2)
    close(smoothed(nobody_KLE, similarity(nobody_KLE), 3), nobody_KLE)


def test_shares_of_a_group_as_large_as_the_neighbourhood_are_its_mean():
    otherwise_KLE = torch.full_like(P_KLE, 9.0)
    group_K = torch.tensor([4, 4, 7])
    mean = [[0.55, 0.45, 0.0]]
    out_KLE = smoothed_in_groups(P_KLE, otherwise_KLE, group_K, 1)
    close(out_KLE[:2], [mean, mean])
    close(out_KLE[2], otherwise_KLE[2])  # a client alone has nobody
    close(smoothed_in_groups(P_KLE, otherwise_KLE, group_K, 2), otherwise_KLE)


@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 3), st.integers(2, 6))
def test_balanced_demand_asks_for_every_expert_alike_and_for_each_clients_room(
    seed, num_clients, num_layers, num_experts
):
    generator = torch.Generator().manual_seed(seed)
    p_KLE = torch.rand(num_clients, num_layers, num_experts, generator=generator).softmax(-1)
    room_K = torch.randint(1, 5, (num_clients,), generator=generator)
    demand_KLE = balanced_demand(p_KLE, room_K, sharpness=2.0)
    close(demand_KLE.sum(-1), torch.ones(num_clients, num_layers))
    # What each client asks for, in experts: its shares times its room.
    asked_LE = (demand_KLE * room_K[:, None, None]).sum(0)
    even_LE = torch.full_like(asked_LE, int(room_K.sum()) / num_experts)
    close(asked_LE, even_LE, atol=1e-3)


def test_balanced_demand_of_two_opposed_clients_worked_by_hand():
    # Standard scores are +1 and -1, so with sharpness s the table is exp(s), exp(-s) both ways,
    # already balanced: shares are sigmoid(2 s).
    p_KLE = torch.tensor([[[0.6, 0.4]], [[0.4, 0.6]]])
    high = 1 / (1 + math.exp(-3.0))
    close(
        balanced_demand(p_KLE, torch.tensor([1, 1]), 1.5),
        [[[high, 1 - high]], [[1 - high, high]]],
        atol=1e-6,
    )


def test_preferences_that_do_not_conflict_are_kept():
    generator = torch.Generator().manual_seed(0)
    p_KLE = torch.rand(4, 2, 4, generator=generator) * 0.1
    favourite = [[0, 3], [1, 2], [2, 1], [3, 0]]  # another expert for each client, in both layers
    for k, experts in enumerate(favourite):
        for layer, e in enumerate(experts):
            p_KLE[k, layer, e] += 1.0
    demand_KLE = balanced_demand(p_KLE, torch.ones(4), 2.0)
    assert demand_KLE.argmax(-1).tolist() == favourite


def test_where_all_like_the_same_expert_it_goes_to_who_likes_it_most():
    p_KLE = torch.tensor([[[0.9, 0.1]], [[0.6, 0.4]]])
    assert balanced_demand(p_KLE, torch.ones(2), 2.0).argmax(-1).tolist() == [[0], [1]]


def test_experts_that_do_not_exist_stay_at_0_and_the_others_are_balanced():
    p_KLE = torch.tensor([[[0.7, 0.3, 0.0], [0.2, 0.3, 0.5]], [[0.5, 0.5, 0.0], [0.3, 0.3, 0.4]]])
    demand_KLE = balanced_demand(p_KLE, torch.tensor([1, 2]), 2.0)
    assert not demand_KLE[:, 0, 2].any()
    assert demand_KLE.isfinite().all()
    close((demand_KLE * torch.tensor([1, 2])[:, None, None]).sum(0),
          [[1.5, 1.5, 0.0], [1.0, 1.0, 1.0]], atol=1e-3)


def test_clients_without_a_preference_ask_for_all_experts_alike():
    even_KLE = torch.full((3, 1, 4), 0.25)
    close(balanced_demand(even_KLE, torch.ones(3), 2.0), even_KLE)


@pytest.mark.parametrize("sharpness", [0.0, -1.0, math.nan])
def test_a_sharpness_that_is_not_above_0_is_refused(sharpness):
    with pytest.raises(ValueError, match="sharpness must be above 0, got"):
        balanced_demand(P_KLE, torch.ones(3), sharpness)


def test_a_client_without_room_is_refused():
    with pytest.raises(ValueError, match="room_K must be at least 1 .* got \\[1, 0, 2\\]"):
        balanced_demand(P_KLE, torch.tensor([1, 0, 2]), 1.0)


# Groups

SIM_4 = torch.tensor(
    [[1.0, 0.9, 0.1, 0.5], [0.9, 1.0, 0.3, 0.3], [0.1, 0.3, 1.0, 0.2], [0.5, 0.3, 0.2, 1.0]]
)


def test_groups_worked_by_hand():
    # 0 and 1 join first; then 3 to them at (0.5 + 0.3) / 2 = 0.4; then 2 at (0.1+0.3+0.2) / 3.
    assert alike_groups(SIM_4, 0.95) == [0, 1, 2, 3]
    assert alike_groups(SIM_4, 0.41) == [0, 0, 1, 2]
    assert alike_groups(SIM_4, 0.39) == [0, 0, 1, 0]
    assert alike_groups(SIM_4, 0.19) == [0, 0, 0, 0]
    assert alike_groups(torch.ones(1, 1), 0.5) == [0]


def slow_groups(sim_KK, least):
    groups = [[k] for k in range(len(sim_KK))]

    def mean(a, b):
        return sum(float(sim_KK[i, j]) for i in a for j in b) / len(a) / len(b)

    while len(groups) > 1:
        pairs = [(mean(a, b), i, j) for i, a in enumerate(groups) for j, b in enumerate(groups)
                 if i < j]
        best, i, j = max(pairs, key=lambda p: p[0])
        if best < least:
            break
        groups[i] += groups.pop(j)
    order = sorted(map(sorted, groups))
    return [next(g for g, m in enumerate(order) if k in m) for k in range(len(sim_KK))]


@given(st.integers(1, 9), st.integers(0, 999), st.floats(-1, 1))
def test_groups_are_those_of_the_definition(num, seed, least):
    draw = torch.Generator().manual_seed(seed)
    sim_KK = similarity(torch.rand(num, 1, 4, generator=draw).double(), centred=True)
    assert alike_groups(sim_KK, least) == slow_groups(sim_KK, least)
