"""Any exchange, but with all that passes turned into the bytes that would travel, and back.

So a run in one process shows what codecs do to its accuracy and its traffic; what it runs is the
same code that server and clients run as processes of their own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

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
    parcel_bytes,
    unpack_failure,
    unpack_miss,
)

CODING = 2  # keys the generator that rounds a client's update
AT_ONCE = 32  # clients whose unpacked assignments are in memory together

Watch = Callable[[int, str, Parcel], None]  # a client, "down" or "up", and what travels


def coding_generator(seed: int, round: int, client: int) -> torch.Generator:
    """What the rounding of this client's update in this round is drawn from."""
    return torch_generator(seed, round, client, CODING)


@dataclass
class ParcelTraffic:
    """Bytes of all parcels that it was told of; `take` gives those since it was last called."""

    down: int = 0
    up: int = 0

    def watch(self, client: int, way: str, parcel: Parcel) -> None:
        size = parcel_bytes(parcel)
        if way == "down":
            self.down += size
        else:
            self.up += size

    def take(self) -> tuple[int, int]:
        """Bytes down and up."""
        taken = self.down, self.up
        self.down = self.up = 0
        return taken


@dataclass(eq=False, kw_only=True)
class ParcelExchange:
    """An exchange that hands every assignment and every update on as a parcel.

    With codecs that are exact the run is the same, bit for bit.

    Attributes:
        exchange: carries what clients have unpacked; it answers for each of them at most once.
        caches: where a client keeps what it has seen.
        feedback: where clients keep what their codec left out; needed where it leaves out any.
        watch: told of every parcel.

    Raises:
        ValueError: the codec on the way up leaves out something, and there is no `feedback`.
    """

    exchange: Exchange = field(kw_only=False)
    run: str
    seed: int
    down: Codecs = RAW
    up: Codecs = RAW
    caches: Callable[[int], ExpertCache | None] = lambda client: None
    feedback: PersonalStore | None = None
    watch: Watch = lambda client, way, parcel: None

    def __post_init__(self) -> None:
        if self.feedback is None and self.up.remembers:
            raise ValueError(
                f"feedback must not be None for codecs that leave something out, got {self.up}"
            )
        self._known: dict[int, frozenset[bytes]] = {}  # by client, what its cache holds

    def __call__(
        self, assignments: Mapping[int, Assignment]
    ) -> Iterator[ClientUpdate | ClientFailure]:
        memo: Memo = {}
        todo = iter(assignments.items())
        while group := dict(islice(todo, AT_ONCE)):
            delivered: dict[int, tuple[Received, bytes]] = {}
            for client, assignment in group.items():
                try:
                    delivered[client] = self._deliver(client, assignment, memo)
                except ValueError as why:
                    yield _failure(client, why)
            work = {client: received.assignment for client, (received, _) in delivered.items()}
            for reply in self.exchange(work):
                client = reply.client
                try:
                    yield self._hand_back(reply, group[client], *delivered.pop(client))
                except ValueError as why:
                    yield _failure(client, why)

    def send(self, assignments: Mapping[int, Assignment]) -> None:
        """Send assignments down, and wait for no answer; see `federated.rounds`."""
        memo: Memo = {}
        for client, assignment in assignments.items():
            known = self._known.get(client, frozenset())
            self.watch(client, "down", self._packed(client, assignment, known, memo))

    def _packed(
        self, client: int, assignment: Assignment, known: frozenset[bytes], memo: Memo
    ) -> Parcel:
        return pack_assignment(
            assignment,
            run=self.run,
            client=client,
            known=known,
            codecs=self.down,
            reply=self.up,
            memo=memo,
        )

    def _deliver(
        self, client: int, assignment: Assignment, memo: Memo
    ) -> tuple[Received, bytes]:
        """What the client has when it has all, and the base of what it was sent."""
        run, cache = self.run, self.caches(client)
        for known in (self._known.get(client, frozenset()), frozenset[bytes]()):
            parcel = self._packed(client, assignment, known, memo)
            self.watch(client, "down", parcel)
            try:
                received = unpack_assignment(parcel, run=run, client=client, cache=cache)
                return received, base_of(parcel)
            except MissingError as missing:
                miss = pack_miss(
                    run=run, client=client, round=assignment.round, hashes=missing.hashes
                )
                self.watch(client, "up", miss)
                unpack_miss(miss, run=run, client=client, round=assignment.round)
        raise AssertionError("a parcel with all groups in it lacks none")

    def _hand_back(
        self,
        reply: ClientUpdate | ClientFailure,
        assignment: Assignment,
        received: Received,
        base: bytes,
    ) -> ClientUpdate | ClientFailure:
        """What the server has of a client's answer to this assignment."""
        run, client, round = self.run, reply.client, assignment.round
        if isinstance(reply, ClientFailure):
            failure = pack_failure(run=run, client=client, round=round, reason=reply.reason)
            self.watch(client, "up", failure)
            reason = unpack_failure(failure, run=run, client=client, round=round)
            return ClientFailure(client, reason)
        store = self.feedback if assignment.job is Job.TRAIN else None
        parcel, left = pack_update(
            reply,
            received,
            generator=coding_generator(self.seed, round, client),
            feedback=None if store is None else store.load(client, round),
            cache=self.caches(client),
        )
        if store is not None and left is not None:
            store.save(client, round, left)
        self.watch(client, "up", parcel)
        back = unpack_update(parcel, assignment, run=run, client=client, base=base)
        self._known[client] = back.held
        return back.update


def _failure(client: int, why: ValueError) -> ClientFailure:
    return ClientFailure(client, f"{type(why).__name__}: {why}")
