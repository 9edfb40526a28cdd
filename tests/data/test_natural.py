from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedmoe.data.examples import FederatedData
from fedmoe.data.hapt import Motion
from fedmoe.data.natural import CONTEXT, STEP, WINDOW, motion, shakespeare, vowels
from fedmoe.data.shakespeare import ALPHABET
from fedmoe.data.vowels import Vowels

# Two recordings for each of four people: activities of different lengths, some too short for a
# window, with unlabelled samples and changes of posture between. Channel 0 numbers the samples.
BOUTS = [(-1, 100), (5, 1500), (7, 150), (4, 700), (1, 127), (2, 128), (-1, 40), (5, 900), (1, 800)]


def small_motion(num_people: int = 4) -> Motion:
    one = [label for label, length in BOUTS for _ in range(length)]
    label = torch.tensor(one * 2 * num_people, dtype=torch.int8)
    signal = torch.zeros(len(label), 6)
    signal[:, 0] = torch.arange(len(label))
    recording = torch.arange(2 * num_people).repeat_interleave(len(one))
    return Motion(signal, label, (7 + recording // 2).to(torch.int8), recording.to(torch.int8))


def small_vowels() -> Vowels:
    """Feature 0 numbers the rows; speakers 3, 5 and 8."""
    x_ND = torch.zeros(3 * 66, 10)
    x_ND[:, 0] = torch.arange(len(x_ND))
    speaker_N = torch.tensor([3, 5, 8]).repeat_interleave(66)
    return Vowels(x_ND, torch.arange(11).repeat(18), speaker_N, speaker_N == 5)


def small_roles() -> dict[str, str]:
    draw = np.random.default_rng(0)
    return {
        role: "".join(ALPHABET[i] for i in draw.integers(len(ALPHABET), size=length))
        for role, length in (("ANNE", 900), ("BOB", 600), ("CAT", 400), ("DAN", 10))
    }


MOTION, VOWELS, ROLES = small_motion(), small_vowels(), small_roles()

EVERY_PROTOCOL = {
    "motion": lambda seed=0: motion(seed, train=20, validation=6, test=12, source=MOTION),
    "vowels": lambda seed=0: vowels(seed, source=VOWELS),
    "shakespeare": lambda seed=0: shakespeare(
        seed, num_clients=3, train=100, validation=15, test=40, source=ROLES
    ),
}
every_protocol = pytest.mark.parametrize("make", EVERY_PROTOCOL.values(), ids=EVERY_PROTOCOL.keys())
SHAPES = {
    "motion": ((6, 128), torch.float32, 6),
    "vowels": ((10,), torch.float32, 11),
    "shakespeare": ((16,), torch.uint8, 65),
}


def samples(data: FederatedData, client: int) -> list[set[int]]:
    """What each part of a client is made of: numbers of samples, of rows or of characters."""
    parts = vars(data.load(client)).values()
    if data.name == "motion":
        return [
            set((p.x[:, 0] * 0.412 + 0.814).round().long().flatten().tolist()) for p in parts
        ]
    if data.name == "vowels":
        return [set((p.x[:, 0] * 0.869 - 3.204).round().long().tolist()) for p in parts]
    said = list(ROLES.values())[client]
    first = sum(map(len, list(ROLES.values())[:client]))
    found = []
    for part in parts:
        seen = set()
        for x, y in zip(part.x, part.y, strict=True):
            words = "".join(ALPHABET[c] for c in (*x.tolist(), int(y)))
            place = said.index(words)  # 17 drawn characters stand in one place only
            seen |= set(range(first + place, first + place + CONTEXT + 1))
        found.append(seen)
    return found


@every_protocol
def test_no_sample_is_in_two_parts_or_on_two_clients(make):
    data = make()
    parts = [part for c in data.clients for part in samples(data, c.id)]
    assert all(parts)
    for a, b in itertools.combinations(parts, 2):
        assert not a & b


@every_protocol
def test_inputs_have_the_shape_and_type_that_the_protocol_says(make):
    data = make()
    shape, dtype, num_classes = SHAPES[data.name]
    assert data.num_classes == num_classes
    for part in vars(data.load(1)).values():
        assert (part.x.shape[1:], part.x.dtype, part.y.dtype) == (shape, dtype, torch.int64)
        assert part.x.is_contiguous()


@every_protocol
def test_loading_a_client_again_gives_the_same_examples_and_copies(make):
    data = make()
    first = data.load(1)
    kept = first.train.x.clone(), first.train.y.clone()
    first.train.x.zero_()
    first.train.y.zero_()
    assert torch.equal(data.load(1).train.x, kept[0])
    assert torch.equal(data.load(1).train.y, kept[1])


@every_protocol
def test_the_seed_draws_the_partition_and_the_hash_names_it(make):
    assert make(0).partition_hash == make(0).partition_hash != make(1).partition_hash


@every_protocol
def test_the_server_knows_sizes_and_no_task(make):
    data = make()
    assert [c.id for c in data.clients] == list(range(len(data.clients)))
    assert data.unseen == ()
    for c in data.clients:
        assert c.num_examples == len(data.load(c.id).train.y)
        assert c.task is None and c.memory_bytes is None


@every_protocol
def test_a_client_that_is_not_there_is_refused(make):
    with pytest.raises(ValueError, match=r"client must be between 0 and \d+, got 1000"):
        make().load(1000)


# --- motion


def test_people_are_clients_in_the_order_of_their_numbers():
    data = EVERY_PROTOCOL["motion"]()
    one = len(MOTION.label_T) // 4
    for client in range(4):
        for part in samples(data, client):
            assert {sample // one for sample in part} == {client}


def test_a_window_is_128_samples_in_a_row_of_the_one_activity_that_is_its_label():
    data = motion(0, source=MOTION)
    for part in vars(data.load(2)).values():
        for x, y in zip(part.x, part.y, strict=True):
            number = (x[0] * 0.412 + 0.814).round().long()
            assert (number.diff() == 1).all() and len(number) == WINDOW
            assert set(MOTION.label_T[number].tolist()) == {int(y) + 1}
            assert len(MOTION.recording_T[number].unique()) == 1


def test_windows_of_each_activity_are_cut_in_order_of_time_in_each_recording():
    data = motion(0, train=400, validation=120, test=240, source=MOTION)
    one = len(MOTION.label_T) // 8  # a recording
    train, validation, test = samples(data, 0)
    # Label 5 has bouts at 100 .. 1599 and 2745 .. 3644: windows from 100, 164, ... 1444 (22) and
    # from 2745, 2809, ... 3513 (13). Of 35, 18 train (0.526 of 35 is 18.4), 6 validate (0.684 of
    # 35 is 23.9) less the first, which shares samples with the last to train, and 11 test.
    for recording in range(2):
        start = recording * one
        of_five = [
            sorted(s - start for s in part if 0 <= s - start < one and MOTION.label_T[s] == 5)
            for part in (train, validation, test)
        ]
        assert (of_five[0][0], of_five[0][-1]) == (100, 100 + 17 * STEP + WINDOW - 1)
        assert of_five[1][0] == 100 + 19 * STEP
        assert of_five[2][-1] == 2745 + 12 * STEP + WINDOW - 1


def test_an_activity_too_short_for_a_window_is_left_out_and_one_just_long_enough_is_not():
    data = motion(0, train=400, validation=120, test=240, source=MOTION)
    label = torch.cat([p.y for p in vars(data.load(0)).values()])
    counts = torch.bincount(label, minlength=6).tolist()
    assert counts[1] == 2  # label 2 for 128 samples in each of two recordings: one window
    assert counts[2] == counts[5] == 0
    in_walking = 1 + (800 - WINDOW) // STEP  # 11, the bout of 127 adds none
    assert 2 * (in_walking - 2) <= counts[0] <= 2 * in_walking


def test_no_more_are_drawn_than_asked_for():
    parts = vars(motion(0, train=5, validation=0, test=2, source=MOTION).load(3)).values()
    assert [len(p.y) for p in parts] == [5, 0, 2]


def test_a_person_without_a_window_is_named():
    person_T = MOTION.person_T.clone()
    person_T[:100] = 1  # has unlabelled samples only
    with pytest.raises(ValueError, match="person 1 has nothing to train on, .*leave it out"):
        motion(0, source=MOTION._replace(person_T=person_T))


def test_each_channel_of_hapt_is_near_mean_0_and_deviation_1(real_hapt):
    data = motion(0, source=real_hapt)
    assert len(data.clients) == 30
    x_NCT = torch.cat([data.load(c).train.x for c in range(30)])
    assert x_NCT.mean((0, 2)).abs().max() < 0.1
    assert (x_NCT.std((0, 2)) - 1).abs().max() < 0.1
    for c in range(30):
        parts = vars(data.load(c)).values()
        assert all(len(p.y.unique()) == 6 for p in parts)
        least = zip((150, 30, 80), (200, 60, 120), parts, strict=True)
        assert all(low <= len(p.y) <= high for low, high, p in least)
    assert data.partition_hash == "965dedb8c6b80809"


# --- vowels


def test_every_vowel_is_thrice_in_train_once_in_validation_and_twice_in_test():
    data = EVERY_PROTOCOL["vowels"]()
    for c in range(3):
        parts = vars(data.load(c)).values()
        assert [torch.bincount(p.y).tolist() for p in parts] == [[3] * 11, [1] * 11, [2] * 11]


def test_repetitions_are_taken_in_order_of_time_forwards_or_backwards():
    seen = set()
    for seed in range(5):
        data = vowels(seed, source=VOWELS)
        for c in range(3):
            seen.add(tuple(tuple(sorted({row % 66 // 11 for row in p})) for p in samples(data, c)))
    assert seen == {((0, 1, 2), (3,), (4, 5)), ((3, 4, 5), (2,), (0, 1))}


def test_speakers_are_clients_in_order_and_groups_tell_women_from_men():
    data = EVERY_PROTOCOL["vowels"]()
    assert [{row // 66 for p in samples(data, c) for row in p} for c in range(3)] == [{0}, {1}, {2}]
    assert dict(data.groups) == {0: "men", 1: "women", 2: "men"}


def test_each_feature_of_the_vowels_has_mean_0_and_deviation_1(real_vowels):
    data = vowels(0, source=real_vowels)
    assert len(data.clients) == 15
    x_ND = torch.cat([p.x for c in range(15) for p in vars(data.load(c)).values()])
    assert x_ND.mean(0).abs().max() < 1e-3
    assert (x_ND.std(0) - 1).abs().max() < 2e-3
    assert data.partition_hash == "67ede03b5654323d"


# --- shakespeare


def text_of(code_N: torch.Tensor) -> str:
    return "".join(ALPHABET[code] for code in code_N.tolist())


def test_the_16_characters_before_the_label_are_the_input():
    source = {"A": "x" * 30 + "To be, or not to be", "B": "b" * 40}
    train = shakespeare(0, num_clients=2, source=source).load(0).train
    # 0.645 of 49 characters are 31.6, so 32 are to train on: the last is the o of To.
    assert [text_of(train.x[-1]), text_of(train.y[-1:])] == ["x" * 15 + "T", "o"]
    assert len(train.y) == 16


def test_a_role_trains_on_what_it_says_first_and_is_tested_on_what_it_says_last():
    data = shakespeare(0, num_clients=3, source=ROLES)
    for c in range(3):
        train, validation, test = samples(data, c)
        texts = list(ROLES.values())
        assert min(train) == len("".join(texts[:c]))
        assert max(test) == len("".join(texts[: c + 1])) - 1
        assert max(train) < min(validation) and max(validation) < min(test)


def test_no_more_examples_are_drawn_than_asked_for():
    data = shakespeare(0, num_clients=1, train=200, validation=30, test=80, source=ROLES)
    assert [len(p.y) for p in vars(data.load(0)).values()] == [200, 30, 80]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"num_clients": 5}, "num_clients must be between 1 and the 4 roles, got 5"),
        ({"num_clients": 4}, "role 'DAN' has nothing to train on"),
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"validation": -1}, "validation must be at least 0, got -1"),
    ],
)
def test_roles_that_cannot_be_had_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        shakespeare(0, **{"num_clients": 3, "source": ROLES, **change})


def test_the_24_roles_that_say_most_have_enough_of_everything(real_roles):
    data = shakespeare(0, source=real_roles)
    assert len(data.clients) == 24
    for c in (0, 23):
        assert [len(p.y) for p in vars(data.load(c)).values()] == [2_000, 300, 800]
    assert data.partition_hash == "2ca729c40a4e1234"
