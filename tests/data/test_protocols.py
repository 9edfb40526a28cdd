from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmoe.data.examples import Examples, FederatedData
from fedmoe.data.protocols import (
    DOMAINS,
    dirichlet,
    domains,
    heldout,
    heldout_encoder_images,
    published,
    two_domains,
)


def numbered(n: int = 3_000, first: int = 0) -> Examples:
    """Images that can be told apart: two pixels of the top row number them, one marks top right."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 250, (n, 28, 28), np.uint8))
    number = torch.arange(first, first + n)
    image[:, 0, 0] = number // 256
    image[:, 0, 1] = number % 256
    image[:, 0, 27] = 255
    return Examples(image, number % 10)


SOURCE = numbered()
TWO_SOURCES = {"mnist": SOURCE, "fashion-mnist": numbered(2_500, first=3_000)}


@pytest.fixture(scope="session")
def many() -> Examples:
    """As many images as Fashion-MNIST has, all black: only their number matters."""
    return Examples(torch.zeros(70_000, 28, 28, dtype=torch.uint8), torch.arange(70_000) % 10)


def small_domains(seed: int = 0, num_clients: int = 8) -> FederatedData:
    return domains(
        seed, train=20, validation=10, test=30, num_clients=num_clients, source=SOURCE
    )  # fmt: skip


def small_heldout(seed: int = 0, **changes: int) -> FederatedData:
    sizes = {"num_clients": 12, "unseen": 6, "train": 30, "validation": 8, "test": 24}
    return heldout(seed, **{**sizes, **changes}, source=SOURCE)


def everybody(data: FederatedData) -> list[int]:
    return [c.id for c in (*data.clients, *data.unseen)]


def as_stored(image_N1HW: torch.Tensor, domain: str) -> torch.Tensor:
    """Normalised images back to bytes as the source has them: each transform undoes itself."""
    byte = ((image_N1HW * 0.353 + 0.286) * 255).round().to(torch.uint8).squeeze(1)
    return DOMAINS.get(domain, DOMAINS["upright"])(byte)


def source_rows(examples: Examples, domain: str = "upright") -> torch.Tensor:
    byte = as_stored(examples.x, domain)
    return byte[:, 0, 0].long() * 256 + byte[:, 0, 1].long()


EVERY_PROTOCOL = {
    "domains": small_domains,
    "two domains": lambda seed=0: two_domains(
        seed, train=20, validation=10, test=30, num_clients=7, sources=TWO_SOURCES
    ),
    "dirichlet": lambda seed=0: dirichlet(seed, 0.5, num_clients=9, share=0.8, source=SOURCE),
    "heldout": lambda seed=0: small_heldout(seed),
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
        source_rows(part, data.groups.get(c, "upright"))
        for c in everybody(data)
        for part in vars(data.load(c)).values()
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
    known = (*data.clients, *data.unseen)
    assert [c.id for c in known] == list(range(len(known)))
    assert [c.num_examples for c in known] == [len(data.load(c.id).train.y) for c in known]
    assert all(c.task is None and c.memory_bytes is None for c in known)


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


@pytest.mark.parametrize("train", [50, 200, 1_000])
def test_fashion_mnist_has_images_for_24_clients_of(train, many):
    data = domains(0, train=train, source=many)
    parts = vars(data.load(23)).values()
    assert [len(p.y) for p in parts] == [train, 100, 300]


# --- two domains


def test_even_clients_have_digits_and_odd_ones_clothes_each_under_its_own_labels():
    data = EVERY_PROTOCOL["two domains"]()
    for c in range(7):
        assert data.groups[c] == ("mnist", "fashion-mnist")[c % 2]
        train = data.load(c).train
        rows = source_rows(train)
        assert (rows >= 3_000).all() if c % 2 else (rows < 3_000).all()
        assert torch.equal(train.y, rows % 10)


def test_digits_and_clothes_are_drawn_apart():
    """The number of clothes has no say in which digits are drawn."""
    fewer = {**TWO_SOURCES, "fashion-mnist": numbered(2_000, first=3_000)}
    whole, part = (
        two_domains(0, train=20, validation=10, test=30, num_clients=8, sources=s)
        for s in (TWO_SOURCES, fewer)
    )
    assert torch.equal(whole.load(2).train.x, part.load(2).train.x)
    assert not torch.equal(whole.load(3).train.x, part.load(3).train.x)


def test_two_domains_that_cannot_be_filled_are_refused():
    with pytest.raises(ValueError, match=r"must be at most 4 \(2500 images, 600 .* got 5"):
        two_domains(0, num_clients=10, sources=TWO_SOURCES)
    with pytest.raises(ValueError, match="test must be at least 0, got -1"):
        two_domains(0, test=-1, sources=TWO_SOURCES)


@pytest.mark.slow
def test_the_real_two_domains(fashion_mnist, real_mnist):
    data = two_domains(0, sources={"mnist": real_mnist, "fashion-mnist": fashion_mnist})
    assert [len(data.clients), data.clients[23].num_examples] == [24, 200]
    assert data.partition_hash == "d76c1e2205840e3d"


# --- dirichlet


def test_at_alpha_a_tenth_it_is_the_published_partition():
    mine = dirichlet(1, 0.1, num_clients=6, source=SOURCE)
    theirs = published(1, partition="dirichlet", num_clients=6, source=SOURCE)
    assert mine.partition_hash == theirs.partition_hash
    assert mine.name == "dirichlet-0.1-over-6"


def test_a_smaller_alpha_gives_clients_fewer_labels():
    def labels_held(alpha: float) -> float:
        data = dirichlet(0, alpha, num_clients=10, min_examples=4, source=SOURCE)
        return sum(len(data.load(c.id).train.y.unique()) for c in data.clients) / 10

    assert labels_held(0.1) + 2 < labels_held(0.5) < labels_held(100.0) == 10


@pytest.mark.parametrize("num_clients, least", [(20, 40), (21, 10)])
def test_a_skew_that_cannot_be_had_is_refused_with_the_images_that_each_client_must_have(
    num_clients, least
):
    said = f"no draw of eleven gave each of the {num_clients} clients min_examples={least} of 3000"
    with pytest.raises(ValueError, match=said):
        dirichlet(0, 0.01, num_clients=num_clients, source=SOURCE)


def test_an_alpha_of_0_is_refused():
    with pytest.raises(ValueError, match="alpha must be a positive number, got 0"):
        dirichlet(0, 0, source=SOURCE)


@pytest.mark.slow
def test_100_clients_share_fashion_mnist_at_every_skew(fashion_mnist):
    for alpha, wanted in ((0.1, "772c209f0f162776"), (0.5, "d60dc8826d92354f")):
        data = dirichlet(0, alpha, num_clients=100)
        assert len(data.clients) == 100
        assert data.partition_hash == wanted


# --- held-out combinations


def label_sets(data: FederatedData) -> list[set[int]]:
    return [{int(label) for label in data.groups[c].split("+")} for c in everybody(data)]


def test_the_default_is_30_clients_and_10_unseen_ones(many):
    data = heldout(0, source=many)
    assert [len(data.clients), len(data.unseen)] == [30, 10]
    assert [c.id for c in data.unseen] == list(range(30, 40))
    assert [len(p.y) for p in vars(data.load(39)).values()] == [300, 60, 240]


def test_the_first_clients_are_anchors_whose_labels_tile_the_ten():
    sets = label_sets(small_heldout())
    assert [len(s) for s in sets] == [2] * 5 + [4] * 13
    assert sorted(label for s in sets[:5] for label in s) == list(range(10))
    assert sets[:5] != label_sets(small_heldout(1))[:5]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("labels, anchors", [(4, 5), (2, 5), (5, 2), (1, 1)])
def test_no_unseen_client_has_the_labels_of_a_training_client(seed, labels, anchors):
    data = small_heldout(seed, num_clients=8 if labels > 1 else 3, labels=labels, anchors=anchors)
    sets = [frozenset(s) for s in label_sets(data)]
    assert len(set(sets)) == len(sets)
    assert all(len(s) == labels for s in sets[anchors:])


def test_clients_have_just_the_labels_of_their_group_in_equal_shares():
    data = small_heldout()
    for c, labels in zip(everybody(data), label_sets(data), strict=True):
        for part in vars(data.load(c)).values():
            counts = torch.bincount(part.y, minlength=10)
            assert {int(label) for label in counts.nonzero()} == labels
            assert counts.max() - counts[counts > 0].min() <= 1
            assert torch.equal(part.y, source_rows(part) % 10)


def test_the_encoders_images_are_on_no_client_whatever_the_clients_ask_for():
    encoder = set(source_rows(heldout_encoder_images(0, 900, source=SOURCE)).tolist())
    assert len(encoder) == 900  # three tenths of 3,000: all that are put aside
    for data in (small_heldout(), small_heldout(num_clients=20, train=40, test=20, unseen=1)):
        for c in everybody(data):
            for part in vars(data.load(c)).values():
                assert not encoder & set(source_rows(part).tolist())


def test_fewer_images_for_the_encoder_are_a_part_of_more_and_have_all_labels():
    few, many = (heldout_encoder_images(0, n, source=SOURCE) for n in (200, 500))
    assert torch.equal(few.x, many.x[:200]) and torch.equal(few.y, many.y[:200])
    assert torch.equal(few.y, source_rows(few) % 10)
    assert torch.bincount(few.y, minlength=10).min() > 5
    assert not torch.equal(few.x, heldout_encoder_images(1, 200, source=SOURCE).x)
    assert (few.x.shape, few.x.dtype) == ((200, 1, 28, 28), torch.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"anchors": 3}, "anchors must divide the 10 labels .* got 3"),
        ({"anchors": 0}, "anchors must divide .* got 0"),
        ({"num_clients": 4}, r"at most num_clients \(4\), got 5"),
        ({"labels": 11}, "labels must be between 1 and 10, got 11"),
        ({"unseen": -1}, "unseen must be at least 0, got -1"),
        ({"labels": 9}, "must be at most 10, the combinations of 9 labels .* got 13"),
        ({"train": 200}, "ask for more images of label . than clients can have; lower them"),
        ({"train": 0}, "train must be at least 1, got 0"),
    ],
)
def test_held_out_combinations_that_cannot_be_had_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        small_heldout(**change)


@pytest.mark.parametrize("count", [0, 901])
def test_more_images_for_the_encoder_than_are_put_aside_are_refused(count):
    with pytest.raises(ValueError, match=f"count must be between 1 and the 900 .* got {count}"):
        heldout_encoder_images(0, count, source=SOURCE)


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
    assert heldout(0).partition_hash == "ae73ba8be65c7872"
