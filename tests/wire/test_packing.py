"""Assignments and updates as parcels: they come back, and what is wrong is refused by name."""

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.federated.check import check_update
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.nn.vision import small_vit
from fedmoe.state import rows_of, split_state, state_hash
from fedmoe.types import (
    ActivationProfile,
    Assignment,
    ClientInfo,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
)
from fedmoe.wire import manifest_pb2 as pb
from fedmoe.wire.cache import ExpertCache
from fedmoe.wire.codecs import BF16, Int8, Raw, TopK
from fedmoe.wire.groups import content_hash, seal
from fedmoe.wire.packing import (
    RAW,
    Codecs,
    pack_assignment,
    pack_update,
    unpack_assignment,
    unpack_update,
)
from fedmoe.wire.parcel import (
    ForeignError,
    MissingError,
    ParcelError,
    StaleError,
    base_of,
    closed,
    parcel_bytes,
)
from tests.tiny import one_layer, profile, ragged, tiny
from tests.wire.drawn import assignments, profiles, same_assignment, same_profile, same_update

CODINGS = (BF16(), Int8(), Int8(block=64, levels=15), Int8(zstd=False))
E0, E1 = ExpertId(0, 0), ExpertId(0, 1)


def there(assignment, client=3, cache=None, run="spring", **down):
    parcel = pack_assignment(assignment, run=run, client=client, **down)
    return unpack_assignment(parcel, run=run, client=client, cache=cache)


def changed(state, by=0.01, seed=0):
    """The same names, moved a little; whole numbers go up by one."""
    draw = torch.Generator().manual_seed(seed)
    return {
        n: t + (by * torch.randn(t.shape, generator=draw)).to(t.dtype)
        if t.is_floating_point()
        else (t + 1).to(t.dtype)
        for n, t in state.items()
    }


def trained(assignment, client=3, by=0.01):
    sent = assignment.model
    model = MoEState(
        changed(sent.shared, by), {e: changed(s, by, e.expert) for e, s in sent.experts.items()}
    )
    extra = changed(assignment.extra)
    return ClientUpdate(client, 20, model, profile([1, 2]), {"loss": 0.5}, extra)


def large(num_experts=3):
    """A model whose tensors are worth coding, with all kinds that travel raw."""
    draw = torch.Generator().manual_seed(0)
    shared = {
        "body": torch.randn(30, 50, generator=draw),
        "norm.running_var": torch.rand(80, generator=draw),
        "norm.steps": torch.tensor(7),
        "half": torch.randn(9, 9, generator=draw).half(),
        "double": torch.randn(9, 9, generator=draw).double(),
    }
    experts = {
        ExpertId(0, e): {
            "up": torch.randn(40, 30, generator=draw),
            "gate:proj.weight": torch.randn(100, generator=draw),
        }
        for e in range(num_experts)
    }
    return MoEState(shared, experts)


LARGE = large()
WORK = Assignment(4, LARGE, frozenset(LARGE.experts), extra={"control": torch.ones(3)})


# There and back


@given(assignments)
def test_an_assignment_comes_back_as_it_was(a):
    parcel = pack_assignment(a, run="spring", client=5)
    back = unpack_assignment(parcel, run="spring", client=5)
    assert same_assignment(a, back.assignment)
    assert (back.run, back.client, back.base, back.codecs) == ("spring", 5, base_of(parcel), RAW)
    assert back.exact == frozenset(a.model.experts)
    again = pack_assignment(back.assignment, run="spring", client=5)
    assert again.manifest == parcel.manifest and again.groups == parcel.groups


@given(assignments, profiles(), st.dictionaries(st.text(max_size=9), st.floats(-9, 9), max_size=3))
def test_an_update_comes_back_as_it_was(a, used, metrics):
    received = there(a)
    u = replace(trained(a), profile=used, metrics=metrics)
    parcel, left = pack_update(u, received)
    reply = unpack_update(parcel, a, run="spring", client=3, base=received.base)
    assert same_update(u, reply.update)
    assert left is None and reply.held == frozenset()


