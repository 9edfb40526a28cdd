"""Flower apps with nothing of fedmoe in them, for tests and the processes that they start."""

import os
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

WIDTH = 300  # its square in float64 is a value that goes by itself

client = ClientApp()


def data_of(partition):
    draw = np.random.default_rng(partition)
    return draw.normal(size=(5, WIDTH)), draw.normal(size=(5, WIDTH))


@client.train()
def train(message: Message, context: Context) -> Message:
    """Two steps of least squares with momentum, which stays in the context."""
    partition = int(context.node_config["partition-id"])
    x, y = data_of(partition)
    w = message.content["arrays"]["w"].numpy()
    kept = context.state.get("momentum")
    v = np.zeros_like(w) if kept is None else kept["v"].numpy()
    for _ in range(2):
        v = 0.5 * v + x.T @ (x @ w - y) / len(x)
        w -= message.content["config"]["lr"] * v
    context.state["momentum"] = ArrayRecord({"v": Array(v)})
    metrics = MetricRecord({"num-examples": 5 + partition, "partition": partition})
    content = RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "metrics": metrics})
    return Message(content, reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    x, y = data_of(partition)
    w = message.content["arrays"]["w"].numpy()
    metrics = {"loss": float(np.square(x @ w - y).mean()), "num-examples": 5}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


class Sorted(FedAvg):
    """Sums in the same order wherever it runs: Flower's own engine gives replies as they come."""

    def aggregate_train(self, server_round, replies):
        ordered = sorted(replies, key=lambda r: r.content["metrics"]["partition"])
        return super().aggregate_train(server_round, ordered)


def server_of(ends: list, num_nodes: int, rounds: int = 3) -> ServerApp:
    """A server that leaves what came out in a list."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Sorted(
            min_train_nodes=num_nodes, min_evaluate_nodes=num_nodes, min_available_nodes=num_nodes
        )
        result = strategy.start(
            grid,
            ArrayRecord({"w": Array(np.zeros((WIDTH, WIDTH)))}),
            num_rounds=rounds,
            train_config=ConfigRecord({"lr": 0.001}),
        )
        ends.append(result)

    return server


counter = ClientApp()


@counter.train()
def count(message: Message, context: Context) -> Message:
    """Counts its messages, and ends its process where a file names it, each time or once."""
    partition = int(context.node_config["partition-id"])
    folder = Path(str(context.run_config["folder"]))
    seen = context.state["seen"]["count"] if "seen" in context.state else 0
    context.state["seen"] = MetricRecord({"count": seen + 1})
    if (folder / f"always-{partition}").exists():
        os._exit(3)
    if (folder / f"once-{partition}").exists():
        (folder / f"once-{partition}").unlink()
        os._exit(3)
    threads = int(os.environ["OMP_NUM_THREADS"])
    metrics = {"partition": partition, "seen": seen + 1, "threads": threads, "process": os.getpid()}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
