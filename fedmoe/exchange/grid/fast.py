"""The grid that a ServerApp is given: who has been asked what, and what is answered.

As Flower's, it keeps a message until its reply was pulled or its time to live is over.
"""

import logging
import secrets
import threading
import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple, Protocol, Self
from uuid import uuid4

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmoe.exchange.grid.copies import bare, made_of
from fedmoe.exchange.grid.home import FIRST_NODE, Answer, Census, Order, expired

SERVER = 1  # its node's number
MESSAGE_GONE, REPLY_GONE = 3, 4  # Flower's codes of errors
SLICE_S = 1.0  # for which one pull works, where nodes are in this process
LOOK_S = 0.2  # between looks at whether anything has expired
log = logging.getLogger("flwr")
Identity = tuple[int | None, int | None, int | None]  # of task, run and node


class Engine(Protocol):
    """What has nodes answer."""

    def push(self, orders: Sequence[Order]) -> None:
        """Have messages answered, at each node in this order. They are the engine's; what they
        carry is not, and may change as soon as this returns."""

    def answers(self, wanted: Set[int], until: float, *, wait: bool) -> list[Answer]:
        """What has been answered since the last call.

        Args:
            wanted: numbers of the orders that somebody asks for.
            until: the time, by `time.monotonic`, up to which the work of this process may go on.
            wait: whether to wait as long for what is done elsewhere, until the first is there.
        """

    def close(self) -> None:
        """Let go of everything. What was not answered never is."""


class Sent(NamedTuple):
    """What is remembered of a message that was pushed."""

    number: int
    metadata: Metadata


