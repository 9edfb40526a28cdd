"""A grid in memory: nodes that answer at once, late, twice or not at all, as a test wants it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Error, Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedmoe.exchange.flower.client import Client, answer
from fedmoe.exchange.flower.events import Event
from fedmoe.exchange.flower.identity import identity_of
from fedmoe.exchange.flower.post import HELLO, Post
from fedmoe.exchange.flower.records import content_of, post_of
from fedmoe.exchange.flower.roster import Roster
from fedmoe.exchange.flower.server import flower_exchange
from fedmoe.exchange.flower.terms import Terms
from fedmoe.experiments.run import Spec
from fedmoe.experiments.table import make_experiment
from tests.exchange.flower.runs import TARGET

Handle = Callable[[Message], Message | None]


@dataclass
class Clock:
    """Time that passes only while somebody sleeps; what is to happen then happens."""

    now: float = 0.0
    plans: list[tuple[float, Callable[[], object]]] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        due = [p for p in self.plans if p[0] <= self.now]
        self.plans = [p for p in self.plans if p[0] > self.now]
        for _, happen in due:
            happen()

    def at(self, time: float, happen: Callable[[], object]) -> None:
        self.plans.append((time, happen))


@dataclass
class FakeGrid(Grid):
    """Nodes by number; each handles a message when its reply is asked for.

    A handler that returns None has not answered yet, and is asked again.
    """

    nodes: dict[int, Handle]
    since: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    sent: list[Message] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)
    largest_pull: int = 0

    def __post_init__(self) -> None:
        # As an app process of Flower does before it makes messages.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *arguments, **named):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(node_id=n, last_activated_at=self.since.get(n, ""), name=self.names.get(n, ""))
            for n in self.nodes
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message_id = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = message_id
            self.sent.append(message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for message_id in message_ids:
            if message_id in self.answered:
                continue  # Flower gives each reply once
            message = self.sent[int(message_id[1:])]
            handle = self.nodes.get(message.metadata.dst_node_id)
            reply = error(message, 5, "Node Unavailable") if handle is None else handle(message)
            if reply is not None:
                found.append(reply)
                self.answered.add(message_id)
        self.largest_pull = max(self.largest_pull, len(found))
        return found

    def works(self) -> list[Message]:
        """What was sent, but for the questions who is there."""
        return [m for m in self.sent if not asks_hello(m)]


def error(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=message)


def said(message: Message, post: Post) -> Message:
    return Message(content_of(post), reply_to=message)


def asks_hello(message: Message) -> bool:
    return message.metadata.message_type == f"query.{HELLO}"


def worker(client: Client) -> Handle:
    """A node that does its client's work at once."""
    return lambda message: said(message, answer(post_of(message.content), client))


def spec_of(method: str) -> Spec:
    return Spec(TARGET, method, 0, 2)


def terms_of(spec: Spec, run: str = "abc.1") -> Terms:
    identity = identity_of(spec, make_experiment(spec))
    return Terms(
        "abc",
        run,
        spec.target,
        spec.method,
        spec.seed,
        spec.rounds,
        spec.arguments,
        identity.definition,
        identity.partition,
    )


class World:
    """Clients at nodes 100, 101 ..., four but for guests, a server, and what was told of them."""

    def __init__(self, folder: Path, method: str = "fedavg") -> None:
        self.spec = spec_of(method)
        self.experiment = make_experiment(self.spec)
        everybody = (*self.experiment.clients, *self.experiment.unseen)
        self.clients = {c.id: Client(c.id, folder / f"client-{c.id}") for c in everybody}
        self.grid = FakeGrid({100 + c: worker(client) for c, client in self.clients.items()})
        self.clock = Clock()
        self.events: list[Event] = []
        self.roster = self.new_roster()

    def new_roster(self, run: str = "abc.1") -> Roster:
        return Roster(
            self.grid,
            terms_of(self.spec, run),
            set(self.clients),
            self.events.append,
            self.clock,
            self.clock.sleep,
        )

    def gather(self, count: int = 4) -> None:
        self.roster.gather(self.clients, count, wait_s=60)

    def exchange(self, **options):
        return flower_exchange(
            self.grid,
            self.roster,
            on_event=self.events.append,
            clock=self.clock,
            sleep=self.clock.sleep,
            **options,
        )

    def told(self, kind: str) -> list[tuple[int | None, str]]:
        return [(e.client, e.text) for e in self.events if e.kind == kind]
