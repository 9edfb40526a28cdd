from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.data import partition
from fedmoe.data.partition import partition_hash, split

LABEL_N = np.random.default_rng(0).integers(0, 10, 2_003)  # 2,003 is prime: nothing divides it

# Every partitioner, with the number of examples it may leave out.
PARTITIONERS = {
    "dirichlet": (lambda y, seed: partition.dirichlet(y, 12, 0.3, seed, min_examples=5), 0),
    "pathological": (lambda y, seed: partition.pathological(y, 12, 2, seed), 0),
    "shards": (lambda y, seed: partition.shards(y, 12, 3, seed), 12 * 3 - 1),
    "iid": (lambda y, seed: partition.iid(y, 12, seed), 0),
    "natural": (lambda y, seed: partition.natural((y + seed) % 7), 0),
}
every_partitioner = pytest.mark.parametrize(
    ("make", "may_leave"), PARTITIONERS.values(), ids=PARTITIONERS.keys()
)
# With natural ids there is nothing to draw.
every_seeded = pytest.mark.parametrize(
    "make", [make for name, (make, _) in PARTITIONERS.items() if name != "natural"],
    ids=[name for name in PARTITIONERS if name != "natural"],
)  # fmt: skip


@every_partitioner
@pytest.mark.parametrize("seed", [0, 1])
def test_no_example_is_on_two_clients_and_none_is_lost_beyond_the_promise(make, may_leave, seed):
    parts = make(LABEL_N, seed)
    joined = np.concatenate(parts)
    assert len(np.unique(joined)) == len(joined)
    assert set(joined.tolist()) <= set(range(len(LABEL_N)))
    assert len(LABEL_N) - len(joined) <= may_leave
    assert all(len(p) > 0 for p in parts)


@every_partitioner
def test_each_clients_indices_are_ascending_int64(make, may_leave):
    for index_N in make(LABEL_N, 0):
        assert index_N.dtype == np.int64
        assert (np.diff(index_N) > 0).all()


@every_partitioner
def test_the_same_seed_gives_the_same_partition_whatever_else_was_drawn(make, may_leave):
    first = make(LABEL_N, 3)
    np.random.default_rng(0).random(5)
    np.random.random(5)
    second = make(torch.from_numpy(LABEL_N), 3)  # a tensor is as good as an array
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@every_seeded
def test_another_seed_gives_another_partition(make):
    pairs = zip(make(LABEL_N, 0), make(LABEL_N, 1), strict=True)
    assert any(not np.array_equal(a, b) for a, b in pairs)


@every_partitioner
def test_a_partitioner_leaves_the_global_random_numbers_alone(make, may_leave):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    make(LABEL_N, 0)
    assert np.array_equal(before, np.random.get_state()[1])


def test_partitioners_print_nothing(capfd):
    for make, _ in PARTITIONERS.values():
        make(LABEL_N, 0)
    assert capfd.readouterr() == ("", "")


def test_dirichlet_gives_every_client_at_least_min_examples():
    sizes = [len(p) for p in partition.dirichlet(LABEL_N, 10, 0.3, 0, min_examples=30)]
    assert min(sizes) >= 30


def test_a_smaller_alpha_leaves_a_client_with_fewer_labels():
    def labels_a_client(alpha: float) -> float:
        parts = partition.dirichlet(LABEL_N, 10, alpha, 0, min_examples=1)
        return float(np.mean([len(np.unique(LABEL_N[p])) for p in parts]))

    assert labels_a_client(0.05) < 5 < 9 < labels_a_client(100.0)


@pytest.mark.parametrize("labels_per_client", [1, 2, 7])
def test_pathological_clients_hold_exactly_that_many_labels(labels_per_client):
    parts = partition.pathological(LABEL_N, 20, labels_per_client, 0)
    assert {len(np.unique(LABEL_N[p])) for p in parts} == {labels_per_client}


def test_a_label_that_no_client_drew_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="will NOT be used"):
        parts = partition.pathological(LABEL_N, 2, 3, 0)
    held = set(LABEL_N[np.concatenate(parts)].tolist())
    assert len(held) < 10
    assert sum(map(len, parts)) == np.isin(LABEL_N, list(held)).sum()  # of the others, all


def test_shards_are_runs_of_the_examples_sorted_by_label():
    label_N = np.array([1, 0, 1, 0])  # sorted: 1 and 3 with label 0, then 0 and 2 with label 1
    parts = sorted(p.tolist() for p in partition.shards(label_N, 2, 1, 0))
    assert parts == [[0, 2], [1, 3]]


def test_shards_that_divide_the_examples_leave_none_out():
    parts = partition.shards(LABEL_N[:2_000], 20, 2, 0)
    assert [len(p) for p in parts] == [100] * 20


def test_iid_sizes_differ_by_one_at_most_and_a_number_will_do_for_labels():
    parts = partition.iid(2_003, 12, 0)
    assert {len(p) for p in parts} == {166, 167}
    same = zip(parts, partition.iid(LABEL_N, 12, 0), strict=True)
    assert all(np.array_equal(a, b) for a, b in same)


