import dataclasses
import enum
import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmoe.checkpoint import (
    DamagedCheckpointError,
    content_hash,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    snapshot,
)
from fedmoe.federated.fedavg import FedAvg, FixedSubMoE, ServerState
from fedmoe.federated.fedmoe import FedMoE, FedMoEState, Progress
from fedmoe.federated.per_group import GroupStates, PerGroup
from fedmoe.population import Population
from fedmoe.state import split_state
from fedmoe.table import Table
from fedmoe.types import Change, ClientInfo, ExpertId, MoEState, SubMoE
from tests.tiny import one_layer, profile, ragged, tiny, update

E0, E1 = ExpertId(0, 0), ExpertId(1, 10)


@dataclass(frozen=True, eq=False)
class Everything:
    """One field of every kind that a state may have."""

    whole: int
    real: float
    text: str
    yes: bool
    maybe: float | None
    tensor: Tensor
    tensors: Mapping[int, Tensor]
    held: Mapping[int, SubMoE]
    named: Mapping[str, tuple[int, ...]]
    by_expert: Mapping[ExpertId, float]
    pair: tuple[int, str]
    changes: tuple[Change, ...]
    model: MoEState


def everything(**changes):
    fields = {
        "whole": 3,
        "real": 0.1,
        "text": 'a "quoted"\nline, é',
        "yes": True,
        "maybe": None,
        "tensor": torch.arange(6).reshape(2, 3).t(),
        "tensors": {10: torch.tensor(1.5), 9: torch.zeros(0, 2, dtype=torch.bfloat16)},
        "held": {2: frozenset({E1, E0}), 1: frozenset()},
        "named": {"b": (1, 2), "a": ()},
        "by_expert": {E1: 0.5, E0: 1.0},
        "pair": (7, "seven"),
        "changes": (Change(1, "add", (E0, E1)), Change(2, "freeze", ())),
        "model": split_state(ragged()),
    }
    return Everything(**(fields | changes))