def real_assignments():
    model = split_state(ragged())
    sub_moe = frozenset({ExpertId(0, 0), ExpertId(0, 2), ExpertId(1, 1)})
    absent = frozenset(model.experts) - sub_moe
    part, empty = model.only(sub_moe), MoEState({}, {})
    [scout] = FedMoE().assign(
        FedMoE().init(split_state(small_vit()), [ClientInfo(0)]), [ClientInfo(0)]
    ).values()
    return {
        "train": Assignment(0, part, sub_moe),
        "train, validate": Assignment(9, part, sub_moe, validate=True),
        "train with all rows": Assignment(9, part, sub_moe, absent_rows=rows_of(model, absent)),
        "train with extra": Assignment(9, part, sub_moe, extra={"c": torch.ones(2, 2)}),
        "frozen parameters once": Assignment(9, part, sub_moe, once={"enc": torch.ones(2, 2)}),
        "scout": scout,
        "scout that chooses": replace(scout, choose=2),
        "evaluate": Assignment(20, part, sub_moe, Job.EVALUATE, evaluate=True),
        "serve": Assignment(20, part, sub_moe, Job.SERVE),
        "all is the client's own": Assignment(1, empty, sub_moe),
        "the head is the client's own": Assignment(1, MoEState(part.shared, {}), sub_moe),
    }


REAL = real_assignments()


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("codec", (Raw(), *CODINGS), ids=str)
def test_every_job_can_be_asked_for_and_answered(name, codec):
    a = REAL[name]
    received = there(a, codecs=Codecs.of(codec), reply=Codecs.of(codec))
    if codec == Raw():
        assert same_assignment(a, received.assignment)
    assert received.assignment.job is a.job and received.assignment.sub_moe == a.sub_moe
    assert received.codecs == Codecs.of(codec)
    u = trained(received.assignment)
    if a.job is not Job.TRAIN:
        u = replace(u, model=MoEState({}, {}), extra={})
    generator = torch.Generator().manual_seed(0)
    parcel, _ = pack_update(u, received, generator=generator)
    back = unpack_update(parcel, a, run="spring", client=3, base=received.base).update
    assert same_profile(back.profile, u.profile) and back.metrics == u.metrics
    assert back.model.experts.keys() == u.model.experts.keys()
    assert back.extra.keys() == u.extra.keys()
    if codec == Raw():
        assert same_update(back, u)


def test_an_honest_update_passes_the_check_behind():
    model = split_state(tiny())
    sub_moe = frozenset({E0, E1})
    a = Assignment(2, model.only(sub_moe), sub_moe)
    used = profile([5, 6, 0, 0])
    for codec in (Raw(), *CODINGS, TopK(0.5)):
        received = there(a, codecs=RAW, reply=Codecs.of(codec))
        parcel, _ = pack_update(replace(trained(a), profile=used), received)
        update = unpack_update(parcel, a, run="spring", client=3).update
        check_update(update, a, model)


def test_an_expert_that_no_token_reached_may_stay_away():
    received = there(WORK)
    model = MoEState(WORK.model.shared, {E1: WORK.model.experts[E1]})
    parcel, _ = pack_update(replace(trained(WORK), model=model), received)
    assert list(unpack_update(parcel, WORK, run="spring", client=3).update.model.experts) == [E1]


# What need not travel


def test_equal_experts_of_two_clients_are_the_same_bytes_with_the_same_hash():
    memo = {}
    first = Assignment(1, LARGE.only(frozenset({E0, E1})), frozenset({E0, E1}))
    other = Assignment(1, LARGE.only(frozenset({E1})), frozenset({E1}))
    for codec in (Raw(), Int8()):
        one, two = (
            pack_assignment(a, run="r", client=c, codecs=Codecs.of(codec), memo=memo)
            for c, a in enumerate((first, other))
        )
        for name in two.groups:
            assert all(one.groups[name][n] is two.groups[name][n] for n in two.groups[name])
        hashes = [{g.name: g.sha256 for g in parsed(p).groups} for p in (one, two)]
        assert hashes[1].items() <= hashes[0].items()
        # And without a memo they are equal, if not the same.
        alone = pack_assignment(other, run="r", client=1, codecs=Codecs.of(codec))
        assert alone.groups == two.groups and alone.manifest == two.manifest


def parsed(parcel):
    return pb.Manifest.FromString(parcel.manifest)