def test_natural_ids_make_one_client_each_in_sorted_order():
    parts = partition.natural(["bo", "ada", "bo", "cy", "ada"])
    assert [p.tolist() for p in parts] == [[1, 4], [0, 2], [3]]  # ada, bo, cy


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: partition.iid(5, 6, 0), "num_clients .* between 1 and the 5 examples, got 6"),
        (lambda: partition.iid(5, 0, 0), "num_clients .* got 0"),
        (lambda: partition.iid(0, 1, 0), "at least one"),
        (lambda: partition.iid(5, 1, -1), "seed must be at least 0, got -1"),
        (lambda: partition.shards([], 1, 1, 0), "labels must be a list of at least one"),
        (lambda: partition.shards([0.5], 1, 1, 0), r"integer, got shape \(1,\) of float64"),
        (lambda: partition.shards([0, 1, 2], 2, 2, 0), "shards_per_client .* 1 and 1 .* got 2"),
        (lambda: partition.dirichlet([0, 1], 1, 0.0, 0), "alpha must be a positive .* got 0.0"),
        (lambda: partition.dirichlet([0, 1], 1, float("nan"), 0), "alpha .* got nan"),
        (lambda: partition.dirichlet([0, 1], 1, 1, 0, 3), "min_examples .* 0 and 2 .* got 3"),
        (lambda: partition.dirichlet(LABEL_N, 20, 0.01, 0, 50), "no draw of eleven .* raise"),
        (lambda: partition.pathological([0, 1], 1, 3, 0), "between 1 and the 2 labels, got 3"),
        (lambda: partition.natural([]), "ids must be a list of at least one id"),
    ],
)
def test_a_wrong_argument_is_named_with_its_limit_and_value(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# --- split


@given(n=st.integers(3, 300), share=st.floats(0.05, 0.9), seed=st.integers(0, 9))
def test_shares_use_every_example_once_in_sizes_within_one_of_the_share(n, share, seed):
    shares = (share, (1 - share) / 3, 1 - share - (1 - share) / 3)
    index_N = np.arange(n) * 3 + 1
    parts = split(index_N, shares, np.random.default_rng(seed))
    assert sorted(np.concatenate(parts).tolist()) == index_N.tolist()
    for part, wanted in zip(parts, shares, strict=True):
        assert abs(len(part) - wanted * n) <= 1
        assert (np.diff(part) > 0).all()


def test_counts_are_met_exactly_and_the_rest_is_not_used():
    train, validation, test = split(range(100), (20, 10, 30), np.random.default_rng(0))
    assert (len(train), len(validation), len(test)) == (20, 10, 30)
    assert len(set(train) | set(validation) | set(test)) == 60


def test_a_split_follows_its_generator():
    def drawn(seed: int) -> list[int]:
        return split(range(100), (0.5, 0.2, 0.3), np.random.default_rng(seed))[0].tolist()

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ((5, 5, 1), "asks for 11 examples, more than the 10"),
        ((0.5, 0.2, 0.2), "sum to 1, got .* 0.89"),
        ((11, -1, 0), "of at least 0"),
        ((0.5, 0.5), "three numbers"),
    ],
)
def test_a_split_that_cannot_be_made_says_why(wanted, said):
    with pytest.raises(ValueError, match=said):
        split(range(10), wanted, np.random.default_rng(0))


# --- partition_hash

PARTS = [([0, 5], [2], [3]), ([7], [], [1, 4])]


def test_the_hash_is_the_sha256_of_lengths_and_indices_in_order():
    raw = b"fedmoe partition" + struct.pack("<q", 2)
    raw += struct.pack("<q qqq qq qq", 3, 2, 0, 5, 1, 2, 1, 3)
    raw += struct.pack("<q qq q qqq", 3, 1, 7, 0, 2, 1, 4)
    assert partition_hash(PARTS) == hashlib.sha256(raw).hexdigest()[:16]


@pytest.mark.parametrize("dtype", ["<i8", ">i8", "i4", "u1"])
def test_the_hash_does_not_depend_on_how_numbers_are_stored(dtype):
    stored = [tuple(np.array(p, dtype) for p in client) for client in PARTS]
    assert partition_hash(stored) == partition_hash(PARTS)


@pytest.mark.parametrize(
    "moved",
    [
        [([0], [5, 2], [3]), ([7], [], [1, 4])],  # to another part
        [([0], [2], [3]), ([5, 7], [], [1, 4])],  # to another client
        [([0, 6], [2], [3]), ([7], [], [1, 4])],  # another index
        [([7], [], [1, 4]), ([0, 5], [2], [3])],  # clients changed places
        [([0, 5], [2], [3])],  # a client fewer
    ],
)
def test_the_hash_changes_when_one_index_moves(moved):
    assert partition_hash(moved) != partition_hash(PARTS)


@given(st.data())
def test_no_two_ways_to_cut_a_row_of_indices_share_a_hash(data):
    cuts = st.lists(st.integers(0, 6), min_size=5, max_size=5).map(sorted)

    def cut_up(at: list[int]) -> list[list[list[int]]]:
        pieces = [list(range(6))[a:b] for a, b in zip([0, *at], [*at, 6], strict=True)]
        return [pieces[:3], pieces[3:]]

    first, second = data.draw(cuts), data.draw(cuts)
    same = partition_hash(cut_up(first)) == partition_hash(cut_up(second))
    assert same == (cut_up(first) == cut_up(second))


@pytest.mark.slow
def test_another_process_makes_the_same_partition():
    code = (
        "import numpy as np; from fedmoe.data.partition import dirichlet, partition_hash;"
        "y = np.random.default_rng(0).integers(0, 10, 2_003);"
        "print(partition_hash([[p] for p in dirichlet(y, 12, 0.3, 0)]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(partition.__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    here = partition_hash([[p] for p in partition.dirichlet(LABEL_N, 12, 0.3, 0)])
    assert run.stdout.strip() == here