def same(a, b):
    """Slowly, and without the checkpoint's own idea of it."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(
            same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)
        )
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def fedmoe_state():
    """One that has explored, chosen, been stuck and changed."""
    model = one_layer(1.0, 1.0, 2.0, 3.0, 4.0)
    share_LE = profile([3, 1, 0, 0]).frequency_LE
    return FedMoEState(
        7,
        model,
        {0: ClientInfo(0, 12, 5, "task"), 11: ClientInfo(11)},
        {0: share_LE, 11: share_LE.flip(-1)},
        {0: torch.full((1, 4), 3), 11: torch.full((1, 4), -1)},
        {0: True, 11: False},
        {0: frozenset({E0, ExpertId(0, 3)}), 11: frozenset({ExpertId(0, 2)})},
        {0: Progress(0.5, 2, frozenset({E0}), True), 11: Progress()},
        (Change(11, "choose", (ExpertId(0, 2),)),),
    )


CLIENTS = [ClientInfo(0, 100), ClientInfo(1)]
STATES = {
    "everything": everything,
    "FedMoE": fedmoe_state,
    "FedMoE at first": lambda: FedMoE().init(one_layer(1.0, 1.0, 2.0), CLIENTS),
    "FedAvg": lambda: FedAvg().init(split_state(ragged()), CLIENTS),
    "FixedSubMoE": lambda: FixedSubMoE().init(split_state(tiny()), CLIENTS),
    "PerGroup": lambda: PerGroup({0: "a", 1: "b/c"}).init(split_state(tiny()), CLIENTS),
}


@pytest.fixture(params=STATES, ids=str)
def state(request):
    return STATES[request.param]()


def test_a_state_comes_back_as_it_was(state, tmp_path):
    digest = save_checkpoint(tmp_path, 12, state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000012"]
    round, back = load_checkpoint(tmp_path / "round-000012", type(state))
    assert round == 12
    assert same(state, back)
    assert content_hash(back) == content_hash(state) == digest
    assert newest_checkpoint(tmp_path, type(state), pytest.fail)[0] == 12


CHANGES = {
    "whole": 4,
    "real": 0.1 + 2**-56,
    "text": "",
    "yes": False,
    "maybe": 0.0,
    "tensor": torch.arange(6).reshape(3, 2),
    "tensors": {10: torch.tensor(1.5), 9: torch.zeros(0, 2)},
    "held": {2: frozenset({E1}), 1: frozenset({E0})},
    "named": {"b": (1,), "a": (2,)},
    "by_expert": {E1: 1.0, E0: 0.5},
    "pair": (7, "eight"),
    "changes": (Change(1, "drop", (E0, E1)), Change(2, "freeze", ())),
    "model": split_state(ragged(seed=1)),
}


def test_every_field_is_in_the_hash():
    hashes = [content_hash(everything())]
    hashes += [content_hash(everything(**{n: v})) for n, v in CHANGES.items()]
    assert set(CHANGES) == {f.name for f in dataclasses.fields(Everything)}
    assert len(set(hashes)) == len(hashes)


@dataclass(frozen=True, eq=False)
class Small:
    numbers: Mapping[int, tuple[int, ...]]
    tensors: Mapping[str, Tensor]


smalls = st.builds(
    Small,
    st.dictionaries(st.integers(0, 11), st.lists(st.integers(0, 2), max_size=2).map(tuple)),
    st.dictionaries(
        st.sampled_from("ab"),
        st.lists(st.integers(0, 1), max_size=2).map(torch.tensor)
        | st.lists(st.floats(0, 1, width=32), max_size=1).map(torch.tensor),
        max_size=2,
    ),
)


@given(smalls, smalls)
def test_hashes_are_equal_just_where_states_are(a, b):
    assert (content_hash(a) == content_hash(b)) == same(a, b)


def test_order_of_keys_and_layout_in_memory_are_not_in_the_hash():
    a = everything()
    b = everything(
        tensor=a.tensor.contiguous(),
        tensors=dict(reversed(a.tensors.items())),
        held=dict(reversed(a.held.items())),
    )
    assert content_hash(a) == content_hash(b)


def small(number):
    return ServerState(number, one_layer(float(number), 1.0))


def kept(folder):
    return [r.name for r in sorted(folder.iterdir())]


def test_the_newest_are_kept(tmp_path):
    for round in range(1, 12):
        save_checkpoint(tmp_path, round, small(round), keep=2)
    assert kept(tmp_path) == ["round-000010", "round-000011"]


def test_there_is_nothing_to_find_in_a_folder_that_is_empty_or_not_there(tmp_path):
    assert newest_checkpoint(tmp_path, ServerState, pytest.fail) is None
    assert newest_checkpoint(tmp_path / "none", ServerState, pytest.fail) is None


def test_at_least_one_must_be_kept(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1 checkpoint, got 0"):
        save_checkpoint(tmp_path, 1, small(1), keep=0)


FILES = ("state.json", "state.safetensors")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "longer", "noise"])
def test_a_damaged_checkpoint_is_passed_over_with_a_complaint(tmp_path, file, how):
    for round in (1, 2):
        save_checkpoint(tmp_path, round, small(round))
    path = tmp_path / "round-000002" / file
    raw = path.read_bytes()
    damage = {"empty": b"", "cut": raw[:-3], "longer": raw + b" x", "noise": os.urandom(len(raw))}
    path.unlink() if how == "missing" else path.write_bytes(damage[how])
    with pytest.raises(DamagedCheckpointError, match="round-000002"):
        load_checkpoint(tmp_path / "round-000002", ServerState)
    said = []
    round, state = newest_checkpoint(tmp_path, ServerState, said.append)
    assert (round, state.round) == (1, 1)
    [line] = said
    assert "round-000002" in line and "falling back" in line


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    save_checkpoint(tmp_path, 1, small(1))
    (tmp_path / "round-000001" / "state.json").write_text("{}")
    said = []
    assert newest_checkpoint(tmp_path, ServerState, said.append) is None
    assert len(said) == 1


@pytest.mark.parametrize("file", FILES)
def test_no_flipped_bit_gets_through(tmp_path, file):
    save_checkpoint(tmp_path, 1, fedmoe_state())
    path, draw = tmp_path / "round-000001" / file, random.Random(0)
    raw, digest = path.read_bytes(), content_hash(fedmoe_state())
    seen = 0
    for place in draw.sample(range(len(raw)), min(150, len(raw))):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            round, state = load_checkpoint(path.parent, FedMoEState)
        except DamagedCheckpointError:
            seen += 1
        else:  # only where the flip means nothing, as a tab for a space
            assert (round, content_hash(state)) == (1, digest)
    assert seen > 0.95 * min(150, len(raw))


def test_a_round_that_does_not_belong_to_its_folder_is_damage(tmp_path):
    save_checkpoint(tmp_path, 1, small(1))
    path = tmp_path / "round-000001" / "state.json"
    path.write_text(path.read_text().replace('"round": 1,', '"round": 3,', 1))
    with pytest.raises(DamagedCheckpointError, match="holds round 3, as round-000003 would"):
        load_checkpoint(path.parent, ServerState)


@pytest.mark.parametrize(
    "kind", [FedMoEState, GroupStates, Progress, Everything], ids=lambda k: k.__name__
)
def test_the_state_of_another_strategy_is_refused(tmp_path, kind):
    save_checkpoint(tmp_path, 1, small(1))
    with pytest.raises(DamagedCheckpointError, match=f"is not a {kind.__name__}"):
        load_checkpoint(tmp_path / "round-000001", kind)


@dataclass(frozen=True)
class Digits:
    text: str


@dataclass(frozen=True)
class Numbers:
    text: int


def test_a_value_of_another_kind_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, Digits("seven"))
    with pytest.raises(DamagedCheckpointError, match="is not a Numbers"):
        load_checkpoint(tmp_path / "round-000001", Numbers)


def test_another_format_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, small(1))
    path = tmp_path / "round-000001" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(DamagedCheckpointError, match="format must be 1, got 2"):
        load_checkpoint(path.parent, ServerState)


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    "value", [[1], {1, 2}, b"x", 1j, Colour.RED, object(), np.float32(1), lambda: 1]
)
def test_a_state_may_not_hold_what_cannot_be_read_back(tmp_path, value):
    with pytest.raises(TypeError, match="a state may not hold a"):
        save_checkpoint(tmp_path / "c", 1, everything(whole=value))
    assert not (tmp_path / "c").exists()


class Killed(BaseException):
    pass


def kill_at(monkeypatch, owner, name, call):
    """Let the `call`-th call of a function be the process's last."""
    real, calls = getattr(owner, name), [0]

    def fake(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fake)


