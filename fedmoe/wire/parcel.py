"""What travels between server and client: a manifest and groups of tensors, each as bytes.

This module knows neither torch nor what is in a group; it has the container, its errors, and the
parcels that carry no tensors. `fedmoe.wire.packing` makes parcels of assignments and updates.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from fedmoe import __version__
from fedmoe.wire import manifest_pb2 as pb

PROTOCOL = 1  # of parcels; goes up with every change that an older side would not understand
MANIFEST_LIMIT = 8 * 2**20  # bytes
GROUPS_LIMIT = 2**16
NAME_LIMIT = 512  # characters, of a run, a group, a parameter or a metric
HELD_LIMIT = 4096  # hashes that a client reports
REASON_LIMIT = 2000  # characters
HASH_BYTES = 32
NUMBER_LIMIT = 2**62  # of clients, rounds and examples
LAYER_LIMIT = 2**16  # of layers, and of experts in one

_EXPERT = re.compile(r"(expert|rows)\.(0|[1-9]\d{0,4})\.(0|[1-9]\d{0,4})")


class ParcelError(ValueError):
    """A parcel that is malformed or not meant for its reader; says what is wrong with it."""


class VersionError(ParcelError):
    """The other side speaks another protocol, or runs another version of fedmoe."""


class StaleError(ParcelError):
    """A parcel of another round than the one that is going on."""


class ForeignError(ParcelError):
    """A parcel of another run, or of another client."""


class MissingError(ParcelError):
    """Groups that were named by hash alone are not in the cache: `hashes`."""

    def __init__(self, hashes: Iterable[bytes]) -> None:
        self.hashes = tuple(hashes)
        super().__init__(
            f"{len(self.hashes)} group(s) named by hash alone are not in the cache; "
            "ask for all of them"
        )


@dataclass(frozen=True, eq=False)
class Parcel:
    """A manifest (protobuf, see proto/fedmoe/v1) and the bytes of every tensor that travels.

    Groups are "shared", "once", "extra", and "expert.L.E" and "rows.L.E" for expert E of layer L.
    """

    manifest: bytes
    groups: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)


def parcel_bytes(parcel: Parcel) -> int:
    """What travels: the manifest, which has every name, and the tensors as encoded."""
    tensors = sum(len(raw) for group in parcel.groups.values() for raw in group.values())
    return len(parcel.manifest) + tensors


def kind_of(parcel: Parcel) -> str:
    """ "query", "hello", "assignment", "update", "miss" or "failure".

    Raises:
        ParcelError: it is none of these, or of another version.
    """
    return str(read_manifest(parcel).WhichOneof("content"))


def base_of(parcel: Parcel) -> bytes:
    """The hash of all that an assignment's groups hold; its update names it.

    Raises:
        ParcelError: the parcel is malformed.
    """
    return base_of_groups(read_manifest(parcel).groups)


def base_of_groups(groups: Iterable[pb.Group]) -> bytes:
    lines = sorted(f"{g.name}={g.sha256.hex()}\n" for g in groups)
    return hashlib.sha256("".join(lines).encode()).digest()


# Parcels without tensors


@dataclass(frozen=True)
class Hello:
    """What a client says of itself before the first round."""

    client: int
    num_examples: int = 1
    held: frozenset[bytes] = frozenset()  # hashes of the groups in its cache
    key: str = ""  # of its own choice, the same for as long as it lives
    memory_bytes: int | None = None
    task: str | None = None
    run: str = ""  # that it was asked for


@dataclass(frozen=True)
class Miss:
    """A client lacks groups that it was thought to hold."""

    client: int
    round: int
    hashes: tuple[bytes, ...]
    held: frozenset[bytes] = frozenset()


def pack_query(*, run: str) -> Parcel:
    """Asks a client to say hello."""
    manifest = new_manifest(run, 0)
    manifest.query.SetInParent()
    return closed(manifest)


def unpack_query(parcel: Parcel) -> str:
    """The run that asks.

    Raises:
        ParcelError: it is not a query.
    """
    return str(opened(parcel, "query").run)


def pack_hello(hello: Hello) -> Parcel:
    manifest = new_manifest(hello.run, hello.client)
    content = manifest.hello
    content.num_examples = hello.num_examples
    if hello.memory_bytes is not None:
        content.memory_bytes = hello.memory_bytes
    if hello.task is not None:
        content.task = hello.task
    content.held.extend(sorted(hello.held)[:HELD_LIMIT])
    content.key = hello.key
    content.SetInParent()
    return closed(manifest)


def unpack_hello(parcel: Parcel, *, run: str) -> Hello:
    """
    Raises:
        ForeignError: it answers another run.
        ParcelError: it is malformed.
    """
    manifest = opened(parcel, "hello")
    check_from(manifest, run, None)
    content = manifest.hello
    check_number("num_examples", content.num_examples)
    check_name("key", content.key)
    check_name("task", content.task)
    check_number("memory_bytes", content.memory_bytes)
    return Hello(
        manifest.client,
        content.num_examples,
        checked_hashes(content.held),
        content.key,
        content.memory_bytes if content.HasField("memory_bytes") else None,
        content.task if content.HasField("task") else None,
        manifest.run,
    )


def pack_miss(
    *, run: str, client: int, round: int, hashes: Iterable[bytes], held: Iterable[bytes] = ()
) -> Parcel:
    """A client's answer to an assignment that raised `MissingError`."""
    manifest = new_manifest(run, client)
    content = manifest.miss
    content.round = round
    content.hashes.extend(list(hashes)[:HELD_LIMIT])
    content.held.extend(list(held)[:HELD_LIMIT])
    content.SetInParent()
    return closed(manifest)


