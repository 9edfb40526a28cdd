from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmoe.data.examples import Examples, FederatedData
from fedmoe.data.protocols import DOMAINS, domains, published


def numbered(n: int = 3_000) -> Examples:
    """Images that can be told apart: two pixels of the top row number them, one marks top right."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 250, (n, 28, 28), np.uint8))
    image[:, 0, 0] = torch.arange(n) // 256
    image[:, 0, 1] = torch.arange(n) % 256
    image[:, 0, 27] = 255
    return Examples(image, torch.arange(n) % 10)


SOURCE = numbered()


def small_domains(seed: int = 0, num_clients: int = 8) -> FederatedData:
    return domains(
        seed, train=20, validation=10, test=30, num_clients=num_clients, source=SOURCE
    )  # fmt: skip


def as_stored(image_N1HW: torch.Tensor, domain: str) -> torch.Tensor:
    """Normalised images back to bytes as the source has them: each transform undoes itself."""
    byte = ((image_N1HW * 0.353 + 0.286) * 255).round().to(torch.uint8).squeeze(1)
    return DOMAINS[domain](byte)


def source_rows(examples: Examples, domain: str = "upright") -> torch.Tensor:
    byte = as_stored(examples.x, domain)
    return byte[:, 0, 0].long() * 256 + byte[:, 0, 1].long()


EVERY_PROTOCOL = {
    "domains": small_domains,
    "published dirichlet": lambda seed=0: published(
        seed, partition="dirichlet", num_clients=8, source=SOURCE
    ),
    "published pathological": lambda seed=0: published(
        seed, partition="pathological", num_clients=10, source=SOURCE
    ),
    "published part": lambda seed=0: published(
        seed, partition="pathological", share=0.4, num_clients=10, source=SOURCE
    ),
}
every_protocol = pytest.mark.parametrize("make", EVERY_PROTOCOL.values(), ids=EVERY_PROTOCOL.keys())


@every_protocol
def test_no_image_is_used_twice(make):
    data = make()
    seen = [
        source_rows(part, data.groups.get(c.id, "upright"))
        for c in data.clients
        for part in vars(data.load(c.id)).values()
    ]
    rows = torch.cat(seen)
    assert len(rows.unique()) == len(rows)


@every_protocol
def test_inputs_are_normalised_float32_with_one_channel_and_labels_int64(make):
    data = make()
    for part in vars(data.load(0)).values():
        assert part.x.shape[1:] == (1, 28, 28)
        assert (part.x.dtype, part.y.dtype) == (torch.float32, torch.int64)
        assert part.x.is_contiguous()
        assert float(part.x.max()) == pytest.approx((1 - 0.286) / 0.353)  # 2.0227: a pixel of 255


@every_protocol
def test_loading_a_client_again_gives_the_same_examples_and_copies(make):
    data = make()
    first, again = data.load(1), data.load(1)
    assert torch.equal(first.train.x, again.train.x)
    assert torch.equal(first.test.y, again.test.y)
    first.train.x.zero_()
    first.train.y.zero_()
    assert torch.equal(again.train.x, data.load(1).train.x)
    assert torch.equal(again.train.y, data.load(1).train.y)


@every_protocol
def test_the_hash_names_the_partition(make):
    assert make(0).partition_hash == make(0).partition_hash != make(1).partition_hash


@every_protocol
def test_the_server_knows_sizes_and_no_task(make):
    data = make()
    assert [c.id for c in data.clients] == list(range(len(data.clients)))
    assert [c.num_examples for c in data.clients] == [
        len(data.load(c.id).train.y) for c in data.clients
    ]
    assert all(c.task is None and c.memory_bytes is None for c in data.clients)


@every_protocol
def test_a_client_that_is_not_there_is_refused(make):
    data = make()
    with pytest.raises(ValueError, match=rf"client must be between 0 and .*, got {10**6}"):
        data.load(10**6)
    with pytest.raises(ValueError, match="got -1"):
        data.load(-1)


# --- domains


def test_the_default_is_24_clients_of_200_100_and_300_images():
    data = domains(0, source=numbered(14_400))
    assert len(data.clients) == 24
    parts = data.load(23)
    assert [len(p.y) for p in (parts.train, parts.validation, parts.test)] == [200, 100, 300]
    assert data.num_classes == 10


def test_clients_take_turns_in_four_domains():
    groups = small_domains().groups
    assert [groups[c] for c in range(5)] == [
        "upright",
        "flipped",
        "transposed",
        "inverted",
        "upright",
    ]
    with pytest.raises(TypeError):
        groups[0] = "flipped"


@pytest.mark.parametrize(
    ("domain", "wanted"),
    [
        ("upright", [[1, 2], [3, 4]]),
        ("flipped", [[3, 4], [1, 2]]),
        ("transposed", [[1, 3], [2, 4]]),
        ("inverted", [[254, 253], [252, 251]]),
    ],
)
def test_what_each_domain_does_to_four_pixels(domain, wanted):
    image = torch.tensor([[[1, 2], [3, 4]]], dtype=torch.uint8)
    assert DOMAINS[domain](image)[0].tolist() == wanted


def test_each_domain_shows_the_sources_images_in_its_way():
    data = small_domains()
    for client in range(4):
        train = data.load(client).train
        rows = source_rows(train, data.groups[client])
        assert torch.equal(as_stored(train.x, data.groups[client]), SOURCE.x[rows])


def test_each_domain_renumbers_the_labels_one_to_one_in_an_order_of_its_own():
    data = domains(0, train=100, validation=0, test=0, num_clients=8, source=SOURCE)
    new_of = {}
    for client in range(8):
        train = data.load(client).train
        pairs = set(
            zip(SOURCE.y[source_rows(train, data.groups[client])].tolist(), train.y.tolist(),
                strict=True)
        )  # fmt: skip
        assert len(pairs) == 10  # all ten labels are there, and each has one new number
        order = tuple(new for _, new in sorted(pairs))
        assert sorted(order) == list(range(10))
        assert new_of.setdefault(data.groups[client], order) == order
    assert len(set(new_of.values())) == 4


def test_label_orders_do_not_depend_on_how_many_images_are_drawn():
    few, many = (domains(0, train=n, num_clients=4, source=SOURCE) for n in (50, 100))

    def order(data: FederatedData) -> set[tuple[int, int]]:
        test = data.load(1).test
        rows = source_rows(test, "flipped")
        return set(zip(SOURCE.y[rows].tolist(), test.y.tolist(), strict=True))

    assert order(few) == order(many)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_clients": 6}, r"num_clients must be at most 5 \(3000 images, 600 .* got 6"),
        ({"num_clients": 0}, "num_clients must be at least 1, got 0"),
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"test": -1}, "test must be at least 0, got -1"),
    ],
)
def test_domains_that_cannot_be_filled_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        domains(0, source=SOURCE, **change)


# --- published


def test_every_image_is_used_and_three_quarters_of_each_clients_train_with_a_tenth_set_aside():
    data = published(0, partition="dirichlet", num_clients=8, source=SOURCE)
    total = 0
    for c in data.clients:
        parts = data.load(c.id)
        sizes = np.array([len(parts.train.y), len(parts.validation.y), len(parts.test.y)])
        total += sizes.sum()
        assert np.abs(sizes - sizes.sum() * np.array([0.675, 0.075, 0.25])).max() <= 1
        assert sizes.sum() >= 40
    assert total == 3_000
    assert len({c.num_examples for c in data.clients}) > 4  # sizes as they fall


def test_pathological_clients_have_two_labels_in_all_their_parts_together():
    data = published(0, partition="pathological", source=SOURCE)
    assert len(data.clients) == 20
    for c in data.clients:
        parts = vars(data.load(c.id)).values()
        assert len(torch.cat([p.y for p in parts]).unique()) == 2


def test_labels_are_those_of_the_source():
    train = published(0, partition="dirichlet", num_clients=8, source=SOURCE).load(2).train
    assert torch.equal(train.y, SOURCE.y[source_rows(train)])


def test_a_fifth_takes_a_fifth_of_every_label():
    data = published(0, partition="pathological", share=0.2, num_clients=10, source=SOURCE)
    label = torch.cat([p.y for c in data.clients for p in vars(data.load(c.id)).values()])
    assert torch.bincount(label).tolist() == [60] * 10  # 3,000 / 10 labels / 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"share": 0.0}, "share must be above 0 and at most 1, got 0.0"),
        ({"share": 1.1}, "share .* got 1.1"),
        ({"partition": "halves"}, "'dirichlet' or 'pathological', got 'halves'"),
        ({"source": Examples(SOURCE.x.float(), SOURCE.y)}, "uint8 images .* got torch.float32"),
        ({"source": Examples(SOURCE.x[:5], SOURCE.y)}, "and 3000 labels"),
        ({"source": Examples(SOURCE.x, SOURCE.y + 1)}, "between 0 and 9, got 1 to 10"),
    ],
)
def test_a_wrong_argument_is_named_with_its_limit_and_value(change, said):
    with pytest.raises(ValueError, match=said):
        published(0, **{"partition": "pathological", "source": SOURCE, **change})


@pytest.mark.slow
def test_the_published_partitions_of_fashion_mnist(fashion_mnist):
    dirichlet = published(0, partition="dirichlet")
    assert len(dirichlet.clients) == 20
    sizes = [sum(len(p.y) for p in vars(dirichlet.load(c)).values()) for c in range(20)]
    assert sum(sizes) == 70_000
    fifth = published(0, partition="pathological", share=0.2)
    assert sum(c.num_examples for c in fifth.clients) == pytest.approx(14_000 * 0.675, abs=20)
    # So that a change in a library, or in ours, that moves an image does not pass unseen.
    assert dirichlet.partition_hash == "f539f927c7a0304c"
    assert fifth.partition_hash == "bc5c84dd8b9586bf"
    assert domains(0).partition_hash == "72c549eff6b010ab"