STEPS = [
    *((os, "fsync", n) for n in (1, 2, 3)),  # either file, and their folder
    (Path, "mkdir", 2),
    (Path, "rename", 1),
]


@pytest.mark.parametrize("owner, name, call", STEPS, ids=str)
def test_a_kill_before_the_new_one_is_in_place_leaves_the_old_one(
    tmp_path, monkeypatch, owner, name, call
):
    save_checkpoint(tmp_path, 1, small(1))
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 2, small(2))
    round, state = newest_checkpoint(tmp_path, ServerState, pytest.fail)
    assert (round, state.round) == (1, 1)
    save_checkpoint(tmp_path, 2, small(2))
    assert kept(tmp_path) == ["round-000001", "round-000002"]  # nothing is left lying about


@pytest.mark.parametrize("owner, name, call", [(os, "fsync", 4), (shutil, "rmtree", 3)], ids=str)
def test_a_kill_after_the_new_one_is_in_place_leaves_the_new_one(
    tmp_path, monkeypatch, owner, name, call
):
    save_checkpoint(tmp_path, 1, small(1), keep=1)
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 2, small(2), keep=1)
    assert newest_checkpoint(tmp_path, ServerState, pytest.fail)[0] == 2


def test_the_leavings_of_a_killed_process_are_never_taken_for_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, small(1))
    shutil.copytree(tmp_path / "round-000001", tmp_path / ".round-000002.77.part")
    (tmp_path / "round-x").mkdir()
    (tmp_path / "round-000009").write_text("a file")
    assert newest_checkpoint(tmp_path, ServerState, pytest.fail)[0] == 1
    save_checkpoint(tmp_path, 3, small(3))
    assert not (tmp_path / ".round-000002.77.part").exists()


def test_a_checkpoint_can_be_written_again(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, small(1))
    save_checkpoint(tmp_path, 2, small(2))
    save_checkpoint(tmp_path, 2, small(5))
    assert newest_checkpoint(tmp_path, ServerState, pytest.fail)[1].round == 5
    kill_at(monkeypatch, Path, "rename", 2)  # the old one is aside, the new one not there yet
    with pytest.raises(Killed):
        save_checkpoint(tmp_path, 2, small(6))
    assert newest_checkpoint(tmp_path, ServerState, pytest.fail)[1].round == 1


def test_checkpoints_beyond_the_one_that_is_written_go(tmp_path):
    # A run that fell back to round 1 must neither lose its new checkpoints to damaged later ones
    # nor ever fall for them.
    for round in (1, 2, 3, 4):
        save_checkpoint(tmp_path, round, small(round), keep=4)
    for round in (2, 3, 4):
        (tmp_path / f"round-{round:06d}" / "state.json").write_text("")
    assert newest_checkpoint(tmp_path, ServerState)[0] == 1
    save_checkpoint(tmp_path, 2, small(2))
    assert kept(tmp_path) == ["round-000001", "round-000002"]
    assert newest_checkpoint(tmp_path, ServerState, pytest.fail)[0] == 2


