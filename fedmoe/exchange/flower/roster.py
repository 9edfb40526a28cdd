"""Who is there: which node of Flower is which client of the run, by what the nodes say."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid

from fedmoe.exchange.flower.events import Event, OnEvent, ignore
from fedmoe.exchange.flower.post import BROKEN, FAILED, HELLO, PARCEL, Post, PostError
from fedmoe.exchange.flower.pulling import Puller
from fedmoe.exchange.flower.records import content_of, post_of
from fedmoe.exchange.flower.terms import Terms
from fedmoe.wire.parcel import Hello, Parcel, ParcelError, pack_query, unpack_hello

LOOK_S = 0.5  # between two looks at which nodes there are
AGAIN_S = 5.0  # until a node whose hello went wrong is asked again
POLL_S = 0.1
TELL_S = 60.0  # between two events that tell for whom is waited
NAMED = "client-"  # a node of this name and a number is that client and no other


class Node(NamedTuple):
    """A SuperNode. One that was started anew has another `since`, though it keeps its number."""

    id: int
    since: str = ""
    name: str = ""


@dataclass(frozen=True)
class Member:
    """A client that has said hello, and the groups that its cache had when it last told."""

    client: int
    node: Node
    key: str
    num_examples: int
    held: frozenset[bytes]


class GatherError(TimeoutError):
    """Too few clients came; says who did, and who was refused and why."""


def nodes_of(grid: Grid) -> dict[int, Node]:
    """The nodes that are there now."""
    try:
        found = list(grid.get_nodes())
    except NotImplementedError:
        return {int(n): Node(int(n)) for n in grid.get_node_ids()}
    return {n.node_id: Node(n.node_id, n.last_activated_at, n.name) for n in found}


@dataclass
class Roster:
    """The run's clients as they come, leave and come back.

    A node is asked for its hello when it comes, and again when it was started anew. Two nodes
    cannot be one client: the later one is refused for as long as the first is there, unless it
    has the same key, as a client has that was started again under another node.
    """

    grid: Grid
    terms: Terms
    clients: Collection[int]  # who may take part
    on_event: OnEvent = ignore
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    members: dict[int, Member] = field(default_factory=dict)
    present: Mapping[int, Node] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)  # nodes, and why
    _asked: dict[str, Node] = field(default_factory=dict)  # by the message's id
    _settled: dict[int, Node] = field(default_factory=dict)  # nodes that have answered
    _doubles: set[int] = field(default_factory=set)  # refused only while another is there
    _not_before: dict[int, float] = field(default_factory=dict)
    _looked: float | None = None

    def __post_init__(self) -> None:
        self._puller = Puller(self.grid)

    def reachable(self, client: int) -> Member | None:
        """The member, if its node is there."""
        member = self.members.get(client)
        return member if member is not None and self.present.get(member.node.id) else None

    def heard(self, client: int, held: frozenset[bytes]) -> None:
        """Note what a client says that it holds."""
        if client in self.members:
            self.members[client] = replace(self.members[client], held=held)

    def look(self) -> None:
        """See who came and who left, and greet them. Returns at once; cheap to call often."""
        now = self.clock()
        if self._looked is None or now - self._looked >= LOOK_S:
            self._looked = now
            self._see(nodes_of(self.grid))
            asked = set(self._asked.values())
            for node in self.present.values():
                due = now >= self._not_before.get(node.id, now)
                if due and self._settled.get(node.id) != node and node not in asked:
                    self._ask(node)
        busy = self._puller.busy
        for message in self._puller.finished():
            self._take(message)
        for message_id in [i for i in self._asked if i not in busy]:
            for message in self._puller.pull([message_id]):
                self._take(message)

    def gather(self, wanted: Collection[int], count: int, wait_s: float | None = None) -> None:
        """Wait until as many of the wanted clients are there.

        Raises:
            GatherError: they are not after `wait_s` seconds.
        """
        begun = told = self.clock()
        while True:
            self.look()
            here = [c for c in wanted if self.reachable(c) is not None]
            if len(here) >= count:
                return
            now = self.clock()
            if wait_s is not None and now - begun >= wait_s:
                why = "".join(f"; node {n}: {text}" for n, text in sorted(self.refused.items()))
                raise GatherError(
                    f"{count} clients were to come within {wait_s:g} s, and {len(here)} did "
                    f"({sorted(here)}){why}"
                )
            if now - told >= TELL_S:
                told = now
                self.on_event(Event("waiting", text=f"{len(here)} of {count} clients are here"))
            self.sleep(POLL_S)

    def _see(self, present: Mapping[int, Node]) -> None:
        gone = self.present.keys() - present.keys()
        for client, member in list(self.members.items()):
            if member.node.id in gone:
                self.on_event(Event("left", client=client, node=member.node.id))
            elif member.node.id in present and present[member.node.id] != member.node:
                del self.members[client]  # started anew: it will say who it is
        if gone:
            for node in self._doubles:
                self._settled.pop(node, None)
            self._doubles.clear()
        self.present = present

    def _ask(self, node: Node) -> None:
        query = pack_query(run=self.terms.run)
        post = Post(HELLO, self.terms.text, query.manifest, query.groups)
        message = Message(content_of(post), dst_node_id=node.id, message_type=f"query.{HELLO}")
        for message_id in self.grid.push_messages([message]):
            if message_id:
                self._asked[message_id] = node

    def _take(self, message: Message) -> None:
        asked = self._asked.pop(message.metadata.reply_to_message_id, None)
        if asked is None:
            self.on_event(Event("refused", text="foreign: a hello that nobody asked for"))
            return
        node = self.present.get(asked.id, asked)  # which may have been started anew meanwhile
        self._settled[node.id] = node
        if message.has_error():
            self._later(node, f"error {message.error.code}: {message.error.reason}")
            return
        try:
            post = post_of(message.content)
            if post.kind == BROKEN:
                self._later(node, post.text)
            elif post.kind == FAILED:
                self._refuse(node, post.text)
            elif post.kind != PARCEL:
                self._refuse(node, f"answers {post.kind!r} where it was asked who it is")
            else:
                hello = unpack_hello(Parcel(post.manifest, post.groups), run=self.terms.run)
                self._welcome(node, hello)
        except (PostError, ParcelError) as why:
            self._refuse(node, f"{type(why).__name__}: {why}")

    def _later(self, node: Node, why: str) -> None:
        """The node may do better when it is asked again."""
        self._settled.pop(node.id, None)
        self._not_before[node.id] = self.clock() + AGAIN_S
        self.refused[node.id] = f"no hello: {why}"
        self.on_event(Event("retried", node=node.id, text=self.refused[node.id]))

    def _refuse(self, node: Node, why: str) -> None:
        self.refused[node.id] = why
        self.on_event(Event("refused", node=node.id, text=why))

    def _welcome(self, node: Node, hello: Hello) -> None:
        client = hello.client
        if client not in self.clients:
            self._refuse(node, f"says it is client {client}, which this run does not have")
            return
        if node.name.startswith(NAMED) and node.name != f"{NAMED}{client}":
            self._refuse(
                node, f"says it is client {client}, but its key is registered as {node.name!r}"
            )
            return
        other = self.members.get(client)
        there = self.reachable(client) is not None
        if other is not None and other.node.id != node.id and there and hello.key != other.key:
            self._doubles.add(node.id)
            self._refuse(node, f"says it is client {client}, which is node {other.node.id}")
            return
        for old in [c for c, m in self.members.items() if m.node.id == node.id]:
            del self.members[old]
        self.refused.pop(node.id, None)
        self.members[client] = Member(client, node, hello.key, hello.num_examples, hello.held)
        self.on_event(Event("hello", client=client, node=node.id))
