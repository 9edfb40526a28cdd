"""More than ten thousand parcels that no honest side would send.

Each is refused with an error of its own kind, or is harmless: then it decodes to something that
`check_update` passes or refuses in its turn. Model and cache stay as they are.
"""

import contextlib
import random
from collections import Counter
from functools import cache

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.federated.check import RefusedUpdateError, check_update
from fedmoe.state import state_hash
from fedmoe.types import Assignment, ClientUpdate, ExpertId, MoEState
from fedmoe.wire import manifest_pb2 as pb
from fedmoe.wire.cache import ExpertCache
from fedmoe.wire.codecs import BF16, Int8, Raw, TopK
from fedmoe.wire.groups import content_hash
from fedmoe.wire.packing import (
    Codecs,
    pack_assignment,
    pack_update,
    unpack_assignment,
    unpack_update,
)
from fedmoe.wire.parcel import (
    Hello,
    Parcel,
    ParcelError,
    base_of,
    kind_of,
    pack_failure,
    pack_hello,
    pack_miss,
    unpack_failure,
    unpack_hello,
    unpack_miss,
)
from tests.tiny import profile

EACH = 330  # mutated parcels of every kind in every way
RUN, CLIENT, ROUND = "spring", 3, 7
MEMORY = 2**20  # bytes that a client has for what it unpacks

E0, E1 = ExpertId(0, 0), ExpertId(0, 1)
HELD = frozenset({E0, E1})


def state(seed):
    draw = torch.Generator().manual_seed(seed)
    return {"up": torch.randn(10, 30, generator=draw), "gate:w": torch.randn(3, generator=draw)}


MODEL = MoEState(
    {**state(0), "steps": torch.tensor(4), "var": torch.rand(5) + 0.1},
    {E0: state(1), E1: state(2), ExpertId(0, 2): state(3)},
)
SENT = Assignment(
    ROUND,
    MODEL.only(HELD),
    HELD,
    absent_rows={ExpertId(0, 2): {"gate:w": torch.ones(3)}},
    extra={"control": torch.ones(4)},
)
BEFORE = state_hash(MODEL), state_hash(SENT.model)


def moved(old, seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        n: t + 0.01 * torch.randn(t.shape, generator=draw) if t.is_floating_point() else t + 1
        for n, t in old.items()
    }


def update_of(codec):
    sent = pack_assignment(SENT, run=RUN, client=CLIENT, reply=Codecs.of(codec))
    received = unpack_assignment(sent, run=RUN, client=CLIENT)
    model = MoEState(
        moved(MODEL.shared, 5), {e: moved(MODEL.experts[e], 6 + e.expert) for e in HELD}
    )
    update = ClientUpdate(
        CLIENT, 20, model, profile([4, 9, 0]), {"loss": 0.5}, {"control": torch.zeros(4)}
    )
    parcel, _ = pack_update(update, received, generator=torch.Generator().manual_seed(1))
    return parcel, base_of(sent)


@cache
def honest():
    updates = {f"update, {c}": update_of(c)[0] for c in (Raw(), BF16(), Int8(), TopK(0.3))}
    some = (b"\1" * 32, b"\2" * 32)
    return {
        "assignment": pack_assignment(SENT, run=RUN, client=CLIENT),
        "assignment, int8": pack_assignment(
            SENT, run=RUN, client=CLIENT, codecs=Codecs.of(Int8())
        ),
        **updates,
        "hello": pack_hello(Hello(CLIENT, 9, frozenset(some), "key", 2**30, "task", RUN)),
        "miss": pack_miss(run=RUN, client=CLIENT, round=ROUND, hashes=some, held=some),
        "failure": pack_failure(run=RUN, client=CLIENT, round=ROUND, reason="fire"),
    }


def read(kind, parcel, held=None):
    """What a reader of this kind of parcel gets; only ParcelError may come of it."""
    if kind.startswith("assignment"):
        return unpack_assignment(
            parcel, run=RUN, client=CLIENT, cache=held, limit_bytes=MEMORY
        )
    if kind.startswith("update"):
        reply = unpack_update(parcel, SENT, run=RUN, client=CLIENT)
        check_update(reply.update, SENT, MODEL)
        return reply
    if kind == "hello":
        return unpack_hello(parcel, run=RUN)
    unpack = unpack_miss if kind == "miss" else unpack_failure
    return unpack(parcel, run=RUN, client=CLIENT, round=ROUND)