def test_what_a_client_holds_is_named_and_not_sent(tmp_path):
    cache = ExpertCache(tmp_path)
    full = pack_assignment(WORK, run="r", client=1)
    first = unpack_assignment(full, run="r", client=1, cache=cache)
    parcel = pack_assignment(WORK, run="r", client=1, known=cache.held())
    assert parcel.groups.keys() == {"extra"} and parcel_bytes(parcel) < 600
    again = unpack_assignment(parcel, run="r", client=1, cache=cache)
    assert same_assignment(again.assignment, WORK) and again.base == first.base
    # Another run of the same client, another round, other experts: what is equal is not sent.
    later = Assignment(9, LARGE.only(frozenset({E1})), frozenset({E1}))
    parcel = pack_assignment(later, run="autumn", client=1, known=cache.held())
    assert not parcel.groups
    assert same_assignment(
        unpack_assignment(parcel, run="autumn", client=1, cache=cache).assignment, later
    )


def test_a_client_that_has_lost_its_cache_says_what_it_lacks(tmp_path):
    cache = ExpertCache(tmp_path)
    there(WORK, cache=cache)
    parcel = pack_assignment(WORK, run="r", client=1, known=cache.held())
    for lost in (None, ExpertCache(tmp_path / "new")):
        with pytest.raises(MissingError, match="not in the cache") as caught:
            unpack_assignment(parcel, run="r", client=1, cache=lost)
        assert set(caught.value.hashes) == {g.sha256 for g in parsed(parcel).groups if g.held}


def test_what_is_held_exactly_is_named_even_where_the_way_down_is_coded(tmp_path):
    cache = ExpertCache(tmp_path)
    there(WORK, cache=cache)
    parcel = pack_assignment(WORK, run="r", client=1, known=cache.held(), codecs=Codecs.of(Int8()))
    received = unpack_assignment(parcel, run="r", client=1, cache=cache)
    assert same_assignment(received.assignment, WORK)
    assert received.exact == frozenset(LARGE.experts)


def test_what_was_coded_is_known_by_its_own_hash_the_next_time(tmp_path):
    cache = ExpertCache(tmp_path)
    first = there(WORK, cache=cache, codecs=Codecs.of(Int8()))
    assert not first.exact
    again = pack_assignment(
        WORK, run="spring", client=3, known=cache.held(), codecs=Codecs.of(Int8())
    )
    assert again.groups.keys() == {"extra"}
    back = unpack_assignment(again, run="spring", client=3, cache=cache)
    assert same_assignment(back.assignment, first.assignment) and back.base == first.base


@pytest.mark.parametrize("codec", [Raw(), *CODINGS, TopK(0.2)], ids=str)
def test_an_expert_that_one_client_alone_trains_comes_back_without_a_byte(tmp_path, codec):
    cache = ExpertCache(tmp_path)
    received = there(WORK, cache=cache, reply=Codecs.of(codec))
    parcel, _ = pack_update(
        trained(WORK), received, generator=torch.Generator().manual_seed(1), cache=cache
    )
    reply = unpack_update(parcel, WORK, run="spring", client=3)
    experts = reply.update.model.experts  # the mean of one is that one
    following = Assignment(5, MoEState({}, experts), WORK.sub_moe)
    down = pack_assignment(following, run="spring", client=3, known=reply.held)
    assert not down.groups
    back = unpack_assignment(down, run="spring", client=3, cache=cache)
    assert same_assignment(back.assignment, following)


def test_what_did_not_change_takes_no_bytes_up():
    for codec in (Raw(), Int8(), TopK()):
        received = there(WORK, codecs=Codecs.of(BF16()), reply=Codecs.of(codec))
        same = received.assignment.model
        parcel, _ = pack_update(replace(trained(WORK), model=same, extra={}), received)
        assert not any(raw for group in parcel.groups.values() for raw in group.values())
        update = unpack_update(parcel, WORK, run="spring", client=3).update
        # As the server has it, not as it arrived.
        assert state_hash(update.model) == state_hash(WORK.model)


# Errors of codecs


@pytest.mark.parametrize("codec", CODINGS, ids=str)
def test_the_way_down_loses_no_more_than_its_codec_says_and_leaves_the_rest_exact(codec):
    back = there(WORK, codecs=Codecs(experts=codec)).assignment.model
    assert state_hash(MoEState(back.shared, {})) == state_hash(MoEState(LARGE.shared, {}))
    for e, state in LARGE.experts.items():
        for name, value in state.items():
            off = (back.experts[e][name] - value).abs().max()
            assert 0 < off <= value.abs().max() * 0.51 * 1.008 / getattr(codec, "levels", 127)
    back = there(WORK, codecs=Codecs(shared=codec)).assignment.model
    assert state_hash(MoEState({}, back.experts)) == state_hash(MoEState({}, LARGE.experts))
    for name in ("norm.running_var", "norm.steps"):
        assert torch.equal(back.shared[name], LARGE.shared[name])
    for name, value in LARGE.shared.items():
        assert back.shared[name].dtype == value.dtype
        assert torch.allclose(back.shared[name].float(), value.float(), atol=0.15)


