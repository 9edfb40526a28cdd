"""Any exchange, but with all that passes turned into the bytes that would travel, and back.

So a run in one process shows what codecs do to its accuracy and its traffic; what it runs is the
same code that server and clients run as processes of their own.
"""

from collections.abc import Callable, Iterator, Mapping

import torch

from fedmoe.exchange.personal import PersonalStore
from fedmoe.rng import torch_generator
from fedmoe.types import Assignment, ClientFailure, ClientUpdate, Exchange, Job
from fedmoe.wire.cache import ExpertCache
from fedmoe.wire.packing import (
    RAW,
    Codecs,
    Memo,
    Received,
    pack_assignment,
    pack_update,
    unpack_assignment,
    unpack_update,
)
from fedmoe.wire.parcel import (
    MissingError,
    Parcel,
    base_of,
    pack_failure,
    pack_miss,
    unpack_failure,
    unpack_miss,
)

CODING = 2  # keys the generator that rounds a client's update

Watch = Callable[[int, str, Parcel], None]  # a client, "down" or "up", and what travels


def coding_generator(seed: int, round: int, client: int) -> torch.Generator:
    """What the rounding of this client's update in this round is drawn from."""
    return torch_generator(seed, round, client, CODING)


def through_parcels(
    exchange: Exchange,
    *,
    run: str,
    seed: int,
    down: Codecs = RAW,
    up: Codecs = RAW,
    caches: Callable[[int], ExpertCache | None] = lambda client: None,
    feedback: PersonalStore | None = None,
    watch: Watch = lambda client, way, parcel: None,
) -> Exchange:
    """An exchange that hands every assignment and every update on as a parcel.

    With codecs that are exact the run is the same, bit for bit.

    Args:
        caches: where a client keeps what it has seen.
        feedback: where clients keep what their codec left out; needed where it leaves out any.
        watch: told of every parcel.

    Raises:
        ValueError: the codec on the way up leaves out something, and there is no `feedback`.
    """
    if feedback is None and (up.shared.remembers or up.experts.remembers):
        raise ValueError(f"feedback must not be None for codecs that leave something out, got {up}")
    known: dict[int, frozenset[bytes]] = {}

    def deliver(client: int, assignment: Assignment, memo: Memo) -> tuple[Received, bytes]:
        """What the client has when it has all, and the base of what it was sent."""
        cache = caches(client)
        for held in (known.get(client, frozenset()), frozenset[bytes]()):
            parcel = pack_assignment(
                assignment, run=run, client=client, known=held, codecs=down, reply=up, memo=memo
            )
            watch(client, "down", parcel)
            try:
                received = unpack_assignment(parcel, run=run, client=client, cache=cache)
                return received, base_of(parcel)
            except MissingError as missing:
                miss = pack_miss(
                    run=run, client=client, round=assignment.round, hashes=missing.hashes
                )
                watch(client, "up", miss)
                unpack_miss(miss, run=run, client=client, round=assignment.round)
        raise AssertionError("a parcel with all groups in it lacks none")

    def answer(
        client: int, assignment: Assignment, memo: Memo
    ) -> ClientUpdate | ClientFailure:
        received, base = deliver(client, assignment, memo)
        round = assignment.round
        [reply] = exchange({client: received.assignment})
        if isinstance(reply, ClientFailure):
            failure = pack_failure(run=run, client=client, round=round, reason=reply.reason)
            watch(client, "up", failure)
            reason = unpack_failure(failure, run=run, client=client, round=round)
            return ClientFailure(client, reason)
        remembers = feedback is not None and assignment.job is Job.TRAIN
        owed = feedback.load(client, round) if feedback is not None and remembers else None
        parcel, left = pack_update(
            reply,
            received,
            generator=coding_generator(seed, round, client),
            feedback=owed,
            cache=caches(client),
        )
        if feedback is not None and remembers and left is not None:
            feedback.save(client, round, left)
        watch(client, "up", parcel)
        back = unpack_update(parcel, assignment, run=run, client=client, base=base)
        known[client] = back.held
        return back.update

    def through(
        assignments: Mapping[int, Assignment],
    ) -> Iterator[ClientUpdate | ClientFailure]:
        memo: Memo = {}
        for client, assignment in assignments.items():
            try:
                reply = answer(client, assignment, memo)
            except ValueError as why:
                reply = ClientFailure(client, f"{type(why).__name__}: {why}")
            yield reply

    return through
