import os
from pathlib import Path

import pytest
import torch

from fedmoe import checkpoint
from fedmoe.exchange.personal import KEEP, PersonalStore
from fedmoe.state import split_state, state_hash
from fedmoe.types import ExpertId, MoEState
from tests.tiny import one_layer, ragged


def rounds_on_disk(folder, client):
    return sorted(p.name for p in (folder / f"client-{client:06d}").iterdir())


def own(value):
    return one_layer(float(value), None, float(value))


def kept(store, client, before):
    state = store.load(client, before)
    return None if state is None else int(state.shared["w"])


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    store = PersonalStore(tmp_path)
    state = split_state(ragged())
    odd = MoEState(
        {"a/b": torch.ones(2, 3).t(), "n": torch.tensor(7), "é": torch.zeros(0)},
        {ExpertId(1, 12): {"gate:proj.weight": torch.arange(3.0).bfloat16()}},
    )
    for client, saved in enumerate((state, odd, MoEState({}, {}))):
        store.save(client, 5, saved)
        assert state_hash(store.load(client, 6)) == state_hash(saved)


def test_a_client_has_nothing_before_its_first_training(tmp_path):
    store = PersonalStore(tmp_path / "new")
    assert store.load(3, 100) is None
    store.save(3, 2, own(2))
    assert store.load(3, 2) is None and store.load(4, 100) is None
    assert kept(store, 3, 3) == kept(store, 3, 50) == 2


def test_a_round_that_is_begun_again_begins_with_what_was_before_it(tmp_path):
    store = PersonalStore(tmp_path)
    for round in range(3):
        store.save(0, round, own(round))
    assert [kept(store, 0, before) for before in range(4)] == [None, 0, 1, 2]
    store.save(0, 1, own(11))  # the server went back to round 1
    assert [kept(store, 0, before) for before in range(4)] == [None, 0, 11, 11]
    assert rounds_on_disk(tmp_path, 0) == [
        "round-000000.safetensors", "round-000001.safetensors"
    ]


def test_the_newest_rounds_stay_one_more_than_the_servers_checkpoints(tmp_path):
    store = PersonalStore(tmp_path)
    for round in range(10):
        store.save(0, round, own(round))
    assert len(rounds_on_disk(tmp_path, 0)) == KEEP
    assert kept(store, 0, 10 - KEEP) is None and kept(store, 0, 11 - KEEP) == 10 - KEEP
    # Killed in round 9 after this client's work, and back to the oldest checkpoint that is kept:
    # those before rounds 9, 8 and 7.
    oldest = 9 - (checkpoint.KEEP - 1)
    assert kept(store, 0, oldest) == oldest - 1


def test_clients_do_not_see_each_others_files(tmp_path):
    store = PersonalStore(tmp_path)
    for client in (1, 11, 1_000_001):
        store.save(client, 0, own(client))
    assert [kept(store, c, 1) for c in (1, 11, 1_000_001)] == [1, 11, 1_000_001]


@pytest.mark.parametrize("damage", [b"", b"noise" * 20, None], ids=["empty", "noise", "cut"])
def test_damage_is_told_with_client_and_file(tmp_path, damage):
    store = PersonalStore(tmp_path)
    store.save(4, 1, own(1))
    path = tmp_path / "client-000004" / "round-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-2] if damage is None else damage)
    with pytest.raises(ValueError, match="client 4: .*round-000001.safetensors is damaged"):
        store.load(4, 2)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("owner, name", [(os, "fsync"), (Path, "replace")], ids=str)
def test_a_kill_while_saving_leaves_what_was_there(tmp_path, monkeypatch, owner, name):
    store = PersonalStore(tmp_path)
    store.save(0, 1, own(1))

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            store.save(0, 1, own(5))
        with pytest.raises(Killed):
            store.save(0, 2, own(2))
    assert kept(store, 0, 9) == 1
    store.save(0, 2, own(2))
    assert kept(store, 0, 9) == 2
    assert len(rounds_on_disk(tmp_path, 0)) == 2  # nothing is left lying about
