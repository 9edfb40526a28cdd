"""Assignments and updates as parcels, and back, with every check before anything is used.

A client that holds a group already is sent its hash alone. An update may travel as the difference
from what was sent; the server adds it to what it sent before that was coded, so the error of one
way does not add to that of the other.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe.types import (
    ActivationProfile,
    Assignment,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
    State,
    SubMoE,
)
from fedmoe.wire import manifest_pb2 as pb
from fedmoe.wire.cache import ExpertCache
from fedmoe.wire.codecs import BF16, Codec, Int8, Raw, TopK
from fedmoe.wire.groups import Sealed, check_sealed, decoded_bytes, seal, unseal
from fedmoe.wire.parcel import (
    GROUPS_LIMIT,
    HELD_LIMIT,
    LAYER_LIMIT,
    MissingError,
    Parcel,
    ParcelError,
    StaleError,
    base_of_groups,
    check_from,
    check_name,
    check_number,
    check_round,
    checked_hashes,
    closed,
    expert_of,
    new_manifest,
    opened,
)

ROUND_LIMIT = 2**31
TABLE_LIMIT = 2**20  # numbers in a table of a profile
METRICS_LIMIT = 1024
DECODED_LIMIT = 16 * 2**30  # bytes; a client with less memory says less

_JOBS = {
    Job.TRAIN: pb.TRAIN,
    Job.SCOUT: pb.SCOUT,
    Job.EVALUATE: pb.EVALUATE,
    Job.SERVE: pb.SERVE,
}
_JOB_OF = {number: job for job, number in _JOBS.items()}
_EXACT = Raw()


@dataclass(frozen=True)
class Codecs:
    """How the shared parameters and how the experts travel one way; all else travels raw."""

    shared: Codec = _EXACT
    experts: Codec = _EXACT

    @staticmethod
    def of(codec: Codec) -> "Codecs":
        """The same for both."""
        return Codecs(codec, codec)

    @property
    def remembers(self) -> bool:
        """Whether anything is left out that must be kept: so it is for updates only."""
        return self.shared.remembers or self.experts.remembers


RAW = Codecs()

# Groups that were sealed in this round, by the tensors in them: equal parts of several clients
# are sealed once, and their bytes are the same objects.
Memo = dict[tuple[object, ...], tuple[State, Sealed]]


@dataclass(frozen=True, eq=False)
class Received:
    """What a client unpacks. `codecs` are those that its update is to have."""

    assignment: Assignment
    run: str
    client: int
    base: bytes  # hash of all that it was sent
    codecs: Codecs
    exact: SubMoE = frozenset()  # experts that came as the server has them, bit for bit


@dataclass(frozen=True, eq=False)
class Reply:
    """What the server unpacks: the update, and what is in that client's cache, by hash."""

    update: ClientUpdate
    held: frozenset[bytes]


# Down


def pack_assignment(
    assignment: Assignment,
    *,
    run: str,
    client: int,
    known: Collection[bytes] = (),
    codecs: Codecs = RAW,
    reply: Codecs = RAW,
    memo: Memo | None = None,
) -> Parcel:
    """One message down.

    Args:
        known: hashes that the client is known to hold; such groups carry no bytes. A group that
            it holds exactly is named so even where the codec has an error.
        codecs: of the way down; differences (TopK) make no sense there.
        reply: of the way up.
        memo: keep one per round, and pass it for every client: then equal groups are encoded
            once. Tensors must not change in between.

    Raises:
        ValueError: a tensor cannot travel so, or a number of the assignment is out of range.
    """
    for codec in (codecs.shared, codecs.experts):
        if codec.remembers:
            raise ValueError(f"codecs must not be {codec}: it is for differences, so for updates")
    manifest = new_manifest(run, client)
    content = manifest.assignment
    check_number("round", assignment.round)
    content.round = assignment.round
    content.job = _JOBS[assignment.job]
    content.validate, content.evaluate = assignment.validate, assignment.evaluate
    if assignment.choose is not None:
        content.choose = assignment.choose
    for e in sorted(assignment.sub_moe):
        content.sub_moe.add(layer=e.layer, expert=e.expert)
    content.reply_shared.CopyFrom(_codec_message(reply.shared))
    content.reply_experts.CopyFrom(_codec_message(reply.experts))
    memo = {} if memo is None else memo
    travelling = {}
    for name, state in _groups_of(assignment):
        sealed = _sealed(state, _codec_for(name, codecs), memo)
        if known and sealed.hash not in known:
            exact = _sealed(state, Raw(), memo)
            sealed = exact if exact.hash in known else sealed
        if sealed.hash in known:
            manifest.groups.add(name=name, sha256=sealed.hash, held=True)
        else:
            _add(manifest, name, sealed)
            travelling[name] = sealed.raws
    return closed(manifest, travelling)