def outcome(kind, parcel):
    """How a mutated parcel ends: "taken", or the name of the error that refused it."""
    try:
        kind_of(parcel)
        read(kind, parcel)
    except (ParcelError, RefusedUpdateError) as why:
        refusal = why
    else:
        return "taken"
    assert 0 < len(str(refusal)) < 3000  # it says why, and no more than a log can take
    return type(refusal).__name__


# Ways to mutate


def flipped(raw, draw):
    out = bytearray(raw)
    for _ in range(draw.randint(1, 4) if out else 0):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def garbled(raw, draw):
    """Cut off, drawn out, doubled, or with a part of it moved or replaced by noise."""
    a, b = sorted(draw.randrange(len(raw) + 1) for _ in range(2))
    noise = draw.randbytes(draw.choice([1, 4, 40]))
    return draw.choice(
        [raw[:a], raw[b:], raw[:a] + raw[b:], raw + noise, raw + raw, raw[:a] + noise + raw[a:],
         raw[b:] + raw[:b], raw[:a] + noise + raw[b:], raw[:a] + raw[a:b] * 3 + raw[b:]]
    )  # fmt: skip


INTEGERS = (0, 1, 2, 3, 5, 7, 8, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63,
            2**64 - 1)  # fmt: skip
FLOATS = (0.0, -1.0, 2.0, 1e300, float("nan"), float("inf"), -float("inf"), 5e-324)
TEXTS = ("", "shared", "expert.0.0", "expert.0.1", "expert.9.9", "rows.0.0", "once", "extra",
         "expert.-1.0", "expert.0.00", "up", "gate:w", "steps", "é\0", "x" * 600,
         "autumn")  # fmt: skip
MANY = 3000


def some_value(field, draw):
    match field.cpp_type:
        case field.CPPTYPE_STRING:
            if field.type == field.TYPE_BYTES:
                return draw.choice([b"", b"short", draw.randbytes(32), draw.randbytes(33)])
            return draw.choice(TEXTS)
        case field.CPPTYPE_DOUBLE:
            return draw.choice(FLOATS)
        case field.CPPTYPE_BOOL:
            return draw.random() < 0.5
        case field.CPPTYPE_ENUM:
            return draw.randrange(-1, 12)
        case field.CPPTYPE_INT32:
            return draw.choice([-1, *(i for i in INTEGERS if i < 2**31)])
        case field.CPPTYPE_INT64:
            return draw.choice([-1, -(2**63), *(i for i in INTEGERS if i < 2**63)])
        case field.CPPTYPE_UINT32:
            return draw.choice([i for i in INTEGERS if i < 2**32])
    return draw.choice(INTEGERS)


def mutate(message, draw):
    """Change one field of `message` or somewhere below it, or a whole repeated one."""
    set_fields = [field for field, _ in message.ListFields()]
    field = draw.choice(set_fields if set_fields and draw.random() < 0.9
                        else list(message.DESCRIPTOR.fields))  # fmt: skip
    value = getattr(message, field.name)
    if field.is_repeated:
        _mutate_list(value, field, draw)
    elif field.message_type is not None:
        if draw.random() < 0.1:
            message.ClearField(field.name)
        elif field.message_type.fields:
            mutate(value, draw)
    else:
        setattr(message, field.name, some_value(field, draw))


def somewhere(manifest, draw):
    """Mostly below the top: else most parcels would be of another version, run or client."""
    places = [*manifest.groups, *(t for group in manifest.groups for t in group.tensors)]
    if kind := manifest.WhichOneof("content"):
        places += [getattr(manifest, kind)] * (len(places) + 1)
    return draw.choice(places) if places and draw.random() < 0.9 else manifest