class FastGrid(Grid):
    """Nodes 2 to N + 1, all of them there from the start and as long as the grid.

    Messages and replies are copies, so that neither side can change what the other has; bytes of
    arrays, which nobody can change, are shared. A message's content counts as it is when it is
    pushed. Methods may be called from several threads.

    Use it as a context: Flower's messages can be made only while it is open.
    """

    def __init__(self, engine: Engine, census: Census) -> None:
        self._engine, self._census = engine, census
        self._run = _run_of(census)
        self._lock = threading.RLock()
        self._sent: dict[str, Sent] = {}
        self._ids: dict[int, str] = {}
        self._replies: dict[str, Message] = {}
        self._turns: dict[int, int] = {}
        self._count = 0
        self._sweep_at = 1024
        self._left_s = time.monotonic()
        self._told: set[str] = set()
        self._identity: Identity | None = None

    def __enter__(self) -> Self:
        # As a process of Flower's has it before it makes messages.
        self._identity = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
        _set_identity(1, self._run.run_id, SERVER)
        return self

    def __exit__(self, *error: object) -> None:
        if self._identity is not None:
            _set_identity(*self._identity)
        self._engine.close()

    # What Flower asks of a grid

    def set_run(self, run: Run) -> None:
        """Only the run that this grid was made for: its number is in every context."""
        if not isinstance(run, Run):
            raise TypeError(f"run must be a Run, got {type(run).__name__}")
        if run.run_id != self._run.run_id:
            raise RuntimeError(
                f"run must be {self._run.run_id}, for which this grid was made, got {run.run_id}"
            )
        self._run = run

    @property
    def run(self) -> Run:
        return replace(self._run)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(range(FIRST_NODE, FIRST_NODE + self._census.num_nodes))

    def get_nodes(self) -> list[NodeInfo]:
        since = self._run.running_at
        return [
            NodeInfo(node_id=n, status="online", registered_at=since, last_activated_at=since)
            for n in self.get_node_ids()
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Returns at once; the ids are in the order of the messages.

        A message of another run, to no node of this grid, or with its time to live over, is left
        out and said in the log, as in Flower.
        """
        asked = list(messages)
        with self._lock:
            self._sweep()
            orders, ids = [], []
            delivered_at = datetime.now(UTC).isoformat()
            for message in asked:
                if why := self._refusal(message):
                    log.error("a message is not sent: %s", why)
                    continue
                metadata, node = message.metadata, message.metadata.dst_node_id
                name = str(uuid4())
                metadata.__dict__["_message_id"] = name
                turn = self._turns.get(node, 0)
                self._turns[node] = turn + 1
                sent = bare(message)
                sent.metadata.delivered_at = delivered_at
                orders.append(Order(self._count, turn, sent))
                self._sent[name] = Sent(self._count, sent.metadata)
                self._ids[self._count] = name
                self._count += 1
                ids.append(name)
            if orders:
                self._engine.push(orders)
            return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there; for an id that is not known, or no longer, an error.

        With nodes in this process, they work now: for a second, or for as long as the server has
        been away since its last call, so that one that polls gets replies as they come.
        """
        names = dict.fromkeys(message_ids)
        with self._lock:
            now = time.monotonic()
            until = now + max(SLICE_S, now - self._left_s)
            open_ = (n for n in names if n in self._sent and n not in self._replies)
            self._work({self._sent[n].number for n in open_}, until, wait=False)
            return self._take(names)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Replies sorted by node, whatever came first, so that sums over them have the same bits.

        What is not there after `timeout` seconds is missing; its node still does it, before all
        that is sent to it later.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            names = self.push_messages(messages)
            missing = {name: self._sent[name].number for name in names}
            place = {n: (self._sent[n].metadata.dst_node_id, i) for n, i in missing.items()}
        found: dict[str, Message] = {}
        while missing and (end is None or time.monotonic() < end):
            with self._lock:
                look = time.monotonic() + LOOK_S
                until = look if end is None else min(look, end)
                came = self._work(set(missing.values()), until, wait=True)
                if end is not None and time.monotonic() >= end:
                    break  # what came last is late, as it would be elsewhere
                # Where none came one may have expired, or come while another thread worked.
                for reply in self._take([n for n in came if n in missing] or list(missing)):
                    name = reply.metadata.reply_to_message_id
                    found[name] = reply
                    del missing[name]
        return [found[name] for name in sorted(found, key=place.__getitem__)]

    # How it does that

    def _refusal(self, message: Message) -> str:
        metadata = message.metadata
        if metadata.reply_to_message_id or not metadata.ttl > 0 or not message.has_content():
            raise ValueError(
                "a message to a node must have content, answer no other and have a ttl above 0 "
                f"seconds, got {message}"
            )
        if metadata.run_id != self._run.run_id:
            return f"it is of run {metadata.run_id}, and this is run {self._run.run_id}"
        if metadata.dst_node_id not in self._census:
            last = FIRST_NODE + self._census.num_nodes - 1
            return f"nodes are {FIRST_NODE} to {last}, and it is to node {metadata.dst_node_id}"
        return "its time to live is over" if expired(metadata) else ""

    def _work(self, wanted: Set[int], until: float, *, wait: bool) -> list[str]:
        """Ids of the messages whose replies have come now."""
        came = []
        if wanted:
            for answer in self._engine.answers(wanted, until, wait=wait):
                name = self._ids.pop(answer.number, None)
                if name is not None and answer.reply is not None:
                    self._arrived(name, answer.reply, answer.trace)
                    came.append(name)
        self._left_s = time.monotonic()
        return came

    def _arrived(self, name: str, reply: Message, trace: str) -> None:
        if trace:
            node = reply.metadata.src_node_id
            said = reply.error.reason if trace in self._told else trace
            self._told.add(trace)
            log.error("node %d (partition-id %d): %s", node, node - FIRST_NODE, said)
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        self._replies[name] = reply

    def _take(self, names: Iterable[str]) -> list[Message]:
        taken = []
        delivered_at = datetime.now(UTC).isoformat()
        for name in names:
            sent, reply = self._sent.get(name), self._replies.get(name)
            if sent is None or expired(sent.metadata):
                reply = self._gone(MESSAGE_GONE, name, None)
            elif reply is not None and expired(reply.metadata):
                reply = self._gone(REPLY_GONE, name, sent.metadata)
            if reply is not None:
                reply.metadata.delivered_at = delivered_at
                taken.append(reply)
                self._forget(name)
        return taken

    def _forget(self, name: str) -> None:
        sent = self._sent.pop(name, None)
        if sent is not None:
            self._ids.pop(sent.number, None)
        self._replies.pop(name, None)

    def _sweep(self) -> None:
        """Forget what nobody will pull any more, now and then."""
        if len(self._sent) >= self._sweep_at:
            for name in [n for n, sent in self._sent.items() if expired(sent.metadata)]:
                self._forget(name)
            self._sweep_at = max(1024, 2 * len(self._sent))

    def _gone(self, code: int, name: str, asked: Metadata | None) -> Message:
        """What Flower's server says for itself of a message or a reply that it has not."""
        what = "message" if code == MESSAGE_GONE else "reply"
        metadata = Metadata(
            run_id=self._run.run_id,
            message_id=str(uuid4()),
            src_node_id=SERVER,
            dst_node_id=SERVER,
            reply_to_message_id=name,
            group_id=asked.group_id if asked else "",
            created_at=time.time(),
            ttl=max(0.0, asked.created_at + asked.ttl - time.time()) if asked else 0.0,
            message_type=asked.message_type if asked else "system",
        )
        reason = f"the {what} expired, was pulled before, or never was"
        return made_of(metadata, error=Error(code, reason))


def _run_of(census: Census) -> Run:
    run = Run.create_empty(census.run_id)
    run.primary_task_id = 1
    run.override_config = dict(census.run_config)
    run.running_at = datetime.now(UTC).isoformat()
    run.status = replace(run.status, status="running")
    return run


def _set_identity(task: int | None, run: int | None, node: int | None) -> None:
    # Its properties are declared to take no None, which stands for "not set".
    names = "_task_id", "_run_id", "_node_id"
    for name, value in zip(names, (task, run, node), strict=True):
        setattr(TaskIdentity, name, value)


def random_run() -> int:
    """A number for a run, as Flower draws it."""
    return secrets.randbits(63) | 1