def unpack_assignment(
    parcel: Parcel,
    *,
    run: str | None,
    client: int,
    cache: ExpertCache | None = None,
    limit_bytes: int = DECODED_LIMIT,
) -> Received:
    """Check and decode what a client was sent; what it may need again goes into the cache.

    Args:
        run: None: any.
        limit_bytes: that the decoded tensors may take in memory.

    Raises:
        ForeignError: of another run or client.
        MissingError: the cache lacks a group that was named by its hash alone.
        ParcelError: anything else is wrong with it. The cache is unchanged.
    """
    manifest = opened(parcel, "assignment")
    check_from(manifest, run, client)
    content = manifest.assignment
    check_number("round", content.round)
    if content.round > ROUND_LIMIT:
        raise ParcelError(f"round must be at most {ROUND_LIMIT}, got {content.round}")
    if content.job not in _JOB_OF:
        raise ParcelError(f"job must be one of {sorted(_JOB_OF)}, got {content.job}")
    if content.HasField("choose") and not 1 <= content.choose <= LAYER_LIMIT:
        raise ParcelError(f"choose must be between 1 and {LAYER_LIMIT}, got {content.choose}")
    if len(content.sub_moe) > GROUPS_LIMIT:
        raise ParcelError(f"sub_moe must have at most {GROUPS_LIMIT} experts")
    sub_moe = frozenset(ExpertId(e.layer, e.expert) for e in content.sub_moe)
    if len(sub_moe) != len(content.sub_moe):
        raise ParcelError("sub_moe must name every expert once")
    if far := [e for e in sub_moe if max(e) >= LAYER_LIMIT]:
        raise ParcelError(f"layers and experts must be below {LAYER_LIMIT}, got {max(far)}")
    codecs = Codecs(_codec_of(content.reply_shared), _codec_of(content.reply_experts))
    sealed = _found(manifest, parcel, cache)
    _check_room(sealed, limit_bytes)
    states = {name: _unsealed(name, group) for name, group in sealed.items()}
    if cache is not None:
        for name, group in sealed.items():
            if name != "extra":
                cache.put(group)
    assignment = Assignment(
        content.round,
        MoEState(states.get("shared", {}), _by_expert(states, "expert")),
        sub_moe,
        _JOB_OF[content.job],
        content.validate,
        content.evaluate,
        _by_expert(states, "rows"),
        states.get("once", {}),
        states.get("extra", {}),
        content.choose if content.HasField("choose") else None,
    )
    exact = frozenset(
        e
        for e in assignment.model.experts
        if all(t.encoding == pb.RAW for t in sealed[_name_of(e)].meta.tensors)
    )
    base = base_of_groups(manifest.groups)
    return Received(assignment, manifest.run, manifest.client, base, codecs, exact)


# Up


def pack_update(
    update: ClientUpdate,
    received: Received,
    *,
    generator: torch.Generator | None = None,
    feedback: MoEState | None = None,
    cache: ExpertCache | None = None,
) -> tuple[Parcel, MoEState | None]:
    """One message up, coded as the server asked for, and what its codec left out.

    Args:
        generator: for codecs that round by chance; None: to the nearest.
        feedback: what was left out last time, as given back then; None at first. It stays on the
            client, which keeps what it is given back for the next time.
        cache: whose hashes are reported, so that the server need not send what is there. Experts
            go into it as the server will have them: one that no other client trains comes back
            without a byte.

    Raises:
        ValueError: a tensor cannot travel so, for instance because it is not finite.
    """
    manifest = new_manifest(received.run, update.client)
    content = manifest.update
    content.round, content.base = received.assignment.round, received.base
    check_number("num_examples", update.num_examples)
    content.num_examples = update.num_examples
    _write_profile(update.profile, content.profile)
    for name in sorted(update.metrics):
        content.metrics.add(name=name, value=update.metrics[name])
    sent = received.assignment.model
    owed = MoEState({}, {}) if feedback is None else feedback
    left_shared: State = owed.shared
    left_experts = dict(owed.experts)
    travelling = {}
    if update.model.shared:
        sealed, left = seal(
            update.model.shared, received.codecs.shared, generator, sent.shared, owed.shared
        )
        left_shared = {**left_shared, **left}
        _add(manifest, "shared", sealed)
        travelling["shared"] = sealed.raws
    for e in sorted(update.model.experts):
        sealed, left = seal(
            update.model.experts[e],
            received.codecs.experts,
            generator,
            sent.experts.get(e),
            owed.experts.get(e),
        )
        if left:
            left_experts[e] = {**left_experts.get(e, {}), **left}
        if cache is not None and e in received.exact:
            cache.put(seal(unseal(sealed.meta, sealed.raws, sent.experts[e]), Raw())[0])
        _add(manifest, _name_of(e), sealed)
        travelling[_name_of(e)] = sealed.raws
    if update.extra:
        sealed, _ = seal(update.extra, Raw(), base=received.assignment.extra)
        _add(manifest, "extra", sealed)
        travelling["extra"] = sealed.raws
    content.held.extend(() if cache is None else cache.held()[:HELD_LIMIT])
    left_out = MoEState(left_shared, left_experts)
    return closed(manifest, travelling), left_out if left_shared or left_experts else None


