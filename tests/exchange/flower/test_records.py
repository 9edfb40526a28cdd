import subprocess
import sys

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.exchange.flower.post import KINDS, PARCEL, WORK, Post, PostError
from fedmoe.exchange.flower.records import content_of, post_of

names = st.text(min_size=1, max_size=8).filter(lambda name: name != "fedmoe")
posts = st.builds(
    Post,
    st.sampled_from(KINDS),
    st.text(max_size=30),
    st.binary(max_size=30),
    st.dictionaries(names, st.dictionaries(names, st.binary(max_size=20), max_size=3), max_size=3),
)
POST = Post(WORK, "terms", b"manifest", {"shared": {"w": b"1234", "b": b""}, "expert.0.1": {}})


def through_flower(content):
    """As Flower sends it: cut into objects by content, and put together again."""
    objects = get_all_nested_objects(content)
    contents = {object_id: o.deflate() for object_id, o in objects.items()}
    return inflate_object_from_contents(content.object_id, contents)


def same(a, b):
    return vars(a) == vars(b)


@given(posts)
def test_a_post_is_read_as_it_was_written(post):
    assert same(post_of(content_of(post)), post)


@given(posts)
def test_a_post_is_the_same_after_flower_has_carried_it(post):
    assert same(post_of(through_flower(content_of(post))), post)


def test_a_content_may_be_emptied_as_it_is_read():
    content = content_of(POST)
    assert same(post_of(content, empty=True), POST)
    assert list(content) == ["fedmoe"]


def test_equal_groups_are_the_same_record_and_others_are_not():
    made = {}
    first = content_of(POST, made)
    again = content_of(Post(WORK, "", b"", {"shared": {"w": bytes([*b"1234"]), "b": b""}}), made)
    other = content_of(Post(WORK, "", b"", {"shared": {"w": b"1235", "b": b""}}), made)
    assert first["shared"] is again["shared"]
    assert first["shared"] is not other["shared"]
    assert post_of(other).groups["shared"]["w"] == b"1235"


def test_a_groups_values_are_one_array():
    content = content_of(Post(PARCEL, "", b"", {"shared": {"a": b"12", "b": b"345"}}))
    [array] = content.array_records["shared"].values()
    assert array.data == b"12345" and array.stype == "fedmoe.bytes"


def test_a_group_cannot_be_called_as_what_is_said_about_them():
    with pytest.raises(PostError, match="a group must not be called 'fedmoe'"):
        content_of(Post(WORK, "", b"", {"fedmoe": {}}))


def changed(**changes):
    content = content_of(POST)
    content["fedmoe"] = ConfigRecord(dict(content["fedmoe"]) | changes)
    return content


def with_record(name, record):
    content = content_of(POST)
    content[name] = record
    return content


def without(name):
    content = content_of(POST)
    del content[name]
    return content


def array(data, stype="fedmoe.bytes", name="values"):
    return ArrayRecord({name: Array("uint8", (len(data),), stype, data)})


@pytest.mark.parametrize(
    "content, words",
    [
        (RecordDict(), "a message must hold a record 'fedmoe', got"),
        (without("fedmoe"), "a message must hold a record 'fedmoe', got"),
        (changed(kind="format"), "a message's kind must be one of hello, work"),
        (changed(kind=3), "a message's kind must be one of hello, work"),
        (changed(text=b"x"), "a message must hold a text, a manifest and a table of groups"),
        (changed(manifest="x"), "a message must hold a text, a manifest and a table of groups"),
        (changed(groups="[["), "a message's table of groups must be JSON"),
        (changed(groups="[" * 90000), "a message's table of groups must be JSON"),
        (changed(groups="{}"), "the table of groups must be a list, got dict"),
        (changed(groups="[]"), "'expert.0.1' is none of them"),
        (without("shared"), "'shared' is missing"),
        (with_record("more", array(b"")), "'more' is none of them"),
        (with_record("more", MetricRecord({"loss": 1.0})), "'more' is none of them"),
        (with_record("shared", array(b"123")), "group 'shared' must have 4 bytes, got 3"),
        (with_record("shared", array(b"1234", "numpy.ndarray")), "must be one array of bytes"),
        (with_record("shared", array(b"1234", name="w")), "must be one array of bytes"),
        (with_record("shared", MetricRecord({"values": 1.0})), "must be one array of bytes"),
    ],
)
def test_what_is_no_post_is_refused_by_name(content, words):
    with pytest.raises(PostError, match=words):
        post_of(content)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["client.app", "fedmoe.exchange.flower.forward"])
def test_what_runs_for_every_message_imports_no_torch(module):
    code = f"import {module}, sys; print(sorted(m for m in ('torch', 'ray') if m in sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