@pytest.mark.parametrize("codec", CODINGS, ids=str)
def test_the_error_of_an_update_is_that_of_its_difference(codec):
    received = there(WORK, reply=Codecs.of(codec))
    u = trained(WORK, by=1e-3)
    parcel, _ = pack_update(u, received, generator=torch.Generator().manual_seed(0))
    back = unpack_update(parcel, WORK, run="spring", client=3).update
    for e, state in u.model.experts.items():
        for name, value in state.items():
            largest = (value - LARGE.experts[e][name]).abs().max()
            off = (back.model.experts[e][name] - value).abs().max()
            assert off <= 1.01 * largest / getattr(codec, "levels", 127) + 1e-6


def test_the_error_down_does_not_come_back_up():
    """The server adds the difference to what it has, not to what the client received."""
    received = there(WORK, codecs=Codecs.of(Int8(levels=7)), reply=Codecs.of(BF16()))
    u = trained(received.assignment, by=1e-3)
    parcel, _ = pack_update(u, received)
    back = unpack_update(parcel, WORK, run="spring", client=3).update
    moved = u.model.experts[E0]["up"] - received.assignment.model.experts[E0]["up"]
    got = back.model.experts[E0]["up"] - LARGE.experts[E0]["up"]
    assert torch.allclose(got, moved, atol=3e-5)


def test_what_top_k_leaves_out_is_sent_later():
    """One update of 1 and then none at all: in the end everything has arrived."""
    wanted = {"up": torch.linspace(-1, 1, 100).reshape(10, 10)}
    have = {"up": torch.zeros(10, 10)}
    feedback = None
    for round in range(30):
        a = Assignment(round, MoEState(have, {}), frozenset())
        received = there(a, reply=Codecs.of(TopK(0.1)))
        target = wanted if round == 0 else have
        u = ClientUpdate(3, 1, MoEState(target, {}), ActivationProfile.empty(0, 0), {})
        parcel, feedback = pack_update(u, received, feedback=feedback)
        update = unpack_update(parcel, a, run="spring", client=3).update
        moved = (update.model.shared["up"] - have["up"]).count_nonzero()
        assert moved <= 12
        have = {**update.model.shared}
    assert torch.allclose(have["up"], wanted["up"], atol=1e-4)
    assert float(feedback.shared["up"].abs().max()) < 1e-4


def test_what_is_left_out_of_an_expert_waits_until_it_is_held_again():
    received = there(WORK, reply=Codecs.of(TopK(0.1)))
    _, first = pack_update(trained(WORK), received)
    only = MoEState({}, {E1: trained(WORK).model.experts[E1]})
    _, second = pack_update(replace(trained(WORK), model=only), received, feedback=first)
    assert torch.equal(second.experts[E0]["up"], first.experts[E0]["up"])
    assert not torch.equal(second.experts[E1]["up"], first.experts[E1]["up"])


def test_the_way_down_is_not_for_differences():
    with pytest.raises(ValueError, match="it is for differences"):
        pack_assignment(WORK, run="r", client=1, codecs=Codecs.of(TopK()))


def test_an_update_that_is_not_finite_is_not_sent():
    received = there(WORK, reply=Codecs.of(Int8()))
    shared = {**LARGE.shared, "body": torch.full((30, 50), torch.nan)}
    with pytest.raises(ValueError, match="must be finite"):
        pack_update(replace(trained(WORK), model=MoEState(shared, {})), received)


def test_what_cannot_travel_is_named():
    a = Assignment(0, MoEState({"w": torch.zeros(2, dtype=torch.complex64)}, {}), frozenset())
    with pytest.raises(ValueError, match="parameter 'w': torch.complex64 cannot travel"):
        pack_assignment(a, run="r", client=1)


# What is refused

SMALL = Assignment(6, one_layer(1.0, 2.0, 3.0), frozenset({E0, E1}), extra={"c": torch.ones(2)})
DOWN = pack_assignment(SMALL, run="r", client=1)
RECEIVED = unpack_assignment(DOWN, run="r", client=1)
UP, _ = pack_update(replace(trained(SMALL, client=1), extra={}), RECEIVED)