def unpack_update(
    parcel: Parcel, sent: Assignment, *, run: str, client: int, base: bytes | None = None
) -> Reply:
    """Check and decode what a client sent back.

    What comes is not yet what may be folded: `federated.check.check_update` says that.

    Args:
        sent: what this client was assigned in this round, before any coding.
        base: `base_of` the parcel that it was sent; None: not looked at.

    Raises:
        ForeignError: of another run or client.
        StaleError: of another round, or an answer to other values than were sent.
        ParcelError: anything else is wrong with it.
    """
    manifest = opened(parcel, "update")
    check_from(manifest, run, client)
    content = manifest.update
    check_round(content.round, sent.round)
    if base is not None and content.base != base:
        raise StaleError("the parcel answers other values than this round's")
    check_number("num_examples", content.num_examples)
    profile = _read_profile(content.profile)
    metrics = _read_metrics(content.metrics)
    held = checked_hashes(content.held)
    wanted = {n: s for n, s in _groups_of(sent) if n.startswith(("shared", "expert.", "extra"))}
    for group in manifest.groups:
        if group.held:
            raise ParcelError(f"group {group.name!r} must come with an update")
        if group.name not in wanted:
            raise ParcelError(f"group {group.name!r} was not sent to client {client}")
    states = {
        name: _unsealed(name, group, wanted[name])
        for name, group in _found(manifest, parcel, None).items()
    }
    model = MoEState(states.get("shared", {}), _by_expert(states, "expert"))
    update = ClientUpdate(
        client, content.num_examples, model, profile, metrics, states.get("extra", {})
    )
    return Reply(update, held)


# Groups


def _groups_of(a: Assignment) -> Iterator[tuple[str, State]]:
    """In a fixed order; states without a tensor are left out, but for an expert's."""
    for name, state in (("shared", a.model.shared), ("once", a.once), ("extra", a.extra)):
        if state:
            yield name, state
    for word, experts in (("expert", a.model.experts), ("rows", a.absent_rows)):
        for e in sorted(experts):
            yield f"{word}.{e.layer}.{e.expert}", experts[e]


def _name_of(e: ExpertId) -> str:
    return f"expert.{e.layer}.{e.expert}"


def _codec_for(group: str, codecs: Codecs) -> Codec:
    if group == "shared":
        return codecs.shared
    return codecs.experts if group.startswith("expert.") else Raw()


def _sealed(state: State, codec: Codec, memo: Memo) -> Sealed:
    key = (codec, *((name, id(state[name])) for name in sorted(state)))
    if key not in memo:
        # The state is kept with it, so that no other tensor can get the same id.
        memo[key] = dict(state), seal(state, codec)[0]
    return memo[key][1]


def _add(manifest: pb.Manifest, name: str, sealed: Sealed) -> None:
    group = manifest.groups.add()
    group.CopyFrom(sealed.meta)
    group.name = name


def _found(
    manifest: pb.Manifest, parcel: Parcel, cache: ExpertCache | None
) -> dict[str, Sealed]:
    """All groups, checked against what the manifest says of them; nothing is decoded yet."""
    found, missing = {}, []
    for group in manifest.groups:
        if not group.held:
            sealed = Sealed(group, parcel.groups[group.name])
            try:
                check_sealed(sealed.meta, sealed.raws)
            except ParcelError as why:
                raise ParcelError(f"group {group.name!r}: {why}") from why
            found[group.name] = sealed
            continue
        if len(group.tensors):
            raise ParcelError(f"group {group.name!r} is named by hash and must have no tensors")
        cached = None if cache is None else cache.get(group.sha256)
        if cached is None:
            missing.append(group.sha256)
        else:
            found[group.name] = cached
    if missing:
        raise MissingError(missing)
    return found