def _mutate_list(values, field, draw):
    way = draw.randrange(6)
    if not len(values):
        way = 0
    if way == 0:
        if field.message_type is not None:
            values.add()
        else:
            values.append(some_value(field, draw))
    elif way == 1:
        del values[draw.randrange(len(values))]
    elif way == 2:
        values.append(draw.choice(list(values)))
    elif way == 3 and draw.random() < 0.1:
        values.extend([values[0]] * MANY)
    elif field.message_type is not None:
        mutate(values[draw.randrange(len(values))], draw)
    else:
        values[draw.randrange(len(values))] = some_value(field, draw)


def made_right(manifest, groups):
    """Hashes that fit the bytes, so that what stands behind the hash is reached too."""
    for group in manifest.groups:
        raws = groups.get(group.name, {})
        if not group.held and {t.name for t in group.tensors} == set(raws):
            group.sha256 = content_hash(group, raws)


def in_manifest_bytes(parcel, draw):
    way = draw.choice([flipped, garbled])
    return Parcel(way(parcel.manifest, draw), parcel.groups)


def in_fields(parcel, draw):
    manifest = pb.Manifest.FromString(parcel.manifest)
    for _ in range(draw.randint(1, 3)):
        mutate(somewhere(manifest, draw), draw)
    if draw.random() < 0.7:
        made_right(manifest, parcel.groups)
    return Parcel(manifest.SerializeToString(), parcel.groups)


def in_tensor_bytes(parcel, draw):
    """Other bytes in one tensor, with what the manifest says of them mostly put right."""
    groups = {name: dict(raws) for name, raws in parcel.groups.items()}
    manifest = pb.Manifest.FromString(parcel.manifest)
    there = [group for group in manifest.groups if groups.get(group.name)]
    if not there:
        return in_fields(parcel, draw)
    group = draw.choice(there)
    tensor = draw.choice(group.tensors)
    raw = groups[group.name][tensor.name]
    new = draw.choice([flipped, garbled, evil])(raw, draw)
    groups[group.name][tensor.name] = new
    if draw.random() < 0.8:
        tensor.nbytes = len(new)
    if draw.random() < 0.3:
        tensor.encoding = draw.randrange(8)
    if draw.random() < 0.2:
        tensor.shape[:] = draw.choice([[len(new) // 4], [0], [2**20, 2**10], [10, 30], [300]])
    if draw.random() < 0.9:
        made_right(manifest, groups)
    return Parcel(manifest.SerializeToString(), groups)


@cache
def bombs():
    """A few kilobytes each that zstd makes a gigabyte of, and frames that lie about their size."""
    part = zstandard.ZstdCompressor(level=1).compress(bytes(2**20))
    lying = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(300)))
    writer = zstandard.ZstdCompressor(level=1).compressobj(size=2**30)
    whole = b"".join(writer.compress(bytes(2**24)) for _ in range(64)) + writer.flush()
    unknown = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(2**20))
    return [part, part * 5, bytes(lying) + part, whole, unknown]


