from functools import partial

import pytest
import torch

from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.personal import PersonalStore
from fedmoe.experiments.run import without
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.local import LocalPlan, work
from fedmoe.federated.methods.personal import (
    is_classifier,
    is_moe,
    is_norm,
    is_not_shared_extractor,
)
from fedmoe.federated.rounds import Schedule, run_rounds
from fedmoe.nn.extractors import vowel_extractors
from fedmoe.nn.vision import fashion_cnn, small_vit
from fedmoe.state import named_by_role, split_state
from fedmoe.types import Assignment, ClientInfo, ExpertId
from tests.tiny import client_data, ragged

NORMED = partial(fashion_cnn, num_experts=2, hidden=3, norm="batch")


def names(make):
    return {n for n, _ in named_by_role(make())}


def test_the_classifier_is_each_experts_output_layer():
    roles = names(partial(fashion_cnn, num_experts=2))
    assert {n for n in roles if is_classifier(n)} == {
        f"experts.0.{e}.down.{kind}" for e in range(2) for kind in ("weight", "bias")
    }


def test_the_moe_layer_is_all_but_the_body():
    for make in (partial(fashion_cnn, num_experts=2), ragged):
        rest = {n for n in names(make) if not is_moe(n)}
        assert rest and not any("expert" in n or "gate" in n for n in rest)
    assert {n.split(".")[0] for n in names(fashion_cnn) if not is_moe(n)} == {"stem"}


@pytest.mark.parametrize(
    "make, count", [(NORMED, 4), (ragged, 2), (partial(small_vit, num_experts=2), 10)]
)
def test_normalisations_are_told_by_name(make, count):
    kinds = torch.nn.BatchNorm1d | torch.nn.BatchNorm2d | torch.nn.LayerNorm
    of_norm = {
        f"{path}.{n}"
        for path, m in make().named_modules()
        if isinstance(m, kinds)
        for n, _ in m.named_parameters()
    }
    assert {n for n in names(make) if is_norm(n)} == of_norm
    assert len(of_norm) == count
    assert not is_norm("experts.0.1.up.weight") and not is_norm("stem.normal.weight")


def test_statistics_of_personal_normalisations_never_leave_the_client(tmp_path):
    plan = LocalPlan(lr=0.1, batch_size=4, personal=is_norm)
    model = split_state(ragged())
    clients = [ClientInfo(k, num_examples=12) for k in range(2)]
    store = PersonalStore(tmp_path)
    seen = []

    def watched(assignments):
        for a in assignments.values():
            assert not any(is_norm(n) for n in a.model.shared)
        for update in in_process(ragged, client_data, plan, 0, store=store)(assignments):
            assert not any(is_norm(n) for n in update.model.shared)
            seen.append(update)
            yield update

    strategy = FedAvg()
    end = run_rounds(
        strategy, strategy.init(model, clients), clients, watched, Schedule(2),
        prepare=lambda a: without(a, is_norm),
    )
    assert len(seen) == 6
    for name, value in end.model.shared.items():
        assert torch.equal(value, model.shared[name]) == is_norm(name)
    mine = [store.load(k, 9).shared for k in range(2)]
    assert mine[0]["norm.num_batches_tracked"].item() == 2 * 3  # rounds times batches
    assert mine[0]["norm.num_batches_tracked"].dtype == torch.int64
    # Odd clients' points lie about 2, even ones' about -2; each knows its own.
    assert mine[0]["norm.running_mean"][0] < -0.5 and mine[1]["norm.running_mean"][0] > 0.5


def test_shared_statistics_are_averaged_and_a_counter_stays_whole():
    model = split_state(ragged())
    strategy = FedAvg()
    clients = [ClientInfo(k) for k in range(2)]
    state = strategy.init(model, clients)
    updates = [
        work(k, a, ragged, client_data(k), LocalPlan(lr=0.1, batch_size=4), None, 0)[0]
        for k, a in strategy.assign(state, clients).items()
    ]
    shared = strategy.aggregate(state, updates).model.shared
    means = [u.model.shared["norm.running_mean"] for u in updates]
    torch.testing.assert_close(shared["norm.running_mean"], (means[0] + means[1]) / 2)
    assert shared["norm.num_batches_tracked"].item() == 3


def test_of_two_extractors_just_the_shared_one_travels():
    make = partial(vowel_extractors, features=3, num_features=4, num_classes=2)
    model = split_state(make())
    whole = frozenset(model.experts)
    a = without(Assignment(0, model, whole), is_not_shared_extractor)
    assert not a.model.shared and a.model.experts.keys() == {ExpertId(0, 1)}
    plan = LocalPlan(lr=0.1, personal=is_not_shared_extractor)
    update, own = work(0, a, make, client_data(0), plan, None, 0)
    assert not update.model.shared and update.model.experts.keys() == {ExpertId(0, 1)}
    sent, got = a.model.experts[ExpertId(0, 1)], update.model.experts[ExpertId(0, 1)]
    assert sent.keys() == got.keys() and any(not torch.equal(sent[n], got[n]) for n in sent)
    assert own is not None
    assert own.shared.keys() == {"header.weight", "header.bias"}
    assert own.experts.keys() == whole  # the private one, and both gate rows
    assert own.experts[ExpertId(0, 1)].keys() == {"gate:proj.weight"}
