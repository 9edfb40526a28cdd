import json
import random
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedmoe.federated.fedmoe import FedMoE
from fedmoe.nn.vision import small_vit
from fedmoe.state import rows_of, split_state
from fedmoe.types import (
    ActivationProfile,
    Assignment,
    ClientInfo,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
)
from fedmoe.wire.messages import (
    decode_assignment,
    decode_update,
    encode_assignment,
    encode_update,
    message_bytes,
    model_bytes,
    model_tensors,
)
from tests.tiny import one_layer, profile, ragged, tiny
from tests.wire.drawn import assignments, names, same_assignment, same_update, tensors, updates


@given(assignments)
def test_an_assignment_comes_back_as_it_was_and_its_size_is_told_exactly(a):
    raw = encode_assignment(a)
    back = decode_assignment(raw)
    assert same_assignment(a, back)
    assert type(back.validate) is type(back.evaluate) is bool
    assert message_bytes(a) == len(raw)
    assert encode_assignment(back) == raw


@given(updates)
def test_an_update_comes_back_as_it_was_and_its_size_is_told_exactly(u):
    raw = encode_update(u)
    back = decode_update(raw)
    assert same_update(u, back)
    assert message_bytes(u) == len(raw)
    assert encode_update(back) == raw


def real_messages():
    model = split_state(ragged())
    sub_moe = frozenset({ExpertId(0, 0), ExpertId(0, 2), ExpertId(1, 1)})
    absent = frozenset(model.experts) - sub_moe
    part, empty = model.only(sub_moe), MoEState({}, {})
    [scout] = FedMoE().assign(
        FedMoE().init(split_state(small_vit()), [ClientInfo(0)]), [ClientInfo(0)]
    ).values()
    used = profile([3, 0, 4], [0, 5, 0])
    return {
        "train": Assignment(0, part, sub_moe),
        "train, validate": Assignment(9, part, sub_moe, validate=True),
        "train, evaluate": Assignment(9, part, sub_moe, evaluate=True),
        "train with all rows": Assignment(9, part, sub_moe, absent_rows=rows_of(model, absent)),
        "scout": scout,
        "evaluate": Assignment(20, part, sub_moe, Job.EVALUATE, evaluate=True),
        "all is the client's own": Assignment(1, empty, sub_moe),
        "trained": ClientUpdate(3, 200, part, used, {"loss": 0.25, "trained_validation": 0.5}),
        "scouted": ClientUpdate(3, 200, empty, used, {}),
        "evaluated": ClientUpdate(
            3, 200, empty, ActivationProfile.empty(2, 3), {"received_test": 1.0}
        ),
        "without experts": ClientUpdate(
            3, 200, MoEState(model.shared, {}), ActivationProfile.empty(0, 0), {}
        ),
    }


MESSAGES = real_messages()


@pytest.fixture(params=MESSAGES, ids=str)
def message(request):
    return MESSAGES[request.param]


def coded(message):
    if isinstance(message, Assignment):
        return encode_assignment(message), decode_assignment, same_assignment
    return encode_update(message), decode_update, same_update


def test_every_kind_of_message_comes_back_as_it_was(message):
    raw, decode, same = coded(message)
    assert same(message, decode(raw))
    assert message_bytes(message) == len(raw)


def test_what_goes_over_the_wire_is_the_part_its_rows_and_little_else():
    # Everything but the numbers themselves: names, shapes, and a head of four numbers.
    model = split_state(small_vit())
    sub_moe = frozenset(e for e in model.experts if e.expert < 3)
    a = Assignment(0, model.only(sub_moe), sub_moe)
    content = sum(t.numel() * 4 for t in model_tensors(a.model).values())
    per_name = (message_bytes(a) - content) / len(model_tensors(a.model))
    assert 0 < per_name < 110
    u = ClientUpdate(0, 1, a.model, ActivationProfile.empty(2, 8), {})
    # The profile: 3 tables of 2 x 8 numbers of 8 bytes and one of 2.
    assert abs(message_bytes(u) - message_bytes(a)) < 3 * 16 * 8 + 2 * 8 + 400


def test_a_view_and_a_channels_last_tensor_are_sent_by_value():
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    views = {"t": x[0, 0].t(), "last": x.contiguous(memory_format=torch.channels_last)}
    a = Assignment(0, MoEState(views, {}), frozenset())
    back = decode_assignment(encode_assignment(a))
    assert all(torch.equal(back.model.shared[n], t) for n, t in views.items())
    assert message_bytes(a) == len(encode_assignment(a))


@given(st.dictionaries(names, tensors, max_size=5))
def test_the_size_of_tensors_is_that_of_their_blob(state):
    assert model_bytes(state) == len(save({n: t.contiguous() for n, t in state.items()}))


def test_a_models_tensors_have_one_name_each():
    model = split_state(ragged())
    named = model_tensors(model)
    assert len(named) == len(model.shared) + sum(len(s) for s in model.experts.values())
    assert named["expert/1.0/gate:proj.weight"] is model.experts[ExpertId(1, 0)]["gate:proj.weight"]
    assert named["shared/norm.weight"] is model.shared["norm.weight"]


# What is malformed


def refused_or_sound(decode, raw):
    """Decoding either succeeds or raises ValueError; True if it raised."""
    try:
        decode(raw)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("kind", ["train with all rows", "scout", "trained", "scouted"])
