"""The Flower ClientApp: every message goes to the client's worker. Imports no torch.

In Flower's simulation, where a node's configuration gives no client-id but a partition-id, the
work is done in place.
"""

import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmoe.exchange.flower.forward import Place, forward
from fedmoe.exchange.flower.post import HELLO
from fedmoe.exchange.flower.records import content_of, post_of

app = ClientApp()


@app.train()
@app.evaluate()
@app.query()
@app.query(HELLO)
def handle(message: Message, context: Context) -> Message:
    """Whatever the server asks of this client."""
    config = dict(context.node_config)
    if "client-id" not in config and "partition-id" in config:
        return _in_place(message, int(config["partition-id"]))
    answer = forward(post_of(message.content), Place.of(config))
    return Message(content_of(answer), reply_to=message)


def _in_place(message: Message, client: int) -> Message:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Here alone torch is wanted in this process.
    from fedmoe.exchange.flower.client import Client, ready, reply
    from fedmoe.exchange.flower.forward import home

    ready()
    state = home() / "simulated" / f"client-{client:06d}"
    return reply(message, Client(client, state, cache_bytes=0))
