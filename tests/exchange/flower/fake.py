"""A grid in memory: nodes that answer at once, late, twice or not at all, as a test wants it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from flwr.app import Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedmoe.exchange.flower.client import Client, answer
from fedmoe.exchange.flower.identity import identity_of
from fedmoe.exchange.flower.post import Post
from fedmoe.exchange.flower.records import content_of, post_of
from fedmoe.exchange.flower.terms import Terms
from fedmoe.experiments.run import Spec
from tests.tiny import experiment

Handle = Callable[[Message], "Message | None"]


def identify() -> None:
    """As an app process of Flower does before it makes messages."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


@dataclass
class FakeGrid(Grid):
    """Nodes by number; each handles a message when its reply is asked for.

    A handler that returns None has not answered yet, and is asked again.
    """

    nodes: dict[int, Handle]
    since: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    sent: list[Message] = field(default_factory=list)
    ready: dict[str, Message] = field(default_factory=dict)
    pulls: int = 0
    largest_pull: int = 0

    def __post_init__(self) -> None:
        identify()

    def set_run(self, run):
        pass

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
            NodeInfo(
                node_id=n, last_activated_at=self.since.get(n, ""), name=self.names.get(n, "")
            )
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
        self.pulls += 1
        for message_id in message_ids:
            message = self.sent[int(message_id[1:])]
            if message is None:
                continue
            reply = self.ready.pop(message_id, None)
            if reply is None:
                handle = self.nodes.get(message.metadata.dst_node_id)
                reply = gone(message) if handle is None else handle(message)
            if reply is not None:
                found.append(reply)
                self.sent[int(message_id[1:])] = None  # Flower gives each reply once
        self.largest_pull = max(self.largest_pull, len(found))
        return found


def error(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=message)


def gone(message: Message) -> Message:
    return error(message, 5, "Node Unavailable")


def post_reply(message: Message, post: Post) -> Message:
    """As it arrives at the server, through Flower's own bytes where there are no arrays."""
    return Message(content_of(post), reply_to=message)


def moved(message: Message, content: RecordDict) -> Message:
    return make_message(metadata=message.metadata, content=content)


def client_node(client: Client) -> Handle:
    """A node that does its client's work."""
    return lambda message: post_reply(message, answer(post_of(message.content), client))


SPEC = Spec("tiny", "fedavg", 0, 3)


def terms_of(made, run: str = "abc.1", spec: Spec = SPEC) -> Terms:
    identity = identity_of(spec, made)
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


def clients_of(folder, make=None, **changes) -> dict[int, Client]:
    """The four clients of the tiny experiment, each with a folder."""
    make = make or partial(_made, tuple(changes.items()))
    return {c: Client(c, folder / f"client-{c}", make=make) for c in range(4)}


def _made(changes, spec: Spec):
    return experiment(**dict(changes))


@dataclass
class Clock:
    """Time that passes only while somebody sleeps."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


__all__ = ["Clock", "FakeGrid", "clients_of", "client_node", "error", "replace", "terms_of"]