def test_cut_and_flipped_bytes_raise_value_error_or_decode(kind):
    raw, decode, _ = coded(MESSAGES[kind])
    draw = random.Random(0)
    for length in draw.sample(range(len(raw)), 100):
        assert refused_or_sound(decode, raw[:length])  # nothing that is cut off is taken
    assert refused_or_sound(decode, raw + b"\0")
    head = 8 + struct.unpack("<Q", raw[:8])[0]
    refused = 0
    for _ in range(300):
        flipped = bytearray(raw)
        for _ in range(draw.randint(1, 3)):
            flipped[draw.randrange(head)] ^= 1 << draw.randrange(8)
        refused += refused_or_sound(decode, bytes(flipped))
    assert refused > 200  # a flip within a parameter's name is another name


@given(st.binary(max_size=300))
def test_noise_is_refused(raw):
    assert refused_or_sound(decode_assignment, raw) and refused_or_sound(decode_update, raw)


some_names = st.sampled_from(["head", "sub_moe", "count_LE", "expert/0.0/v", "x"])


@given(st.dictionaries(some_names, tensors))
def test_tensors_without_sense_are_refused(tensors):
    raw = save({n: t.contiguous() for n, t in tensors.items()})
    assert refused_or_sound(decode_assignment, raw) and refused_or_sound(decode_update, raw)


def blob(message, **changes):
    """The message's tensors with these put in place or, where None, left out."""
    raw, _, _ = coded(message)
    size = struct.unpack("<Q", raw[:8])[0]
    assert json.loads(raw[8 : 8 + size])  # a message is one safetensors blob
    tensors = load(raw) | changes
    return save({n: t for n, t in tensors.items() if t is not None})


def test_an_update_is_no_assignment_and_the_other_way_round():
    with pytest.raises(ValueError, match="head must be 5 int64 numbers"):
        decode_assignment(encode_update(MESSAGES["trained"]))
    with pytest.raises(ValueError, match="head must be 2 int64 numbers"):
        decode_update(encode_assignment(MESSAGES["train"]))


SMALL = Assignment(0, one_layer(1.0, 2.0), frozenset({ExpertId(0, 0)}))
HEAD = torch.tensor([0, 0, 0, 0, -1])


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"head": None}, "head must be 5 int64 numbers"),
        ({"head": HEAD.int()}, "head must be 5 int64 numbers"),
        ({"head": torch.tensor([-1, 0, 0, 0, -1])}, "must be numbered from 0"),
        ({"head": torch.tensor([0, 4, 0, 0, -1])}, "job must be between 0 and 3, got 4"),
        ({"head": torch.tensor([0, -1, 0, 0, -1])}, "job must be between 0 and 3, got -1"),
        ({"head": torch.tensor([0, 0, 0, 0, 0])}, "choose must be at least 1 expert"),
        ({"head": torch.tensor([0, 0, 0, 0, -2])}, "choose must be at least 1 expert"),
        ({"sub_moe": None}, "sub_moe must be an int32 table with 2 columns"),
        ({"sub_moe": torch.zeros(2, 3).int()}, "sub_moe must be an int32 table"),
        ({"sub_moe": torch.zeros(2, 2, dtype=torch.complex64)}, "sub_moe must be an int32 table"),
        ({"sub_moe": torch.tensor([[0, -1]]).int()}, "must be numbered from 0"),
        ({"expert/0/v": torch.ones(1)}, "must read expert/LAYER.EXPERT/NAME"),
        ({"expert/0.-1/v": torch.ones(1)}, "must read expert/LAYER.EXPERT/NAME"),
        ({"rows/0.1/": torch.ones(1)}, "must read rows/LAYER.EXPERT/NAME"),
        ({"metric/loss": torch.ones(1)}, "a message must not hold 'metric/loss'"),
        ({"stray": torch.ones(1)}, "a message must not hold 'stray'"),
    ],
    ids=str,
)
def test_an_assignment_that_makes_no_sense_is_refused(changes, text):
    assert same_assignment(decode_assignment(blob(SMALL)), SMALL)
    with pytest.raises(ValueError, match=text):
        decode_assignment(blob(SMALL, **changes))


UPDATE = ClientUpdate(1, 2, one_layer(1.0, 2.0), profile([1]), {"loss": 0.5})


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"head": torch.tensor([1.0, 2.0])}, "head must be 2 int64 numbers"),
        ({"score_LE": None}, "an update must have a profile; score_LE is missing"),
        ({"metric/loss": torch.zeros(2).double()}, "metric/loss must be one float64 number"),
        ({"metric/loss": torch.zeros((), dtype=torch.complex64)}, "must be one float64 number"),
        ({"rows/0.1/v": torch.ones(1)}, "a message must not hold 'rows/0.1/v'"),
        ({"sub_moe": torch.zeros(1, 2).int()}, "a message must not hold 'sub_moe'"),
    ],
    ids=str,
)
def test_an_update_that_makes_no_sense_is_refused(changes, text):
    assert same_update(decode_update(blob(UPDATE)), UPDATE)
    with pytest.raises(ValueError, match=text):
        decode_update(blob(UPDATE, **changes))


def test_no_message_holds_a_pickle():
    raw = encode_assignment(Assignment(0, split_state(tiny()), frozenset()))
    assert b"\x80\x04" not in raw[:8] and raw[8:9] == b"{"  # a length, then JSON, then numbers
