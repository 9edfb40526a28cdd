"""A run's numbers for Prometheus, read from its log when they are asked for.

They start again from what is logged when a server is resumed, as Prometheus expects of counters.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from fedmoe import __version__
from fedmoe.deploy.follow import Follower


class RunCollector(Collector):
    """The run in `folder`; `online` says how many clients' nodes are there now."""

    def __init__(self, folder: Path, online: Callable[[], int]) -> None:
        self.follower, self.online = Follower(folder), online
        self.lock = threading.Lock()  # two may ask at once

    def collect(self) -> Iterator[Metric]:
        with self.lock:
            self.follower.look()
            yield GaugeMetricFamily(
                "fedmoe_nodes_online", "SuperNodes that are there now.", self.online()
            )
            yield from _of_run(self.follower)


def _of_run(follower: Follower) -> Iterator[Metric]:
    info, records = follower.info, follower.records
    if info is None:
        return
    yield InfoMetricFamily(
        "fedmoe_run",
        "The run that this server has.",
        {
            "experiment": info.experiment,
            "method": info.method,
            "seed": str(info.seed),
            "version": __version__,
        },
    )
    done = sum(r.phase != "final" for r in records)
    yield GaugeMetricFamily("fedmoe_rounds", "Rounds that are done.", done)
    yield GaugeMetricFamily("fedmoe_rounds_planned", "Rounds that the run is to have.", info.rounds)
    yield GaugeMetricFamily(
        "fedmoe_finished", "1 once the closing evaluation is done.", follower.is_finished
    )
    answers = CounterMetricFamily(
        "fedmoe_clients", "What clients made of being asked.", labels=["outcome"]
    )
    failed = sum(len(r.failed) for r in records)
    refused = sum(len(r.refused) for r in records)
    lost = [{f.client for f in (*r.failed, *r.refused)} for r in records]
    answered = sum(len(set(r.clients) - gone) for r, gone in zip(records, lost, strict=True))
    for outcome, count in (("answered", answered), ("failed", failed), ("refused", refused)):
        answers.add_metric([outcome], count)
    yield answers
    traffic = CounterMetricFamily(
        "fedmoe_bytes", "Bytes of messages, as the run's log counts them.", labels=["direction"]
    )
    traffic.add_metric(["down"], sum(r.bytes_down for r in records))
    traffic.add_metric(["up"], sum(r.bytes_up for r in records))
    yield traffic
    yield SummaryMetricFamily(
        "fedmoe_round_seconds",
        "Wall time of rounds.",
        count_value=len(records),
        sum_value=sum(r.seconds for r in records),
    )
    if records:
        yield GaugeMetricFamily(
            "fedmoe_last_round_seconds", "Wall time of the last round.", records[-1].seconds
        )
    accuracy = follower.accuracy
    if accuracy is not None:
        yield GaugeMetricFamily(
            "fedmoe_accuracy",
            "Mean test accuracy of the models that clients received, 0 to 1.",
            accuracy,
        )
    yield _expert_load(follower)


def _expert_load(follower: Follower) -> Metric:
    load = CounterMetricFamily(
        "fedmoe_expert_tokens", "Tokens that ran each expert.", labels=["layer", "expert"]
    )
    sizes = follower.info.num_experts_L if follower.info else ()
    for layer, size in enumerate(sizes):
        tokens = [0] * size
        for record in follower.records:
            for rows in record.count.values():
                for expert, count in enumerate(rows[layer][:size] if layer < len(rows) else ()):
                    tokens[expert] += count
        for expert, count in enumerate(tokens):
            load.add_metric([str(layer), str(expert)], count)
    return load


def serve_metrics(
    folder: Path, online: Callable[[], int], port: int, host: str = "127.0.0.1"
) -> Callable[[], None]:
    """Answer http://HOST:PORT/metrics from now on; returns what ends that.

    Raises:
        ValueError: the port cannot be listened on.
    """
    registry = CollectorRegistry()
    registry.register(RunCollector(folder, online))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as why:
        raise ValueError(
            f"{host}:{port} cannot be listened on for metrics: {why.strerror or why}; choose "
            f"another --metrics-port"
        ) from why

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end
