"""What Prometheus is told, by a run worked by hand."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fedmoe.deploy.metrics import RunCollector, serve_metrics
from fedmoe.deploy.processes import free_port
from fedmoe.report.log import RunLog, read_run
from fedmoe.types import ClientFailure
from tests.cli.conftest import write_run


def samples(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for s in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(s.labels.items()))
            found[f"{s.name}{{{labels}}}" if labels else s.name] = s.value
    return found


def scrape(folder, online: int = 2) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(RunCollector(folder, lambda: online))
    return samples(generate_latest(registry).decode())


def test_a_run_s_numbers_are_its_log_s(tmp_path):
    folder = write_run(tmp_path, rounds=2, accuracy=0.25)
    found = scrape(folder)
    assert found["fedmoe_rounds"] == found["fedmoe_rounds_planned"] == 2
    assert found["fedmoe_finished"] == 1 and found["fedmoe_nodes_online"] == 2
    assert found["fedmoe_clients_total{outcome=answered}"] == 6  # (2 rounds + closing) * 2
    assert found["fedmoe_bytes_total{direction=down}"] == 3000
    assert found["fedmoe_bytes_total{direction=up}"] == 2000
    assert found["fedmoe_accuracy"] == 0.25
    assert found["fedmoe_round_seconds_count"] == 3 and found["fedmoe_round_seconds_sum"] == 3.0
    # Client 0 has run 10 and 5 tokens a round, client 1 none and 7.
    assert found["fedmoe_expert_tokens_total{expert=0,layer=0}"] == 20
    assert found["fedmoe_expert_tokens_total{expert=1,layer=0}"] == 24
    assert found["fedmoe_expert_tokens_total{expert=2,layer=0}"] == 0
    name = "fedmoe_run_info{experiment=tiny,method=fedmoe,seed=0,version=0.1.0}"
    assert found[name] == 1


def test_who_failed_and_who_was_refused_is_told_apart(tmp_path):
    folder = write_run(tmp_path, rounds=2, finished=False)
    last = read_run(folder).rounds[-1]
    log = RunLog.open(folder)
    log.truncate_to(1)
    log.append(
        type(last)(
            **{
                **vars(last),
                "failed": [ClientFailure(0, "gone")],
                "refused": [ClientFailure(1, "not finite")],
            }
        )
    )
    found = scrape(folder)
    assert found["fedmoe_clients_total{outcome=answered}"] == 2
    assert found["fedmoe_clients_total{outcome=failed}"] == 1
    assert found["fedmoe_clients_total{outcome=refused}"] == 1
    assert found["fedmoe_finished"] == 0


def test_before_the_first_round_there_is_an_answer_too(tmp_path):
    assert scrape(tmp_path, online=0) == {"fedmoe_nodes_online": 0}


def test_the_endpoint_answers_until_it_is_ended(tmp_path):
    port = free_port()
    end = serve_metrics(write_run(tmp_path), lambda: 1, port)
    try:
        with pytest.raises(ValueError, match=f"{port} cannot be listened on for metrics"):
            serve_metrics(tmp_path, lambda: 1, port)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert samples(answer.read().decode())["fedmoe_rounds"] == 2
    finally:
        end()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")
