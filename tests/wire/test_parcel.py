"""Parcels without tensors, and what every manifest must be."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe import __version__
from fedmoe.wire import manifest_pb2 as pb
from fedmoe.wire.parcel import (
    GROUPS_LIMIT,
    HELD_LIMIT,
    MANIFEST_LIMIT,
    PROTOCOL,
    REASON_LIMIT,
    ForeignError,
    Hello,
    Miss,
    Parcel,
    ParcelError,
    StaleError,
    VersionError,
    closed,
    expert_of,
    kind_of,
    new_manifest,
    pack_failure,
    pack_hello,
    pack_miss,
    pack_query,
    parcel_bytes,
    read_manifest,
    unpack_failure,
    unpack_hello,
    unpack_miss,
    unpack_query,
)

ids = st.integers(0, 2**62)
runs = st.text(max_size=20)
hashes = st.binary(min_size=32, max_size=32)
hellos = st.builds(
    Hello,
    ids,
    ids,
    st.frozensets(hashes, max_size=4),
    st.text(max_size=9),
    st.none() | ids,
    st.none() | st.text(max_size=9),
    runs,
)


@given(hellos)
def test_a_hello_comes_back_as_it_was(hello):
    parcel = pack_hello(hello)
    assert unpack_hello(parcel, run=hello.run) == hello
    assert kind_of(parcel) == "hello" and not parcel.groups
    assert parcel_bytes(parcel) == len(parcel.manifest)


@given(runs)
def test_a_query_names_its_run(run):
    assert unpack_query(pack_query(run=run)) == run


@given(runs, ids, st.integers(0, 2**40), st.sets(hashes, max_size=4), st.sets(hashes, max_size=4))
def test_a_miss_comes_back_as_it_was(run, client, round, missing, held):
    parcel = pack_miss(run=run, client=client, round=round, hashes=missing, held=held)
    back = unpack_miss(parcel, run=run, client=client, round=round)
    assert back == Miss(client, round, tuple(sorted(missing)), frozenset(held))


@given(runs, ids, st.text(max_size=50))
def test_a_failure_tells_its_reason(run, client, reason):
    parcel = pack_failure(run=run, client=client, round=3, reason=reason)
    assert unpack_failure(parcel, run=run, client=client, round=3) == reason


def test_a_reason_is_cut_and_may_hold_anything():
    parcel = pack_failure(run="r", client=1, round=0, reason="\ud800" + "x" * 10**5)
    assert len(unpack_failure(parcel, run="r", client=1, round=0)) <= REASON_LIMIT


def test_no_more_hashes_are_reported_than_are_taken():
    many = frozenset(i.to_bytes(32, "big") for i in range(HELD_LIMIT + 5))
    assert len(unpack_hello(pack_hello(Hello(1, held=many)), run="").held) == HELD_LIMIT


def test_other_runs_clients_and_rounds_are_refused_by_name():
    miss = pack_miss(run="spring", client=3, round=5, hashes=[])
    with pytest.raises(ForeignError, match="run 'autumn', got one of 'spring'"):
        unpack_miss(miss, run="autumn", client=3, round=5)
    with pytest.raises(ForeignError, match="client 4, got one of client 3"):
        unpack_miss(miss, run="spring", client=4, round=5)
    with pytest.raises(StaleError, match="round 6, got one of round 5"):
        unpack_miss(miss, run="spring", client=3, round=6)
    with pytest.raises(ForeignError, match="run 'autumn', got one of 'spring'"):
        unpack_hello(pack_hello(Hello(1, run="spring")), run="autumn")


def test_one_kind_is_not_taken_for_another():
    with pytest.raises(ParcelError, match="kind 'hello' was expected, got 'miss'"):
        unpack_hello(pack_miss(run="", client=3, round=5, hashes=[]), run="")


@pytest.mark.parametrize("protocol, fedmoe", [(PROTOCOL + 1, __version__), (PROTOCOL, "9.9")])
def test_another_version_is_refused_and_both_are_named(protocol, fedmoe):
    manifest = new_manifest("r", 1)
    manifest.protocol, manifest.fedmoe = protocol, fedmoe
    manifest.query.SetInParent()
    text = (
        f"protocol {protocol} of fedmoe {fedmoe}, this one protocol {PROTOCOL} of fedmoe "
        f"{__version__}"
    )
    with pytest.raises(VersionError, match=text):
        kind_of(closed(manifest))


def test_a_manifest_of_a_version_to_come_can_still_be_told_from_its_first_two_fields():
    # Fields that are not known here, and none of ours but the first two.
    raw = pb.Manifest(protocol=77, fedmoe="8.0").SerializeToString() + b"\xfa\x7f\x03abc"
    with pytest.raises(VersionError, match=r"protocol 77 of fedmoe 8\.0"):
        kind_of(Parcel(raw))


def held(name, hash=b"\0" * 32):
    return pb.Group(name=name, sha256=hash, held=True)


def manifest_with(*groups):
    manifest = new_manifest("r", 1)
    manifest.assignment.SetInParent()
    manifest.groups.extend(groups)
    return manifest


@pytest.mark.parametrize(
    "parcel, text",
    [
        (Parcel(b"\xff" * 40), "not a manifest"),
        (Parcel(b"\0" * (MANIFEST_LIMIT + 1)), f"at most {MANIFEST_LIMIT} bytes"),
        (closed(new_manifest("r", 1)), "must have a content"),
        (closed(manifest_with(held("expert.0.0"), held("expert.0.0"))), "and is there twice"),
        (closed(manifest_with(held("expert.0.0", b"short"))), "must have a hash of 32 bytes"),
        (closed(manifest_with(held("experts.0.0"))), "'experts.0.0' is not the name of a group"),
        (closed(manifest_with(held("expert.00.1"))), "'expert.00.1' is not the name of a group"),
        (closed(manifest_with(held("expert.0.0\n"))), "is not the name of a group"),
        (closed(manifest_with(held("expert.0.123456"))), "is not the name of a group"),
        (closed(manifest_with(held(""))), "'' is not the name of a group"),
        (closed(manifest_with(*[held("once")] * (GROUPS_LIMIT + 1))), "groups, got 65537"),
        (closed(manifest_with(), {"shared": {}}), "groups must be those of the manifest; 'shared'"),
        (
            closed(manifest_with(pb.Group(name="shared", sha256=b"\0" * 32))),
            "groups must be those of the manifest; 'shared'",
        ),
        (closed(manifest_with(held("shared")), {"shared": {}}), "must be those of the manifest"),
    ],
    ids=range(14),
)
def test_a_manifest_that_makes_no_sense_is_refused(parcel, text):
    with pytest.raises(ParcelError, match=text):
        read_manifest(parcel)


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"run": "r" * 600}, "run must have at most 512 characters, got 600"),
        ({"client": 2**63}, "client must be between 0 and"),
    ],
)
def test_fields_out_of_range_are_refused(fields, text):
    manifest = new_manifest("r", 1)
    manifest.query.SetInParent()
    for name, value in fields.items():
        setattr(manifest, name, value)
    with pytest.raises(ParcelError, match=text):
        read_manifest(closed(manifest))


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"num_examples": 2**63}, "num_examples must be between 0 and"),
        ({"key": "k" * 600}, "key must have at most 512"),
        ({"task": "k" * 600}, "task must have at most 512"),
        ({"memory_bytes": 2**63}, "memory_bytes must be between"),
        ({"held": [b"short"]}, "of 32 bytes each"),
        ({"held": [b"\0" * 32] * (HELD_LIMIT + 1)}, f"at most {HELD_LIMIT}"),
    ],
)
def test_a_hello_out_of_range_is_refused(fields, text):
    manifest = new_manifest("r", 1)
    manifest.hello.CopyFrom(pb.Hello(**fields))
    with pytest.raises(ParcelError, match=text):
        unpack_hello(closed(manifest), run="r")


def test_only_assignments_and_updates_have_groups():
    manifest = manifest_with(held("shared"))
    manifest.hello.SetInParent()
    with pytest.raises(ParcelError, match="must have no groups"):
        unpack_hello(closed(manifest), run="r")


def test_a_groups_name_tells_its_expert():
    assert expert_of("expert.0.12") == ("expert", 0, 12)
    assert expert_of("rows.3.0") == ("rows", 3, 0)


@pytest.mark.slow
def test_small_parcels_need_no_torch():
    code = "import sys, fedmoe.wire.parcel; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