def up(parcel, **how):
    return unpack_update(parcel, SMALL, **({"run": "r", "client": 1, "base": base_of(DOWN)} | how))


def test_a_foreign_or_stale_update_is_refused_by_name():
    up(UP)
    with pytest.raises(ForeignError, match="run 'autumn', got one of 'r'"):
        up(UP, run="autumn")
    with pytest.raises(ForeignError, match="client 2, got one of client 1"):
        up(UP, client=2)
    with pytest.raises(StaleError, match="round 7, got one of round 6"):
        unpack_update(UP, replace(SMALL, round=7), run="r", client=1)
    with pytest.raises(StaleError, match="answers other values"):
        up(UP, base=base_of(pack_assignment(WORK, run="r", client=1)))


def test_an_assignment_of_another_run_or_client_is_refused():
    with pytest.raises(ForeignError, match="client 2, got one of client 1"):
        unpack_assignment(DOWN, run="r", client=2)
    with pytest.raises(ForeignError, match="run 'q', got one of 'r'"):
        unpack_assignment(DOWN, run="q", client=1)
    assert unpack_assignment(DOWN, run=None, client=1).run == "r"


def test_an_update_is_no_assignment_and_the_other_way_round():
    with pytest.raises(ParcelError, match="kind 'assignment' was expected, got 'update'"):
        unpack_assignment(UP, run="r", client=1)
    with pytest.raises(ParcelError, match="kind 'update' was expected, got 'assignment'"):
        up(DOWN)


def test_what_would_take_too_much_memory_is_refused_before_it_is_decoded():
    big = {"zeros": torch.zeros(1000, 1000) - 0.0}
    big["zeros"][0, 0] = -1
    a = Assignment(0, MoEState(big, {}), frozenset())
    parcel = pack_assignment(a, run="r", client=1, codecs=Codecs.of(Int8()))
    assert parcel_bytes(parcel) < 5000
    with pytest.raises(ParcelError, match="at most 3000000 bytes once decoded, got 4000000"):
        unpack_assignment(parcel, run="r", client=1, limit_bytes=3_000_000)


def rewritten(parcel, change, regroup=lambda groups: None, rehash=True):
    """The parcel with its manifest and its bytes changed; hashes made right unless asked not to."""
    manifest = parsed(parcel)
    groups = {name: dict(raws) for name, raws in parcel.groups.items()}
    regroup(groups)
    change(manifest)
    for group in manifest.groups if rehash else ():
        raws = groups.get(group.name, {})
        whole = {t.name for t in group.tensors} == set(raws)
        if whole and not group.held and all(isinstance(raw, bytes) for raw in raws.values()):
            group.sha256 = content_hash(group, raws)
    return closed(manifest, groups)


def tensor(manifest, group="shared"):
    return next(g for g in manifest.groups if g.name == group).tensors[0]


def nothing(_):
    pass


def with_raw(raw, group="shared", name="w", **fields):
    """Other bytes for a tensor, and what the manifest says of them."""

    def regroup(groups):
        groups[group][name] = raw

    def change(manifest):
        t = tensor(manifest, group)
        t.nbytes = len(raw)
        for field, value in fields.items():
            if field == "shape":
                del t.shape[:]
                t.shape.extend(value)
            else:
                setattr(t, field, value)

    return change, regroup


def said(**fields):
    def change(manifest):
        content = getattr(manifest, manifest.WhichOneof("content"))
        for field, value in fields.items():
            if isinstance(value, list):
                del getattr(content, field)[:]
                getattr(content, field).extend(value)
            elif isinstance(value, pb.Profile | pb.Codec):
                getattr(content, field).CopyFrom(value)
            else:
                setattr(content, field, value)

    return change, nothing


