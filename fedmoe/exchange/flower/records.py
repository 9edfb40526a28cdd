"""A `Post` as the content of a Flower message, and back: one record per group.

A group's values are one array of bytes. Flower stores arrays by content and once, and moves each
in a request of its own: so one expert is one array, and the same for all whom it is sent to.
"""

import json
from collections.abc import Mapping, MutableMapping

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedmoe.exchange.flower.post import KINDS, Post, PostError, read_table

ABOUT = "fedmoe"  # the record that is not a group's
VALUES = "values"
STYPE = "fedmoe.bytes"  # so that nobody takes it for a saved numpy array

Parts = tuple[bytes, ...]
Made = MutableMapping[str, tuple[Parts, ArrayRecord]]


def content_of(post: Post, made: Made | None = None) -> RecordDict:
    """What a message carries.

    Args:
        made: records of groups that were made before, and then those of this one too: a group
            with the same content takes the record that is there.
    """
    content = RecordDict()
    content[ABOUT] = ConfigRecord(
        {
            "kind": post.kind,
            "text": post.text,
            "manifest": post.manifest,
            "groups": json.dumps(post.table),
        }
    )
    for group, values in post.groups.items():
        if group == ABOUT:
            raise PostError(f"a group must not be called {ABOUT!r}")
        content[group] = _record(group, tuple(values.values()), made)
    return content


def _record(group: str, parts: Parts, made: Made | None) -> ArrayRecord:
    if made is not None and group in made and made[group][0] == parts:
        return made[group][1]
    joined = b"".join(parts)
    record = ArrayRecord({VALUES: Array("uint8", (len(joined),), STYPE, joined)})
    if made is not None:
        made[group] = parts, record
    return record


def post_of(content: RecordDict, *, empty: bool = False) -> Post:
    """What `content_of` was given.

    Args:
        empty: take the groups out of the content, so that no values are there twice.

    Raises:
        PostError: the content is anything else.
    """
    about = content.get(ABOUT)
    if not isinstance(about, ConfigRecord):
        raise PostError(f"a message must hold a record {ABOUT!r}, got {sorted(content)[:9]}")
    kind, text, manifest, groups = (about.get(n) for n in ("kind", "text", "manifest", "groups"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise PostError(f"a message's kind must be one of {', '.join(KINDS)}, got {kind!r:.80}")
    if not (isinstance(text, str) and isinstance(manifest, bytes) and isinstance(groups, str)):
        raise PostError("a message must hold a text, a manifest and a table of groups")
    try:
        table = read_table(json.loads(groups))
    except (json.JSONDecodeError, RecursionError) as why:
        raise PostError(f"a message's table of groups must be JSON: {why}") from why
    if strange := sorted(content.keys() ^ {ABOUT, *table}):
        raise PostError(
            f"a message must hold the groups of its table; {strange[0]!r} "
            f"{'is missing' if strange[0] in table else 'is none of them'}"
        )
    found: dict[str, Mapping[str, bytes]] = {}
    for group, sizes in table.items():
        record = content.pop(group) if empty else content[group]
        array = record.get(VALUES) if isinstance(record, ArrayRecord) else None
        if array is None or len(record) != 1 or array.stype != STYPE:
            raise PostError(f"group {group!r} must be one array of bytes called {VALUES!r}")
        if len(array.data) != sum(sizes.values()):
            raise PostError(
                f"group {group!r} must have {sum(sizes.values())} bytes, got {len(array.data)}"
            )
        found[group] = _apart(array.data, sizes)
    return Post(kind, text, manifest, found)


def _apart(data: bytes, sizes: Mapping[str, int]) -> dict[str, bytes]:
    if len(sizes) == 1:
        return dict.fromkeys(sizes, data)
    start, values = 0, {}
    for name, size in sizes.items():
        values[name] = data[start : start + size]
        start += size
    return values
