import copy

import pytest
import torch
from torch import nn

from fedmoe.federated.features import Features
from fedmoe.nn.encoder import Encoded
from fedmoe.nn.init import seeded
from tests.tiny import IN, client_data

F = 5  # another width than the inputs, or these would pass for features
PARTS = ("train", "validation", "test")


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map, self.seen = nn.Linear(IN, F), 0

    def forward(self, x_NI):
        self.seen += len(x_NI)
        return self.map(x_NI)


@pytest.fixture
def model():
    return seeded(lambda: Encoded(Counting(), F, nn.Linear(F, 2), (IN,)), 0)


def test_data_become_features_and_keep_their_labels(model):
    data = client_data(1)
    prepared = Features()(1, model, data)
    for name in PARTS:
        before, after = getattr(data, name), getattr(prepared, name)
        torch.testing.assert_close(after.x, model.encoder.map(before.x))
        assert torch.equal(after.y, before.y)
        torch.testing.assert_close(model(after.x), model(before.x))


def test_each_part_of_each_client_is_encoded_once_for_each_encoder(model):
    prepare, other = Features(), copy.deepcopy(model)
    for _ in range(3):
        for client in (0, 1):
            prepare(client, model, client_data(client))
    each = sum(len(getattr(client_data(0), name).y) for name in PARTS)
    assert model.encoder.seen == 2 * each
    nn.init.ones_(other.encoder.map.weight)
    told = prepare(0, other, client_data(0))
    assert other.encoder.seen == each
    torch.testing.assert_close(told.test.x, other.encoder.map(client_data(0).test.x))


def test_what_was_used_longest_ago_is_forgotten_first(model):
    each = sum(len(getattr(client_data(0), name).y) for name in PARTS)
    prepare = Features(max_bytes=2 * each * F * 4)  # room for two clients
    for client in (0, 1, 0, 2):
        prepare(client, model, client_data(client))
    assert model.encoder.seen == 3 * each
    prepare(0, model, client_data(0))
    assert model.encoder.seen == 3 * each
    prepare(1, model, client_data(1))
    assert model.encoder.seen == 4 * each


def test_what_it_has_computed_makes_no_other_plan_of_it(model):
    used = Features()
    used(0, model, client_data(0))
    assert used == Features() and repr(used) == repr(Features())