NAN4 = b"\0\0\xc0\x7f"
BOTH = {
    "a hash that is wrong": (
        lambda m: setattr(m.groups[0], "sha256", b"\1" * 32), nothing, "has another hash",
    ),
    "too few bytes": (*with_raw(b"\0" * 3), "must take 4 bytes, got 3"),
    "bytes that the manifest does not count": (
        nothing, lambda g: g["shared"].update(w=b"\0" * 3), "must have the 4 bytes",
    ),
    "a tensor that is not there": (
        lambda m: m.groups[0].tensors.add(name="v", dtype=pb.FLOAT32), nothing, "not in both",
    ),
    "a tensor that is there twice": (
        lambda m: m.groups[0].tensors.add().CopyFrom(m.groups[0].tensors[0]),
        nothing, "must be there once",
    ),
    "a dtype that is none": (*with_raw(b"\0" * 4, dtype=99), "has dtype 99, which is none"),
    "an encoding that is none": (*with_raw(b"\0" * 4, encoding=99), "encoding 99"),
    "no encoding": (*with_raw(b"\0" * 4, encoding=0), "encoding 0"),
    "nine dims": (*with_raw(b"\0" * 4, shape=[1] * 9), "at most 8 dims, got 9"),
    "a shape beyond all bounds": (*with_raw(b"", shape=[2**40, 2**40]), "numbers, got"),
    "an empty shape beyond all bounds": (*with_raw(b"", shape=[0, 2**63]), "numbers, got"),
    "nan": (*with_raw(NAN4), "must be finite"),
    "infinity": (*with_raw(b"\0\0\x80\x7f"), "must be finite"),
    "a whole number that is coded": (
        *with_raw(b"\0" * 2, dtype=pb.INT64, encoding=pb.BF16), "must travel raw",
    ),
    "a name without end": (
        lambda m: setattr(m.groups[0].tensors[0], "name", "n" * 600),
        lambda g: g.update(shared={"n" * 600: b"\0" * 4}), "at most 512 characters",
    ),
    "bytes that are none": (
        nothing, lambda g: g["shared"].update(w="0000"), "must be bytes",
    ),
}  # fmt: skip
ASSIGNMENTS = {
    "a job that is none": (*said(job=99), "job must be one of"),
    "no job": (*said(job=0), "job must be one of"),
    "a round without end": (*said(round=2**40), "round must be at most"),
    "no choice at all": (*said(choose=0), "choose must be between 1 and"),
    "experts named twice": (*said(sub_moe=[pb.ExpertId(layer=0)] * 2), "every expert once"),
    "an expert without end": (*said(sub_moe=[pb.ExpertId(layer=2**31)]), "must be below 65536"),
    "a codec that makes no sense": (
        *said(reply_shared=pb.Codec(int8=pb.Codec.Int8())), "a codec's block must be between",
    ),
    "a share that is none": (
        *said(reply_experts=pb.Codec(top_k=pb.Codec.TopK(share=-1))), "a codec's share",
    ),
    "a difference from nothing": (
        *with_raw(b"\0\0", encoding=pb.BF16, delta=True), "from what was never sent",
    ),
    "the same as nothing": (*with_raw(b"", encoding=pb.SAME), "from what was never sent"),
    "bytes for what is named by hash": (
        lambda m: setattr(m.groups[0], "held", True), lambda g: g.pop("shared"),
        "must have no tensors",
    ),
    "a truth that is neither": (
        *with_raw(b"\2", dtype=pb.BOOL), "must be bytes of 0 and 1",
    ),
}  # fmt: skip
UPDATES = {
    "examples without end": (*said(num_examples=2**63), "num_examples must be between"),
    "a metric that is no number": (
        *said(metrics=[pb.Metric(name="loss", value=float("nan"))]), "must be finite, got nan",
    ),
    "a metric that is there twice": (
        *said(metrics=[pb.Metric(name="loss")] * 2), "and is there twice",
    ),
    "metrics without end": (
        *said(metrics=[pb.Metric(name="m")] * 2000), "at most 1024 metrics, got 2000",
    ),
    "a hash that is none": (*said(held=[b"short"]), "of 32 bytes each"),
    "a profile that says more than it has": (
        *said(profile=pb.Profile(layers=1, experts=2)), "count must have 2 numbers, got 0",
    ),
    "a profile beyond all bounds": (
        *said(profile=pb.Profile(layers=2**31, experts=2**31)), "must have at most",
    ),
    "a long and empty profile": (*said(profile=pb.Profile(layers=2**31)), "must have at most"),
    "a negative count": (
        *said(profile=pb.Profile(layers=1, experts=1, count=[-1], weight=[0], score=[0],
                                 token=[1])), "must not have a negative number",
    ),
    "a score that is no number": (
        *said(profile=pb.Profile(layers=1, experts=1, count=[1], weight=[0], token=[1],
                                 score=[float("inf")])), "score must be finite",
    ),
    "another shape": (*with_raw(b"\0" * 8, shape=[2]), r"of shape \(1,\), got"),
    "another dtype": (*with_raw(b"\0" * 2, dtype=pb.FLOAT16), "must be torch.float32"),
    "a name that was not sent": (
        lambda m: setattr(m.groups[0].tensors[0], "name", "v"),
        lambda g: g.update(shared={"v": b"\0" * 4}), "'v' was not sent",
    ),
    "an expert that was not sent": (
        lambda m: setattr(m.groups[1], "name", "expert.0.7"),
        lambda g: g.update({"expert.0.7": g.pop("expert.0.0")}), "was not sent to client 1",
    ),
    "gate rows": (
        lambda m: setattr(m.groups[1], "name", "rows.0.0"),
        lambda g: g.update({"rows.0.0": g.pop("expert.0.0")}), "was not sent to client 1",
    ),
    "a group named by its hash": (
        lambda m: (setattr(m.groups[0], "held", True), m.groups[0].ClearField("tensors")),
        lambda g: g.pop("shared"), "must come with an update",
    ),
    "bytes where nothing changed": (*with_raw(b"\0", encoding=pb.SAME), "must take no bytes"),
    "a difference that is raw": (*with_raw(b"\0" * 4, delta=True), "must not be raw"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BOTH, *ASSIGNMENTS])
