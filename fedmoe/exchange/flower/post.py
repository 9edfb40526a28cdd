"""What passes between server and client, whoever carries it; and how a socket carries it.

A frame is MAGIC, the lengths of its head and its body, the head as JSON, and the body: the
manifest and then the groups' values, one after another as the head lists them.
"""

import json
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

HELLO, WORK = "hello", "work"  # what is asked
PARCEL, FAILED, BROKEN = "parcel", "failed", "broken"  # what is answered
KINDS = (HELLO, WORK, PARCEL, FAILED, BROKEN)

MAGIC = b"fedmoe\x00\x01"
LENGTHS = struct.Struct("<8sIQ")
HEAD_LIMIT = 2**24  # bytes
BODY_LIMIT = 2**35  # bytes; a model of 8 billion parameters in float32
MAX_TENSORS = 2**20

Groups = Mapping[str, Mapping[str, bytes]]


class PostError(ValueError):
    """Not what `Post` says; the message tells in what way."""


@dataclass(frozen=True, eq=False)
class Post:
    """A parcel, see `fedmoe.wire.parcel`, and a word about it.

    `text` holds the terms of the run where something is asked, and what went wrong where the
    answer is FAILED, which it would be again, or BROKEN, which another try may mend.
    """

    kind: str
    text: str = ""
    manifest: bytes = b""
    groups: Groups = field(default_factory=dict)

    @property
    def table(self) -> list[Any]:
        """Groups, names and lengths: [[group, [[name, bytes], ...]], ...]."""
        return [[g, [[n, len(v)] for n, v in values.items()]] for g, values in self.groups.items()]


Table = dict[str, dict[str, int]]  # group -> name -> bytes


def read_table(found: object) -> Table:
    """As `Post.table`, checked. Raises PostError."""
    table: Table = {}
    count = 0
    if not isinstance(found, list):
        raise PostError(f"the table of groups must be a list, got {type(found).__name__}")
    for entry in found:
        group, names = _pair(entry, "a group must be [name, tensors]")
        if not isinstance(group, str) or not isinstance(names, list) or group in table:
            raise PostError(f"groups must have names of their own and lists, got {group!r:.80}")
        sizes: dict[str, int] = {}
        for item in names:
            name, size = _pair(item, "a tensor must be [name, bytes]")
            if not isinstance(name, str) or name in sizes:
                raise PostError(f"tensors must have names of their own, got {name!r:.80}")
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= BODY_LIMIT:
                raise PostError(
                    f"a tensor's bytes must be between 0 and {BODY_LIMIT}, got {size!r:.80}"
                )
            sizes[name] = size
        count += len(sizes) + 1
        if count > MAX_TENSORS:
            raise PostError(f"there must be at most {MAX_TENSORS} groups and tensors")
        table[group] = sizes
    return table


def _pair(found: object, what: str) -> tuple[Any, Any]:
    if not isinstance(found, list) or len(found) != 2:
        raise PostError(f"{what}, got {found!r:.80}")
    return found[0], found[1]


def send(connection: socket.socket, post: Post) -> None:
    """Raises OSError: the other side is gone."""
    head = json.dumps(
        {
            "kind": post.kind,
            "text": post.text,
            "manifest": len(post.manifest),
            "groups": post.table,
        }
    ).encode()
    parts = [post.manifest, *(v for values in post.groups.values() for v in values.values())]
    connection.sendall(LENGTHS.pack(MAGIC, len(head), sum(map(len, parts))) + head)
    for part in filter(None, parts):  # with nothing, too, sendall asks whether somebody is there
        connection.sendall(part)


def receive(stream: BinaryIO, limit: int = BODY_LIMIT) -> Post | None:
    """The next one, or None where the stream ends before it; nothing is allocated on trust.

    Raises:
        PostError: not a frame, a frame cut short, or one with more than `limit` bytes.
    """
    start = stream.read(LENGTHS.size)
    if not start:
        return None
    if len(start) < LENGTHS.size:
        raise PostError(f"a frame must begin with {LENGTHS.size} bytes, got {len(start)}")
    magic, head_bytes, body_bytes = LENGTHS.unpack(start)
    if magic != MAGIC:
        raise PostError(f"a frame must begin with {MAGIC!r}, got {magic!r}")
    if head_bytes > HEAD_LIMIT:
        raise PostError(f"a frame's head must be at most {HEAD_LIMIT} bytes, got {head_bytes}")
    if body_bytes > limit:
        raise PostError(f"a frame's body must be at most {limit} bytes, got {body_bytes}")
    try:
        head = json.loads(_exactly(stream, head_bytes))
    except (ValueError, RecursionError) as why:
        raise PostError(f"a frame's head must be JSON: {why}") from why
    if not isinstance(head, dict) or head.get("kind") not in KINDS:
        raise PostError(f"a frame's kind must be one of {', '.join(KINDS)}, got {head!r:.80}")
    text, manifest = head.get("text"), head.get("manifest")
    if not isinstance(text, str) or not isinstance(manifest, int) or manifest < 0:
        raise PostError("a frame's head must hold a text and the length of a manifest")
    table = read_table(head.get("groups"))
    declared = manifest + sum(size for sizes in table.values() for size in sizes.values())
    if declared != body_bytes:
        raise PostError(f"a frame of {body_bytes} bytes must list as many, got {declared}")
    return Post(
        head["kind"],
        text,
        _exactly(stream, manifest),
        {g: {n: _exactly(stream, s) for n, s in sizes.items()} for g, sizes in table.items()},
    )


def _exactly(stream: BinaryIO, count: int) -> bytes:
    """In pieces, so that a length that was made up costs no memory."""
    read = b"".join(_pieces(stream, count))
    if len(read) != count:
        raise PostError(f"a frame was cut short: {count} bytes were announced, got {len(read)}")
    return read


def _pieces(stream: BinaryIO, count: int, piece: int = 2**22) -> Iterator[bytes]:
    while count:
        part = stream.read(min(count, piece))
        if not part:
            return
        count -= len(part)
        yield part
