"""The server's side: assignments go out as messages, updates come back as they arrive.

In place of Flower's `send_and_receive`, which sleeps three seconds at a time and keeps all replies
until the last one is there: replies are pulled and decoded one at a time.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from flwr.app import DEFAULT_TTL, Error, Message, MessageType
from flwr.serverapp import Grid

from fedmoe.exchange.flower.events import Event, OnEvent, ignore
from fedmoe.exchange.flower.policy import PATIENT, QuorumError, RoundPolicy
from fedmoe.exchange.flower.post import BROKEN, FAILED, WORK, Post, PostError
from fedmoe.exchange.flower.pulling import Puller
from fedmoe.exchange.flower.records import Made, content_of, post_of
from fedmoe.exchange.flower.roster import Member, Roster
from fedmoe.types import Assignment, ClientFailure, ClientUpdate, Exchange, Job
from fedmoe.wire.packing import RAW, Codecs, Memo, pack_assignment, unpack_update
from fedmoe.wire.parcel import (
    Parcel,
    ParcelError,
    StaleError,
    base_of,
    kind_of,
    parcel_bytes,
    unpack_failure,
    unpack_miss,
)

NODE_UNAVAILABLE = 5  # Flower's code for a node that is not there
REQUESTS = 64  # at most, in a look at all messages that are under way
LATE = 256  # messages of earlier rounds whose replies are still looked for
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.2  # between two looks at which nothing had come
TELL_S = 60.0  # between two events that tell for whom is waited
OF_JOB = {
    Job.TRAIN: MessageType.TRAIN,
    Job.SCOUT: MessageType.QUERY,
    Job.EVALUATE: MessageType.EVALUATE,
    Job.SERVE: MessageType.EVALUATE,
}


@dataclass(frozen=True)
class Sent:
    """A message that is under way."""

    client: int
    node: int
    since: str
    round: int
    base: bytes


def flower_exchange(
    grid: Grid,
    roster: Roster,
    *,
    guests: Collection[int] = (),
    policy: RoundPolicy = PATIENT,
    down: Codecs = RAW,
    up: Codecs = RAW,
    on_event: OnEvent = ignore,
    on_client: Callable[[int], None] = lambda client: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Exchange:
    """An exchange with the clients of a roster.

    Every client is sent its assignment once it is there. Where its process breaks, or its node
    goes and comes back, it is sent the same again; only its first good answer counts, and every
    other message is refused by name in an event. An answer that is malformed, stale or foreign is
    its client's failure in that round.

    Args:
        guests: clients that never train: what they answer changes nothing, so a run neither fails
            for want of them nor waits without end.
        down, up: in what form assignments and updates travel.
        on_client: told of each client that has answered, or will not.
    """
    late: dict[str, Sent] = {}
    puller = Puller(grid)

    def exchange(assignments: Mapping[int, Assignment]) -> Iterator[ClientUpdate | ClientFailure]:
        if not assignments:
            return
        round = _Round(
            grid,
            puller,
            roster,
            guests,
            assignments,
            policy,
            down,
            up,
            on_event,
            late,
            clock,
            sleep,
        )
        for reply in round.replies():
            client = reply.client
            yield reply
            del reply  # before the next one is decoded
            on_client(client)
        late.update(round.out)
        for message_id in list(late)[:-LATE]:
            del late[message_id]

    return exchange


@dataclass
class _Round:
    """One call of an exchange: who is waited for, and what is under way."""

    grid: Grid
    puller: Puller
    roster: Roster
    guests: Collection[int]
    assignments: Mapping[int, Assignment]
    policy: RoundPolicy
    down: Codecs
    up: Codecs
    on_event: OnEvent
    late: dict[str, Sent]
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    waiting: set[int] = field(default_factory=set)
    updates: int = 0
    out: dict[str, Sent] = field(default_factory=dict)  # by the message's id
    latest: dict[int, Sent] = field(default_factory=dict)  # each client's, if it is good still
    in_full: set[int] = field(default_factory=set)  # who must be sent every group
    tries: Counter[int] = field(default_factory=Counter)
    not_before: dict[int, float] = field(default_factory=dict)
    begun: float = 0.0
    told: float = 0.0
    memo: Memo = field(default_factory=dict)
    made: Made = field(default_factory=dict)
    lost: list[ClientFailure] = field(default_factory=list)  # who could not be sent anything

    @property
    def number(self) -> int:
        return next(iter(self.assignments.values())).round

    def replies(self) -> Iterator[ClientUpdate | ClientFailure]:
        self.waiting = set(self.assignments)
        self.begun = self.told = self.clock()
        pause = FIRST_PAUSE_S
        while self.waiting:
            self.roster.look()
            self._send()
            before = len(self.out) + len(self.late)
            yield from self._pulled()
            if self.updates >= math.ceil(self.policy.enough * len(self.assignments)):
                break
            yield from self._given_up()
            if self._overdue():
                break
            moved = len(self.out) + len(self.late) != before
            pause = FIRST_PAUSE_S if moved else min(pause * 1.5, LONGEST_PAUSE_S)
            if self.waiting:
                self._tell()
                self.sleep(pause)
        self._check_quorum()
        for client in sorted(self.waiting):
            seconds = self.clock() - self.begun
            yield self._failure(client, f"no answer within {seconds:.0f} s")

    # Down

    def _send(self) -> None:
        for client in sorted(self.waiting):
            member = self.roster.reachable(client)
            if member is None:
                continue
            last = self.latest.get(client)
            if last is not None and (last.node, last.since) == (member.node.id, member.node.since):
                continue
            if self.clock() < self.not_before.get(client, self.begun):
                continue
            if last is not None:  # what was sent is lost with the process that had it
                self._event("retried", client, "its node was started anew")
            self._send_to(member)
        if all(client in self.latest for client in self.waiting):
            self.memo, self.made = {}, {}  # no need of what all share until somebody is asked again

    def _send_to(self, member: Member) -> None:
        client, assignment = member.client, self.assignments[member.client]
        parcel = pack_assignment(
            assignment,
            run=self.roster.terms.run,
            client=client,
            known=() if client in self.in_full else member.held,
            codecs=self.down,
            reply=self.up,
            memo=self.memo,
        )
        post = Post(WORK, self.roster.terms.text, parcel.manifest, parcel.groups)
        message = Message(
            content_of(post, self.made),
            dst_node_id=member.node.id,
            message_type=OF_JOB[assignment.job],
            ttl=max(DEFAULT_TTL, 2 * (self.policy.deadline_s or 0)),
            group_id=str(assignment.round),
        )
        for message_id in self.grid.push_messages([message]):
            if message_id:
                sent = Sent(
                    client, member.node.id, member.node.since, assignment.round, base_of(parcel)
                )
                self.out[message_id] = self.latest[client] = sent
                self._event("sent", client, "", member.node.id, parcel_bytes(parcel))
                return
        failure = self._again(client, "Flower did not take the message")
        if failure is not None:
            self.lost.append(failure)

    # Up

    def _pulled(self) -> Iterator[ClientUpdate | ClientFailure]:
        """What has come, a few messages at a time: of up to 64 under way one at a time."""
        yield from self._outcomes(self.puller.finished())
        busy = self.puller.busy
        ids = iter([i for i in (*self.out, *self.late) if i not in busy])
        size = 1 + (len(self.out) + len(self.late)) // REQUESTS
        while some := list(islice(ids, size)):
            yield from self._outcomes(self.puller.pull(some))

    def _outcomes(self, messages: list[Message]) -> Iterator[ClientUpdate | ClientFailure]:
        while messages:
            reply = self._taken(messages.pop(0))
            if reply is not None:
                self.waiting.discard(reply.client)
                self.latest.pop(reply.client, None)
                yield reply
            del reply

    def _taken(self, message: Message) -> ClientUpdate | ClientFailure | None:
        message_id = message.metadata.reply_to_message_id
        sent = self.out.pop(message_id, None)
        if sent is None:
            self._too_late(message, self.late.pop(message_id, None))
            return None
        if sent.client not in self.waiting:
            if not message.has_error():
                self._event(
                    "refused",
                    sent.client,
                    f"duplicate: it has answered round {sent.round} already",
                    sent.node,
                )
            return None
        if message.has_error():
            return self._broke(sent, message.error)
        if message.metadata.src_node_id != sent.node:
            return self._refused(
                sent,
                f"foreign: node {message.metadata.src_node_id} answers what node {sent.node} "
                "was asked",
            )
        try:
            return self._read(sent, post_of(message.content, empty=True))
        except StaleError as why:
            return self._refused(sent, f"stale: {why}")
        except (ParcelError, PostError) as why:
            return self._refused(sent, f"{type(why).__name__}: {why}")

    def _read(self, sent: Sent, post: Post) -> ClientUpdate | ClientFailure | None:
        client, run = sent.client, self.roster.terms.run
        if post.kind == FAILED:
            return self._failure(client, post.text)
        if post.kind == BROKEN:
            return self._again(client, post.text, sent)
        parcel = Parcel(post.manifest, post.groups)
        kind, nbytes = kind_of(parcel), parcel_bytes(parcel)
        if kind == "failure":
            reason = unpack_failure(parcel, run=run, client=client, round=sent.round)
            return self._failure(client, reason)
        if kind == "miss":
            miss = unpack_miss(parcel, run=run, client=client, round=sent.round)
            self._event("missed", client, f"lacks {len(miss.hashes)} groups", sent.node, nbytes)
            if client in self.in_full:
                return self._refused(sent, "lacks groups that it was just sent")
            self.in_full.add(client)
            self.roster.heard(client, miss.held)
            if self.latest.get(client) is sent:
                del self.latest[client]
            return None
        reply = unpack_update(
            parcel, self.assignments[client], run=run, client=client, base=sent.base
        )
        self.roster.heard(client, reply.held)
        self.updates += 1
        self._event("replied", client, "", sent.node, nbytes)
        return reply.update

    def _too_late(self, message: Message, sent: Sent | None) -> None:
        """Name a reply to what this round did not send."""
        node = message.metadata.src_node_id
        if sent is None:
            self._event("refused", None, "foreign: it answers what was never sent", node)
        elif not message.has_error():
            self._event("refused", sent.client, f"stale: it answers round {sent.round}", node)

    def _broke(self, sent: Sent, error: Error) -> ClientFailure | None:
        why = f"error {error.code}: {error.reason}"
        if error.code == NODE_UNAVAILABLE:  # it is sent the same again when it is back
            if self.latest.get(sent.client) is sent:
                del self.latest[sent.client]
                self.not_before[sent.client] = self.clock() + self.policy.retry_s
                self._event("retried", sent.client, why, sent.node)
            return None
        return self._again(sent.client, why, sent)

    def _again(self, client: int, why: str, sent: Sent | None = None) -> ClientFailure | None:
        """Ask once more, or give up."""
        if sent is not None and self.latest.get(client) is not sent:
            return None  # it has been asked again already
        self.latest.pop(client, None)
        self.tries[client] += 1
        if self.tries[client] > self.policy.retries:
            return self._failure(client, f"{why} (asked {self.tries[client]} times)")
        wait_s = self.policy.retry_s * 2 ** (self.tries[client] - 1)
        self.not_before[client] = self.clock() + wait_s
        self._event("retried", client, why, None if sent is None else sent.node)
        return None

    # Ends

    def _given_up(self) -> Iterator[ClientFailure]:
        """Who is not there and whose answer changes nothing is not waited for without end."""
        while self.lost:
            failure = self.lost.pop()
            self.waiting.discard(failure.client)
            yield failure
        if self.clock() - self.begun < self.policy.absent_s:
            return
        for client in sorted(self.waiting):
            if self._trains(client) or self.roster.reachable(client) is not None:
                continue
            self.waiting.discard(client)
            self.latest.pop(client, None)
            yield self._failure(client, "is not there")

    def _overdue(self) -> bool:
        deadline_s = self.policy.deadline_s
        return deadline_s is not None and self.clock() - self.begun >= deadline_s

    def _trains(self, client: int) -> bool:
        """Whether its answer is for the model."""
        job = self.assignments[client].job
        return job is Job.TRAIN or (job is Job.SCOUT and client not in self.guests)

    def _check_quorum(self) -> None:
        asked = len(self.assignments)
        if not any(self._trains(client) for client in self.assignments):
            return
        needed = math.ceil(self.policy.quorum * asked)
        if self.updates < needed:
            raise QuorumError(
                f"round {self.number}: {needed} of {asked} clients must answer "
                f"(quorum {self.policy.quorum:g}), and {self.updates} did in "
                f"{self.clock() - self.begun:.0f} s; no answer from {sorted(self.waiting)}"
            )

    def _tell(self) -> None:
        if self.clock() - self.told >= TELL_S:
            self.told = self.clock()
            away = [c for c in sorted(self.waiting) if self.roster.reachable(c) is None]
            text = f"for {sorted(self.waiting)[:20]}" + (f"; not here: {away[:20]}" if away else "")
            self._event("waiting", None, text)

    def _failure(self, client: int, reason: str) -> ClientFailure:
        self._event("failed", client, reason)
        return ClientFailure(client, reason)

    def _refused(self, sent: Sent, reason: str) -> ClientFailure:
        self._event("refused", sent.client, reason, sent.node)
        return ClientFailure(sent.client, reason)

    def _event(
        self, kind: str, client: int | None, text: str, node: int | None = None, nbytes: int = 0
    ) -> None:
        self.on_event(Event(kind, self.number, client, node, text, nbytes))