def _check_room(sealed: Mapping[str, Sealed], limit_bytes: int) -> None:
    needed = sum(decoded_bytes(group.meta) for group in sealed.values())
    if needed > limit_bytes:
        raise ParcelError(f"must take at most {limit_bytes} bytes once decoded, got {needed}")


def _unsealed(name: str, group: Sealed, base: State | None = None) -> dict[str, Tensor]:
    try:
        return unseal(group.meta, group.raws, base)
    except ParcelError as why:
        raise ParcelError(f"group {name!r}: {why}") from why


def _by_expert(states: Mapping[str, State], word: str) -> dict[ExpertId, State]:
    experts: dict[ExpertId, State] = {}
    for name, state in states.items():
        if "." in name:
            found, layer, expert = expert_of(name)
            if found == word:
                experts[ExpertId(layer, expert)] = state
    return experts


# Profile, metrics and codecs


def _write_profile(p: ActivationProfile, content: pb.Profile) -> None:
    content.layers, content.experts = p.count_LE.shape
    content.count.extend(p.count_LE.flatten().tolist())
    content.weight.extend(p.weight_LE.flatten().tolist())
    content.score.extend(p.score_LE.flatten().tolist())
    content.token.extend(p.token_L.tolist())


def _read_profile(content: pb.Profile) -> ActivationProfile:
    shape = content.layers, content.experts
    size = content.layers * content.experts
    if size > TABLE_LIMIT or max(shape) > TABLE_LIMIT:
        raise ParcelError(
            f"a profile's tables must have at most {TABLE_LIMIT} numbers, got {size} for "
            f"{shape[0]} layers of {shape[1]} experts"
        )
    wanted = {"count": size, "weight": size, "score": size, "token": content.layers}
    for name, length in wanted.items():
        if (got := len(getattr(content, name))) != length:
            raise ParcelError(f"a profile's {name} must have {length} numbers, got {got}")
    count_LE, token_L = (
        torch.tensor(list(v), dtype=torch.int64) for v in (content.count, content.token)
    )
    weight_LE, score_LE = (
        torch.tensor(list(v), dtype=torch.float64) for v in (content.weight, content.score)
    )
    for name, table in (("weight", weight_LE), ("score", score_LE)):
        if not bool(table.isfinite().all()):
            raise ParcelError(f"a profile's {name} must be finite")
    if any(bool((table < 0).any()) for table in (count_LE, token_L, weight_LE, score_LE)):
        raise ParcelError("a profile must not have a negative number")
    return ActivationProfile(
        count_LE.reshape(shape), weight_LE.reshape(shape), score_LE.reshape(shape), token_L
    )


def _read_metrics(metrics: Collection[pb.Metric]) -> dict[str, float]:
    if len(metrics) > METRICS_LIMIT:
        raise ParcelError(f"there must be at most {METRICS_LIMIT} metrics, got {len(metrics)}")
    read: dict[str, float] = {}
    for metric in metrics:
        check_name("a metric's name", metric.name)
        if metric.name in read:
            raise ParcelError(f"metric {metric.name!r} must be there once, and is there twice")
        if not math.isfinite(metric.value):
            raise ParcelError(f"metric {metric.name!r} must be finite, got {metric.value}")
        read[metric.name] = metric.value
    return read


def _codec_message(codec: Codec) -> pb.Codec:
    message = pb.Codec()
    match codec:
        case Raw():
            pass
        case BF16():
            message.bf16.SetInParent()
        case Int8(block, levels, zstd):
            message.int8.block, message.int8.levels, message.int8.zstd = block, levels, zstd
        case TopK(share):
            message.top_k.share = share
    return message


def _codec_of(message: pb.Codec) -> Codec:
    try:
        match message.WhichOneof("kind"):
            case "bf16":
                return BF16()
            case "int8":
                return Int8(message.int8.block, message.int8.levels, message.int8.zstd)
            case "top_k":
                return TopK(message.top_k.share)
    except ValueError as why:
        raise ParcelError(f"a codec's {why}") from why
    return Raw()