# Many clients

MANY = Population(np.arange(1, 5001)).with_memory(np.full(5000, 100))


def after_a_round(clients, ids):
    """FedMoE's state once these clients have scouted."""
    strategy = FedMoE(kinship=1.0)
    state = strategy.init(one_layer(1.0, 1.0, 2.0, 3.0, 4.0), clients)
    notes = [update(k, MoEState({}, {}), [k % 7, 3, 1, k % 3], num_examples=4) for k in ids]
    return strategy.aggregate(state, notes)


def test_a_population_stands_once_beside_all_checkpoints(tmp_path):
    state = after_a_round(MANY, [7, 4000, 12])
    for round in (1, 2):
        save_checkpoint(tmp_path, round, state)
    clients, *checkpoints = kept(tmp_path)
    assert clients == f"clients-{MANY.digest[:32]}.safetensors"
    assert checkpoints == ["round-000001", "round-000002"]
    assert all(f.stat().st_size < 5000 for f in (tmp_path / "round-000002").iterdir())
    _, back = load_checkpoint(tmp_path / "round-000002", FedMoEState)
    assert back.clients == state.clients and back.clients[4000] == MANY[4000]
    assert content_hash(back) == content_hash(state)
    assert content_hash(after_a_round(MANY[1:], [7, 4000, 12])) != content_hash(state)


@pytest.mark.parametrize("how", ["missing", "cut", "of others"])
def test_a_population_that_is_damaged_is_told(tmp_path, how):
    save_checkpoint(tmp_path, 1, after_a_round(MANY, [7]))
    path = tmp_path / f"clients-{MANY.digest[:32]}.safetensors"
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        save_checkpoint(tmp_path / "other", 1, after_a_round(MANY[1:], [7]))
        [other] = (tmp_path / "other").glob("clients-*")
        shutil.copy(other, path)
    with pytest.raises(DamagedCheckpointError, match="clients-"):
        load_checkpoint(tmp_path / "round-000001", FedMoEState)


def test_what_is_known_of_clients_comes_back_from_a_table(tmp_path):
    state = after_a_round(MANY, range(0, 5000, 9))
    assert isinstance(state.p, Table)
    save_checkpoint(tmp_path, 1, state)
    _, back = load_checkpoint(tmp_path / "round-000001", FedMoEState)
    assert same(dict(back.p), dict(state.p)) and same(dict(back.seen), dict(state.seen))
    assert back.sub_moes == state.sub_moes and back.kin == state.kin
    assert content_hash(back) == content_hash(state)
    # And it goes on as if it had never been written.
    note = update(3, MoEState({}, {}), [1, 1, 0, 0], num_examples=4)
    ends = [FedMoE(kinship=1.0).aggregate(s, [note]) for s in (state, back)]
    assert content_hash(ends[0]) == content_hash(ends[1])


def test_a_client_that_has_taken_part_takes_less_than_200_bytes():
    def size(count):
        strategy = FedMoE(kinship=1.0)
        state = strategy.init(one_layer(1.0, *([1.0] * 16)), MANY)
        wants = ([9] * 8 + [1] * 8, [1] * 8 + [9] * 8)  # two groups
        notes = [update(k, MoEState({}, {}), wants[k % 2], num_examples=4) for k in range(count)]
        state = strategy.aggregate(state, notes)
        metrics = {"loss": 1.0, "trained_validation": 0.5}
        notes = [update(k, MoEState({}, {}), wants[0], metrics=metrics) for k in range(count)]
        shot = snapshot(dataclasses.replace(strategy.aggregate(state, notes), changes=()))
        return len(shot.tensors) + len(shot.text)

    assert (size(300) - size(100)) / 200 < 200


def test_a_table_whose_rows_would_be_addresses_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, after_a_round(MANY, [7]))
    path = tmp_path / "round-000001" / "state.json"
    head = json.loads(path.read_text())
    head["state"]["p"]["table"]["dtype"] = "object"
    text = json.dumps(head["state"], sort_keys=True)
    raw = (path.parent / "state.safetensors").read_bytes()
    head["digest"] = hashlib.sha256(hashlib.sha256(raw).digest() + text.encode()).hexdigest()
    path.write_text(json.dumps(head, sort_keys=True))
    with pytest.raises(DamagedCheckpointError, match="must hold numbers, got object"):
        load_checkpoint(path.parent, FedMoEState)