def unpack_miss(parcel: Parcel, *, run: str, client: int, round: int) -> Miss:
    """
    Raises:
        ForeignError, StaleError: of another run or client, or of another round.
        ParcelError: it is malformed.
    """
    manifest = opened(parcel, "miss")
    check_from(manifest, run, client)
    content = manifest.miss
    check_round(content.round, round)
    hashes = checked_hashes(content.hashes)
    return Miss(client, round, tuple(sorted(hashes)), checked_hashes(content.held))


def pack_failure(*, run: str, client: int, round: int, reason: str) -> Parcel:
    """A client's answer where the work went wrong."""
    manifest = new_manifest(run, client)
    manifest.failure.round = round
    # What cannot be told in UTF-8 is told all the same.
    manifest.failure.reason = reason[:REASON_LIMIT].encode("utf-8", "replace").decode()
    return closed(manifest)


def unpack_failure(parcel: Parcel, *, run: str, client: int, round: int) -> str:
    """The reason.

    Raises:
        ForeignError, StaleError: of another run or client, or of another round.
        ParcelError: it is malformed.
    """
    manifest = opened(parcel, "failure")
    check_from(manifest, run, client)
    check_round(manifest.failure.round, round)
    return str(manifest.failure.reason[:REASON_LIMIT])


# Manifests


def new_manifest(run: str, client: int) -> pb.Manifest:
    check_name("run", run)
    check_number("client", client)
    return pb.Manifest(protocol=PROTOCOL, fedmoe=__version__, run=run, client=client)


def closed(
    manifest: pb.Manifest, groups: Mapping[str, Mapping[str, bytes]] | None = None
) -> Parcel:
    return Parcel(manifest.SerializeToString(deterministic=True), groups or {})


