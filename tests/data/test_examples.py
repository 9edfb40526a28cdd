from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmoe.data.examples import ClientData, Examples, check_client_data, share_out
from fedmoe.data.partition import Indices, partition_hash


def examples(labels: list[int]) -> Examples:
    return Examples(torch.zeros(len(labels), 1, 28, 28), torch.tensor(labels, dtype=torch.int64))


def test_a_client_with_labels_in_range_passes_and_may_have_nothing_to_test():
    check_client_data(0, ClientData(examples([0, 9]), examples([3]), examples([])), 10)


def test_a_client_without_training_examples_is_refused_by_name():
    data = ClientData(examples([]), examples([1]), examples([1]))
    with pytest.raises(ValueError, match=r"client 7: the train part .* at least 1 .* got 0; give"):
        check_client_data(7, data, 10)


@pytest.mark.parametrize("label", [-1, 10])
@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_label_out_of_range_is_refused_with_client_part_limit_and_value(part, label):
    data = ClientData(examples([1]), examples([1]), examples([1]))
    parts = {**vars(data), part: examples([0, label, label])}
    with pytest.raises(
        ValueError, match=rf"client 3: {part} labels .* 0 and 9 .* got {label} and 1 more .* raise"
    ):
        check_client_data(3, ClientData(**parts), 10)


def test_inputs_without_labels_are_refused():
    uneven = Examples(torch.zeros(3, 1, 28, 28), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="client 0: test needs .* got 3 inputs and 2 labels"):
        check_client_data(0, ClientData(examples([1]), examples([1]), uneven), 10)


def test_labels_that_are_not_int64_are_refused():
    floats = Examples(torch.zeros(1, 1, 28, 28), torch.zeros(1))
    with pytest.raises(ValueError, match=r"client 0: validation labels must be int64, got .*32"):
        check_client_data(0, ClientData(examples([1]), floats, examples([1])), 10)


# --- share_out

# Three clients: (train, validation, test) of ten numbered examples.
PARTS = [
    tuple(np.array(part, dtype=np.int64) for part in parts)
    for parts in (([0, 1], [2], []), ([3], [], [4]), ([5, 6, 7], [8], [9]))
]


def take(client: int, index_N: Indices) -> Examples:
    """Inputs that say whose they are, and which."""
    return Examples(torch.from_numpy(index_N) + 100.0 * client, torch.from_numpy(index_N) % 3)


def test_the_last_clients_are_unseen_and_their_data_is_loaded_like_any_other():
    data = share_out("three", PARTS, take, 3, groups={2: "late"}, num_unseen=1)
    assert [(c.id, c.num_examples) for c in data.clients] == [(0, 2), (1, 1)]
    assert [(c.id, c.num_examples) for c in data.unseen] == [(2, 3)]
    assert data.load(2).train.x.tolist() == [205, 206, 207]
    assert data.load(1).test.y.tolist() == [1]
    assert data.groups == {2: "late"}
    assert data.partition_hash == partition_hash(PARTS)


def test_unless_said_otherwise_nobody_is_unseen():
    data = share_out("three", PARTS, take, 3)
    assert [c.id for c in data.clients] == [0, 1, 2]
    assert data.unseen == () and data.groups == {}


@pytest.mark.parametrize("client", [-1, 3])
def test_a_client_beyond_the_unseen_ones_is_refused(client):
    data = share_out("three", PARTS, take, 3, num_unseen=1)
    with pytest.raises(ValueError, match=f"client must be between 0 and 2, got {client}"):
        data.load(client)


def test_what_is_loaded_is_checked():
    with pytest.raises(ValueError, match="client 0: validation labels .*num_classes is 2"):
        share_out("three", PARTS, take, 2).load(0)
