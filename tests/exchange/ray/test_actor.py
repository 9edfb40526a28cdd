import pytest
import torch

from fedmoe.data.examples import ClientData, Examples
from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.ray.actor import MARK, Remembered, Worker
from fedmoe.exchange.ray.packing import pack
from tests.tiny import client_data


def data_of(num_bytes):
    """In its training inputs; the labels and the rest are empty."""
    none = Examples(torch.empty(0), torch.empty(0, dtype=torch.int64))
    return ClientData(Examples(torch.zeros(num_bytes // 4), none.y), none, none)


def test_clients_data_used_last_are_kept_up_to_the_limit():
    loaded = []

    def load(client):
        loaded.append(client)
        return data_of(400)

    remembered = Remembered(load, max_bytes=1000)
    for client in (0, 1, 0, 2, 0, 1):  # 2 comes in place of 1, and 1 in place of 2
        assert len(remembered(client).train.x) == 100
    assert loaded == [0, 1, 2, 1]


def test_data_that_are_larger_than_the_limit_are_not_kept_and_push_nobody_out():
    loaded = []

    def load(client):
        loaded.append(client)
        return data_of(4000 if client else 400)

    remembered = Remembered(load, max_bytes=1000)
    for client in (0, 1, 1, 0):
        remembered(client)
    assert loaded == [0, 1, 1]


def test_what_is_remembered_is_what_was_loaded():
    remembered = Remembered(client_data, max_bytes=10**6)
    for _ in range(2):
        assert torch.equal(remembered(3).train.x, client_data(3).train.x)


@pytest.mark.parametrize("there", [None, "of another run"])
def test_an_actor_that_sees_another_folder_than_its_leader_says_so(tmp_path, there):
    if there is not None:
        (tmp_path / MARK).write_text(there)
    with pytest.raises(ValueError, match=r"must be the same folder for all actors .* machines"):
        Worker(pack(in_process), tmp_path, "of this run")