def read_manifest(parcel: Parcel) -> pb.Manifest:
    """The manifest, of our own version; of its groups only that their names are sound.

    Raises:
        VersionError: of another version.
        ParcelError: malformed.
    """
    raw = parcel.manifest
    if len(raw) > MANIFEST_LIMIT:
        raise ParcelError(
            f"a manifest must have at most {MANIFEST_LIMIT} bytes, got {len(raw)}"
        )
    manifest = pb.Manifest()
    try:
        manifest.ParseFromString(raw)
    except DecodeError as why:
        raise ParcelError(f"not a manifest: {why}") from why
    if (manifest.protocol, manifest.fedmoe) != (PROTOCOL, __version__):
        raise VersionError(
            f"the other side speaks protocol {manifest.protocol} of fedmoe "
            f"{manifest.fedmoe[:NAME_LIMIT] or 'unknown'}, this one protocol {PROTOCOL} of fedmoe "
            f"{__version__}; install the same version on both"
        )
    check_name("run", manifest.run)
    check_number("client", manifest.client)
    if manifest.WhichOneof("content") is None:
        raise ParcelError("a manifest must have a content, and this one has none")
    if len(manifest.groups) > GROUPS_LIMIT:
        raise ParcelError(
            f"a manifest must have at most {GROUPS_LIMIT} groups, got {len(manifest.groups)}"
        )
    names: set[str] = set()
    for group in manifest.groups:
        if group.name not in ("shared", "once", "extra"):
            expert_of(group.name)
        if group.name in names:
            raise ParcelError(f"group {group.name!r} must be there once, and is there twice")
        if len(group.sha256) != HASH_BYTES:
            raise ParcelError(f"group {group.name!r} must have a hash of {HASH_BYTES} bytes")
        names.add(group.name)
    travelling = {g.name for g in manifest.groups if not g.held}
    if travelling != set(parcel.groups):
        odd = sorted(travelling ^ set(parcel.groups), key=str)
        raise ParcelError(
            f"groups must be those of the manifest; {str(odd[0])[:NAME_LIMIT]!r} is not in both "
            f"({len(odd)} in all)"
        )
    return manifest


def opened(parcel: Parcel, kind: str) -> pb.Manifest:
    """The manifest of a parcel of this kind."""
    manifest = read_manifest(parcel)
    if (found := manifest.WhichOneof("content")) != kind:
        raise ParcelError(f"a parcel of kind {kind!r} was expected, got {found!r}")
    if kind not in ("assignment", "update") and manifest.groups:
        raise ParcelError(f"a parcel of kind {kind!r} must have no groups")
    return manifest


def expert_of(group: str) -> tuple[str, int, int]:
    """Of "expert.L.E" or "rows.L.E" the word, the layer and the expert."""
    found = _EXPERT.fullmatch(group)
    if found is None:
        raise ParcelError(f"{group[:NAME_LIMIT]!r} is not the name of a group")
    word, layer, expert = found.groups()
    return word, int(layer), int(expert)


def check_from(manifest: pb.Manifest, run: str | None, client: int | None) -> None:
    """Raise ForeignError where the parcel is not of this run and client; None: of any."""
    if run is not None and manifest.run != run:
        raise ForeignError(f"the parcel must be of run {run!r}, got one of {manifest.run!r}")
    if client is not None and manifest.client != client:
        raise ForeignError(
            f"the parcel must be of client {client}, got one of client {manifest.client}"
        )


def check_round(got: int, wanted: int) -> None:
    if got != wanted:
        raise StaleError(f"the parcel must be of round {wanted}, got one of round {got}")


def check_name(what: str, name: str) -> None:
    if len(name) > NAME_LIMIT:
        raise ParcelError(f"{what} must have at most {NAME_LIMIT} characters, got {len(name)}")


def check_number(what: str, value: int) -> None:
    if not 0 <= value <= NUMBER_LIMIT:
        raise ParcelError(f"{what} must be between 0 and {NUMBER_LIMIT}, got {value}")


def checked_hashes(hashes: Iterable[bytes]) -> frozenset[bytes]:
    found = list(hashes)
    if len(found) > HELD_LIMIT or any(len(h) != HASH_BYTES for h in found):
        raise ParcelError(
            f"hashes must be at most {HELD_LIMIT} of {HASH_BYTES} bytes each, got {len(found)}"
        )
    return frozenset(found)
