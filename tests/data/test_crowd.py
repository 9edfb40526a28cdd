from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from fedmoe.data.crowd import TEST_SHARE, crowd
from fedmoe.data.examples import Examples
from fedmoe.data.protocols import DOMAINS, domains
from fedmoe.population import Population


def numbered(n: int = 4_000) -> Examples:
    """Images that tell their number, in their top left corner."""
    image = torch.zeros(n, 28, 28, dtype=torch.uint8)
    image[:, 0, 0], image[:, 0, 1] = torch.arange(n) // 256, torch.arange(n) % 256
    return Examples(image, torch.arange(n) % 10)


SOURCE = numbered()


def small(seed: int = 0, **changes):
    return crowd(seed, **{"num_clients": 40, "source": SOURCE, "test": 20, **changes})


def rows(examples: Examples, domain: str) -> list[int]:
    byte = ((examples.x * 0.353 + 0.286) * 255).round().to(torch.uint8).squeeze(1)
    byte = DOMAINS[domain](byte)
    return (byte[:, 0, 0].long() * 256 + byte[:, 0, 1].long()).tolist()


def all_rows(data, part: str) -> list[list[int]]:
    return [rows(getattr(data.load(c.id), part), data.groups[c.id]) for c in data.clients]


def test_a_client_has_the_same_data_at_each_call_and_among_however_many():
    few, many = small(), small(num_clients=1_000_000)
    for client in (0, 7, 39):
        for part in ("train", "validation", "test"):
            one, again, other = (
                getattr(d.load(client), part) for d in (few, few, pickle.loads(pickle.dumps(many)))
            )
            assert torch.equal(one.x, again.x) and torch.equal(one.x, other.x)
            assert torch.equal(one.y, again.y) and torch.equal(one.y, other.y)
        assert few.groups[client] == many.groups[client]
        assert few.clients[client] == many.clients[client]


def test_the_server_is_told_how_much_each_has_and_no_more():
    data = small()
    assert isinstance(data.clients, Population)
    for c in data.clients:
        own = data.load(c.id)
        assert c.num_examples == len(own.train.y) >= 10
        assert len(own.validation.y) == -(-c.num_examples // 4) and len(own.test.y) == 20
        assert c.task is None and c.memory_bytes is None


def test_nobody_trains_on_an_image_that_is_for_tests():
    data = small()
    tests = {n for own in all_rows(data, "test") for n in own}
    seen = {n for part in ("train", "validation") for own in all_rows(data, part) for n in own}
    assert tests and seen and not tests & seen
    assert len(tests) <= TEST_SHARE * len(SOURCE.y)


def test_a_clients_own_images_are_all_different():
    data = small()
    for train, validation in zip(
        all_rows(data, "train"), all_rows(data, "validation"), strict=True
    ):
        assert len({*train, *validation}) == len(train) + len(validation)


def test_each_domain_counts_classes_in_an_order_of_its_own():
    data = small()
    order: dict[str, dict[int, int]] = {name: {} for name in DOMAINS}
    for c in data.clients:
        own, domain = data.load(c.id).train, data.groups[c.id]
        assert domain == tuple(DOMAINS)[c.id % 4]
        for row, label in zip(rows(own, domain), own.y.tolist(), strict=True):
            assert order[domain].setdefault(row % 10, label) == label
    assert all(sorted(of.values()) == list(range(10)) for of in order.values())
    assert len({tuple(sorted(of.items())) for of in order.values()}) > 1


def test_sizes_are_lognormal_and_cut():
    sizes = np.array([c.num_examples for c in small(num_clients=20_000).clients])
    assert np.median(sizes) == 40
    logs = np.log(sizes[(sizes > 10) & (sizes < 160)])
    assert abs(logs.std() - 0.5) < 0.03
    assert sizes.min() == 10 and sizes.max() == 160


def test_a_small_alpha_skews_labels():
    def largest_share(alpha: float) -> float:
        data = small(alpha=alpha)
        counts = [np.bincount(data.load(c).train.y.numpy(), minlength=10) for c in range(40)]
        return float(np.mean([n.max() / n.sum() for n in counts]))

    assert largest_share(0.1) > 0.6 > 0.3 > largest_share(100.0)


def test_the_hash_is_of_the_settings_and_the_source():
    named = small().partition_hash
    assert named == small().partition_hash and len(named) == 16
    changes = ({"seed": 1}, {"num_clients": 41}, {"alpha": 2.0}, {"median": 39}, {"test": 10})
    others = {small(**c).partition_hash for c in changes}
    fewer = small(source=numbered(3_990)).partition_hash
    assert len({named, fewer, *others}) == 2 + len(changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_clients": 0}, "num_clients must be at least 1, got 0"),
        ({"median": 5}, "median must be from least to most .10 to 160., got 5"),
        ({"alpha": 0.0}, "alpha must be a positive number, got 0.0"),
        ({"spread": float("nan")}, "spread must be a positive number"),
        ({"most": 600}, "must leave a client 750 images of one label .* lower most"),
        ({"test": 500}, "must leave a client 500 images of one label .* lower test"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_client_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="client must be between 0 and 39, got 40"):
        small().load(40)
    with pytest.raises(KeyError):
        small().groups[40]


def test_groups_are_told_as_a_tuple_of_clients_would_have_them():
    few = domains(0, train=5, validation=5, test=5, num_clients=8, source=SOURCE)
    assert dict(small(num_clients=8).groups) == dict(few.groups)
