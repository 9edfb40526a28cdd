"""Where nodes live: their contexts, and the ClientApp that works for them."""

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from flwr.app import Context, Error, Message, Metadata, RecordDict, UserConfig
from flwr.app.user_config import UserConfigValue

from fedmoe.exchange.grid.copies import copied, copy_of
from fedmoe.exchange.grid.draws import seed_draws
from fedmoe.exchange.grid.journal import Journal, Kept

FIRST_NODE = 2  # 1 is the server's, as in Flower
UNKNOWN, RAISED, CRASHED = 0, 2, 8  # Flower's codes of errors

App = Callable[[Message, Context], Message]
NodeConfig = Mapping[str, UserConfigValue] | Callable[[int], Mapping[str, UserConfigValue]]


class Order(NamedTuple):
    """A message to a node, and its place among all and among the node's."""

    number: int
    turn: int
    message: Message


class Answer(NamedTuple):
    """What came of an order: a reply, or None where the message had expired before its turn."""

    number: int
    reply: Message | None
    trace: str = ""  # of what the app raised


@dataclass(frozen=True)
class Census:
    """Which nodes there are, and what each is told of itself and of the run."""

    num_nodes: int
    run_id: int
    run_config: UserConfig
    node_config: NodeConfig
    seed: int | None

    def __contains__(self, node: int) -> bool:
        return FIRST_NODE <= node < FIRST_NODE + self.num_nodes

    def config_of(self, node: int) -> UserConfig:
        partition = node - FIRST_NODE
        more = self.node_config(partition) if callable(self.node_config) else self.node_config
        return {"partition-id": partition, "num-partitions": self.num_nodes, **more}


@dataclass
class Home:
    """Nodes that live in this process.

    Of a node nothing is in memory until it keeps something in its context, and then only that.
    A client works on a copy, so what it did before it failed is undone, as in Flower's simulation.
    """

    app: App
    census: Census
    journal: Journal | None = None  # in which contexts outlive this process
    kept: dict[int, Kept] = field(default_factory=dict)

    def work(self, order: Order) -> Answer:
        """Have a node answer a message, which it gets a copy of."""
        asked = order.message
        if expired(asked.metadata):
            return Answer(order.number, None)
        if self.census.seed is not None:
            seed_draws(self.census.seed, asked.metadata.dst_node_id, order.turn)
        try:
            # The context too may be what fails: node_config is anybody's function.
            found = self._find(order)
            context = self._context(asked.metadata.dst_node_id, found)
            reply = self.app(copied(asked), context)
            _check(reply, asked, context, self.census)
        except SystemExit as why:
            reason = f"the ClientApp ended its process by SystemExit({why})"
            return Answer(order.number, failure(asked, CRASHED, reason), traceback.format_exc())
        except UnusableError as why:
            return Answer(order.number, failure(asked, UNKNOWN, str(why)), str(why))
        except Exception as why:  # whatever goes wrong on a client is that client's failure
            reason = f"{type(why)}:<'{why}'>"
            return Answer(order.number, failure(asked, RAISED, reason), traceback.format_exc())
        self._keep(order, Kept(context.state, context.node_config), found)
        return Answer(order.number, reply)

    def _find(self, order: Order) -> Kept:
        node = order.message.metadata.dst_node_id
        found = self.kept.get(node)
        if found is None and self.journal is not None:
            found = self.journal.before(node, order.number)
        return found or Kept(RecordDict(), self.census.config_of(node))

    def _context(self, node: int, found: Kept) -> Context:
        return Context(
            run_id=self.census.run_id,
            node_id=node,
            node_config=dict(found.config),
            state=copy_of(found.state),
            run_config=dict(self.census.run_config),
        )

    def _keep(self, order: Order, now: Kept, before: Kept) -> None:
        if now == before:
            return
        node = order.message.metadata.dst_node_id
        self.kept[node] = now
        if self.journal is not None:
            self.journal.write(node, order.number, now)


class UnusableError(Exception):
    """What a ClientApp returned is no reply that a server could be given."""


def _check(reply: object, asked: Message, context: Context, census: Census) -> None:
    """Flower loses such a reply, and its server waits for it in vain."""
    if not isinstance(reply, Message):
        raise UnusableError(f"a ClientApp must return a Message, got {type(reply)}")
    said, known = reply.metadata, asked.metadata
    if said.reply_to_message_id != known.message_id or said.src_node_id != known.dst_node_id:
        raise UnusableError(
            "a ClientApp must return Message(content, reply_to=message) of the message that it "
            f"was given ({known.message_id!r} to node {known.dst_node_id}), got a reply to "
            f"{said.reply_to_message_id!r} from node {said.src_node_id}"
        )
    if context.run_config != census.run_config:
        raise UnusableError("a ClientApp must leave context.run_config as it is")


def failure(asked: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=asked)


def expired(metadata: Metadata) -> bool:
    return metadata.created_at + metadata.ttl <= time.time()
