from __future__ import annotations

import pytest
import torch

from fedmoe.data.examples import ClientData, Examples, check_client_data


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
