from dataclasses import replace

import pytest
import torch
from torch import nn

from fedmoe.data.examples import ClientData, Examples
from fedmoe.federated.fedmoe import FedMoE, frequency
from fedmoe.federated.local import LocalPlan, work
from fedmoe.federated.methods.reap import Reaping, importance, saliency
from fedmoe.nn.moe import MoE
from fedmoe.state import split_state
from fedmoe.types import ActivationProfile, Assignment, ClientInfo, Routing
from tests.tiny import IN, client_data, profile, tiny

CPU = torch.device("cpu")


class FirstOrSecond(nn.Module):
    """Sends a token whose number is positive to expert 0 at weight 1, any other to 1 at 0.5."""

    def forward(self, x_TD, present_E):
        first_T = (x_TD[:, 0] > 0).float()
        weight_TE = torch.stack([first_T, 0.5 * (1 - first_T)], 1)
        return Routing(weight_TE, weight_TE)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x_ND):
        return self.factor * x_ND


def test_a_rare_expert_with_a_large_output_outranks_a_frequent_weak_one():
    model = nn.Sequential(MoE(FirstOrSecond(), {0: Times(0.1), 1: Times(10.0)}, 2, 2))
    x = torch.tensor([[3.0, 4.0]] * 3 + [[-3.0, 4.0]])  # norms of 5
    mean_LE = saliency(model, Examples(x, torch.zeros(4).long()), CPU)
    # 1 * 0.1 * 5 for each of three tokens, and 0.5 * 10 * 5 for the one
    torch.testing.assert_close(mean_LE, torch.tensor([[0.5, 25.0]], dtype=torch.float64))
    counted = profile([3, 1])
    told = replace(counted, score_LE=mean_LE * counted.count_LE)
    torch.testing.assert_close(importance(told)[0], torch.tensor([0.5, 25.0]).double() / 25.5)
    assert frequency(told)[0].tolist() == [0.75, 0.25]
    torch.testing.assert_close(importance(told + told), importance(told))
    assert importance(ActivationProfile.empty(1, 2)).tolist() == [[0.0, 0.0]]


def test_an_expert_that_is_not_held_has_no_importance():
    model = tiny(k=2)
    model.head.hold([1, 3])
    examples = client_data(0).train
    mean_LE = saliency(model, examples, CPU)
    assert mean_LE.shape == (1, 4) and mean_LE[0, [0, 2]].tolist() == [0.0, 0.0]
    assert not model.head.gate._forward_hooks


def test_a_client_trains_as_any_other_and_reports_importance():
    model = split_state(tiny())
    whole = Assignment(0, model, frozenset(model.experts))
    data = client_data(0)
    plain = LocalPlan(lr=0.1, batch_size=5)
    updates = [
        work(0, whole, tiny, data, p, None, 0)[0] for p in (plain, replace(plain, method=Reaping()))
    ]
    for name, value in updates[0].model.shared.items():
        assert torch.equal(value, updates[1].model.shared[name])
    counts = [u.profile.count_LE for u in updates]
    assert torch.equal(*counts)
    assert not torch.equal(updates[0].profile.score_LE, updates[1].profile.score_LE)
    strategy = FedMoE(measure=importance, explore_trains=True, smooth_over=0, sharpness=0.0)
    state = strategy.init(model, [ClientInfo(0)])
    after = strategy.aggregate(state, [updates[1]])
    torch.testing.assert_close(after.p[0], importance(updates[1].profile))
    assert after.p[0].sum() == pytest.approx(1.0) and isinstance(data, ClientData) and IN == 3