def test_an_assignment_that_is_malformed_is_refused_and_nothing_is_kept(case, tmp_path):
    change, regroup, text = (BOTH | ASSIGNMENTS)[case]
    cache = ExpertCache(tmp_path)
    wrong = rewritten(DOWN, change, regroup, rehash=case != "a hash that is wrong")
    with pytest.raises(ParcelError, match=text):
        unpack_assignment(wrong, run="r", client=1, cache=cache)
    assert not cache.held()


@pytest.mark.parametrize("case", [*BOTH, *UPDATES])
def test_an_update_that_is_malformed_is_refused(case):
    change, regroup, text = (BOTH | UPDATES)[case]
    before = state_hash(SMALL.model)
    wrong = rewritten(UP, change, regroup, rehash=case != "a hash that is wrong")
    with pytest.raises(ParcelError, match=text):
        up(wrong)
    assert state_hash(SMALL.model) == before


def test_a_sum_that_overflows_is_refused():
    a = Assignment(0, MoEState({"w": torch.full((1,), 3e38)}, {}), frozenset())
    received = unpack_assignment(pack_assignment(a, run="r", client=1), run="r", client=1)
    model = MoEState({"w": torch.full((1,), 2e38)}, {})
    u = ClientUpdate(1, 1, model, ActivationProfile.empty(0, 0), {})
    parcel, _ = pack_update(u, received)
    most = with_raw(b"\x7f\x7f", encoding=pb.BF16, delta=True)
    with pytest.raises(ParcelError, match="must be finite"):
        unpack_update(rewritten(parcel, *most), a, run="r", client=1)


def test_what_comes_back_is_memory_of_its_own():
    back = up(UP).update
    back.model.shared["w"].fill_(99)
    assert not torch.equal(up(UP).update.model.shared["w"], back.model.shared["w"])
    received = there(SMALL)
    received.assignment.model.experts[E0]["v"].fill_(99)
    assert float(SMALL.model.experts[E0]["v"]) == 2


def test_the_hash_is_what_the_proto_file_says():
    # The name with its length, FLOAT32, dims, RAW, no block, no difference, 8 bytes; two ones.
    sealed, _ = seal({"ö": torch.ones(2)}, Raw())
    line = b"2\x00\xc3\xb6\x001\x002\x001\x000\x000\x008\n"
    assert sealed.hash == hashlib.sha256(line + b"\0\0\x80\x3f" * 2).digest()


def test_no_groups_is_a_parcel_too():
    empty = Assignment(0, MoEState({}, {}), frozenset(), Job.SERVE)
    parcel = pack_assignment(empty, run="", client=0)
    assert not parcel.groups and parcel_bytes(parcel) < 60
    assert same_assignment(unpack_assignment(parcel, run="", client=0).assignment, empty)
    nothing_used = ActivationProfile.empty(0, 0)
    u = ClientUpdate(0, 1, MoEState({}, {}), nothing_used, {})
    back, _ = pack_update(u, unpack_assignment(parcel, run="", client=0))
    assert same_update(unpack_update(back, empty, run="", client=0).update, u)