def evil(raw, draw):
    if draw.random() < 0.5:
        return raw[: draw.choice([0, 2])] + draw.choice(bombs())
    pattern = draw.choice([b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\xff", b"\0"])
    return (pattern * (len(raw) // len(pattern) + 1))[: len(raw)]


def in_groups(parcel, draw):
    """Groups and tensors that are missing, exchanged, doubled or not what they are called."""
    groups = {name: dict(raws) for name, raws in parcel.groups.items()}
    manifest = pb.Manifest.FromString(parcel.manifest)
    if not groups:
        return in_fields(parcel, draw)
    a, b = draw.choice(list(groups)), draw.choice(list(groups))
    match draw.randrange(8):
        case 0:
            del groups[a]
        case 1:
            groups[draw.choice(TEXTS)] = groups[a]
        case 2:
            groups[a], groups[b] = groups[b], groups[a]
        case 3:
            group = draw.choice(manifest.groups)
            manifest.groups.add().CopyFrom(group)
        case 4:
            groups[a] = {**groups[a], draw.choice(TEXTS): b"stray"}
        case 5:
            groups[a] = {n: raw for n, raw in groups[a].items() if draw.random() < 0.5}
        case 6:
            group = draw.choice(manifest.groups)
            group.held = True
            if draw.random() < 0.8:
                groups.pop(group.name, None)
                group.ClearField("tensors")
        case 7:
            group = draw.choice(manifest.groups)
            new = draw.choice(TEXTS)
            groups[new] = groups.pop(group.name)
            group.name = new
    if draw.random() < 0.8:
        made_right(manifest, groups)
    return Parcel(manifest.SerializeToString(), groups)


WAYS = {
    "bytes of the manifest": in_manifest_bytes,
    "fields": in_fields,
    "bytes of tensors": in_tensor_bytes,
    "groups": in_groups,
}
KINDS = tuple(honest())


def test_there_are_ten_thousand_of_them():
    assert len(WAYS) * len(KINDS) * EACH >= 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_the_parcel_that_is_mutated_is_taken_as_it_is(kind):
    assert outcome(kind, honest()[kind]) == "taken"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_parcel_is_refused_by_name_or_harmless_and_the_model_stays(kind, way):
    draw = random.Random(f"{kind}/{way}")
    seen = Counter(outcome(kind, WAYS[way](honest()[kind], draw)) for _ in range(EACH))
    # What is taken changed nothing that matters: a name's letter, a flag, a number still in range.
    assert seen["taken"] < EACH * (0.4 if honest()[kind].groups else 0.75)
    assert (state_hash(MODEL), state_hash(SENT.model)) == BEFORE


@pytest.mark.parametrize("way", WAYS)
def test_a_mutated_assignment_leaves_what_the_cache_has_as_it_is(way, tmp_path):
    held = ExpertCache(tmp_path)
    parcel = pack_assignment(SENT, run=RUN, client=CLIENT)
    unpack_assignment(parcel, run=RUN, client=CLIENT, cache=held)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before
    short = pack_assignment(SENT, run=RUN, client=CLIENT, known=held.held())
    draw = random.Random(way)
    for turn in range(60):
        wrong = WAYS[way](parcel if turn % 2 else short, draw)
        with contextlib.suppress(ParcelError):
            read("assignment", wrong, held)
        after = {name: (tmp_path / name).read_bytes() for name in before}
        assert after == before


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from(KINDS), st.booleans())
def test_noise_is_refused(raw, kind, with_groups):
    parcel = Parcel(raw, honest()[kind].groups if with_groups else {})
    assert outcome(kind, parcel) != "taken"


@settings(max_examples=200)
@given(st.data(), st.sampled_from(KINDS))
def test_any_field_may_hold_anything(data, kind):
    """As hypothesis draws it, so that what fails is made small."""
    manifest = pb.Manifest.FromString(honest()[kind].manifest)
    for _ in range(data.draw(st.integers(1, 4))):
        mutate(manifest, data.draw(st.randoms(use_true_random=False)))
    outcome(kind, Parcel(manifest.SerializeToString(), honest()[kind].groups))


@pytest.mark.parametrize("way", ["groups", "tensors", "names", "experts", "metrics", "dims"])
def test_counts_beyond_all_bounds_are_refused_soon(way):
    """Whatever fits into a manifest: millions of things of no size."""
    kind = "update, Raw()" if way == "metrics" else "assignment"
    manifest = pb.Manifest.FromString(honest()[kind].manifest)
    match way:
        case "groups":
            manifest.groups.extend([pb.Group()] * 500_000)
        case "tensors":
            manifest.groups[0].tensors.extend([pb.Tensor()] * 500_000)
        case "names":
            manifest.groups[0].tensors.extend(pb.Tensor(name=str(i)) for i in range(100_000))
        case "experts":
            manifest.assignment.sub_moe.extend([pb.ExpertId()] * 500_000)
        case "metrics":
            manifest.update.metrics.extend([pb.Metric()] * 500_000)
        case "dims":
            manifest.groups[0].tensors[0].shape.extend([1] * 500_000)
    assert outcome(kind, Parcel(manifest.SerializeToString(), honest()[kind].groups)) != "taken"


def test_a_manifest_cannot_be_so_deep_that_it_breaks_the_parser():
    begins_a_group = b"\xfb\x01"  # of a field that is not known, within itself
    with pytest.raises(ParcelError, match="not a manifest"):
        kind_of(Parcel(begins_a_group * 100_000))
