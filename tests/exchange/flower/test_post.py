import io
import json
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.exchange.flower import post as module
from fedmoe.exchange.flower.post import (
    HELLO,
    KINDS,
    LENGTHS,
    MAGIC,
    PARCEL,
    WORK,
    Post,
    PostError,
    receive,
    send,
)

POST = Post(WORK, "terms", b"manifest", {"shared": {"w": b"1234", "b": b""}, "expert.0.1": {}})
names = st.text(max_size=8)
posts = st.builds(
    Post,
    st.sampled_from(KINDS),
    st.text(max_size=30),
    st.binary(max_size=30),
    st.dictionaries(names, st.dictionaries(names, st.binary(max_size=20), max_size=3), max_size=3),
)


def frame(post):
    """What `send` puts on the wire."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=lambda: (send(ours, post), ours.close()))
        sender.start()
        raw = theirs.makefile("rb").read()
        sender.join()
    return raw


def same(a, b):
    return vars(a) == vars(b)


FRAME = frame(POST)


def head(**changes):
    """A frame of POST with another head."""
    found = {"kind": WORK, "text": "terms", "manifest": 8, "groups": POST.table} | changes
    raw = json.dumps(found).encode()
    return LENGTHS.pack(MAGIC, len(raw), 12) + raw + b"manifest1234"


@given(posts)
def test_a_post_arrives_as_it_was_sent(post):
    assert same(receive(io.BytesIO(frame(post))), post)


def test_posts_follow_one_another():
    stream = io.BytesIO(FRAME + frame(Post(HELLO)))
    assert same(receive(stream), POST) and same(receive(stream), Post(HELLO))
    assert receive(stream) is None


@given(st.integers(1, len(FRAME) - 1))
def test_a_frame_that_is_cut_short_is_refused(length):
    with pytest.raises(PostError):
        receive(io.BytesIO(FRAME[:length]))


@given(st.integers(0, len(FRAME) - 1), st.integers(1, 255))
def test_a_frame_with_another_byte_is_refused_or_another_post(place, flip):
    raw = bytearray(FRAME)
    raw[place] ^= flip
    try:
        found = receive(io.BytesIO(bytes(raw)))
    except PostError:
        return
    assert found is not None and found.kind in KINDS


@given(st.binary(max_size=60))
def test_noise_is_refused(raw):
    if raw:
        with pytest.raises(PostError):
            receive(io.BytesIO(raw))


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"GET / HTTP/1.1\r\n\r\nand so on", "a frame must begin with b'fedmoe"),
        (b"short", "a frame must begin with 20 bytes, got 5"),
        (LENGTHS.pack(MAGIC, 2**25, 0), "a frame's head must be at most 16777216 bytes"),
        (LENGTHS.pack(MAGIC, 2, 2**60), "a frame's body must be at most 34359738368 bytes"),
        (LENGTHS.pack(MAGIC, 2, 0) + b"{}", "a frame's kind must be one of hello, work"),
        (LENGTHS.pack(MAGIC, 2, 0) + b"{]", "a frame's head must be JSON"),
        (LENGTHS.pack(MAGIC, 90000, 0) + b"[" * 90000, "a frame's head must be JSON"),
        (LENGTHS.pack(MAGIC, 1, 0) + b"\xff", "a frame's head must be JSON"),
        (head(kind="format"), "a frame's kind must be one of"),
        (head(kind=["work"]), "a frame's kind must be one of"),
        (head(text=3), "a frame's head must hold a text"),
        (head(manifest=-8), "a frame's head must hold a text and the length of a manifest"),
        (head(manifest=9), "a frame of 12 bytes must list as many, got 13"),
        (head(groups=None), "the table of groups must be a list, got NoneType"),
        (head(groups=[1]), "a group must be .name, tensors., got 1"),
        (head(groups=[["a", []], ["a", []]]), "groups must have names of their own"),
        (head(groups=[["a", [["b", 1], ["b", 1]]]]), "tensors must have names of their own"),
        (head(groups=[["a", [["b", -4]]]]), "a tensor's bytes must be between 0 and"),
        (head(groups=[["a", [["b", True]]]]), "a tensor's bytes must be between 0 and"),
        (head(groups=[["a", [["b", 2**70]]]]), "a tensor's bytes must be between 0 and"),
    ],
)
def test_what_is_no_frame_is_refused_by_name(raw, words):
    with pytest.raises(PostError, match=words):
        receive(io.BytesIO(raw))


def test_more_than_the_reader_grants_is_refused():
    assert receive(io.BytesIO(FRAME), limit=12) is not None
    with pytest.raises(PostError, match="a frame's body must be at most 11 bytes, got 12"):
        receive(io.BytesIO(FRAME), limit=11)


def test_more_groups_than_anybody_has_are_refused(monkeypatch):
    monkeypatch.setattr(module, "MAX_TENSORS", 4)
    assert receive(io.BytesIO(FRAME)) is not None
    monkeypatch.setattr(module, "MAX_TENSORS", 3)
    with pytest.raises(PostError, match="there must be at most 3 groups and tensors"):
        receive(io.BytesIO(FRAME))


def test_a_length_that_was_made_up_costs_no_memory():
    class Source(io.BytesIO):
        asked = 0

        def read(self, size=-1):
            Source.asked = max(Source.asked, size)
            return super().read(size)

    raw = json.dumps({"kind": PARCEL, "text": "", "manifest": 2**30, "groups": []}).encode()
    with pytest.raises(PostError, match="cut short: 1073741824 bytes were announced, got 3"):
        receive(Source(LENGTHS.pack(MAGIC, len(raw), 2**30) + raw + b"abc"))
    assert Source.asked <= 2**22
