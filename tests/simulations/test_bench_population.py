"""The benchmark of many clients: that its cases are what they say, and how it tells them."""

import json

import pytest
import torch

from fedmoe.data.examples import Examples
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.population import Population
from fedmoe.state import split_state
from fedmoe.types import Job
from simulations import bench_population
from simulations.bench_population import (
    LIMIT,
    PER_ROUND,
    Case,
    Measured,
    at_once,
    main,
    memory_rows,
    peak_bytes,
    time_rows,
)

KEYS = {"case", "peer", "ours", "theirs", "unit", "ratio"}
MIB = 2**20


@pytest.fixture
def no_data(monkeypatch):
    """Fashion-MNIST is not needed where nobody looks at an image."""
    image = torch.zeros(4000, 28, 28, dtype=torch.uint8)
    source = Examples(image, torch.arange(4000) % 10)
    monkeypatch.setattr("fedmoe.data.crowd.load_fashion_mnist", lambda folder=None: source)


def test_newcomers_come_once_each_whatever_their_number(no_data):
    for registered in (1000, 20_000):
        e = Case("server, FedMoE", registered).experiment(10)
        came = [c.id for r in range(10) for c in e.schedule.participants(r, e.clients)]
        assert len(came) == len(set(came)) == 10 * PER_ROUND
        assert isinstance(e.clients, Population) and len(e.clients) == registered


def test_those_who_are_known_have_experts_within_their_budget_and_take_part(no_data):
    e = Case("known", 5000, known=300).experiment(5)
    model = split_state(e.factory())
    state = e.strategy.init(model, e.clients)
    assert len(state.p) == len(state.sub_moes) == len(state.progress) == len(state.kin) == 300
    assert {len(held) for held in state.sub_moes.values()} == {4}
    assert all(abs(float(state.p[k].sum()) - 1) < 1e-5 for k in (0, 299))
    clients = e.schedule.participants(0, e.clients)
    assert max(c.id for c in clients) < 300
    given = e.strategy.assign(state, clients)
    assert {a.job for a in given.values()} == {Job.TRAIN}
    after = e.strategy.aggregate(state, at_once(given))
    assert len(after.p) == 300 and after.round == state.round + 1


def test_clients_that_answer_at_once_are_accepted(no_data):
    e = Case("server, FedMoE", 1000).experiment(3)
    assert isinstance(e.strategy, FedMoE)
    clients = e.clients[:5]
    state = e.strategy.init(split_state(e.factory()), e.clients)
    state = e.strategy.aggregate(state, at_once(e.strategy.assign(state, clients)))
    assert len(state.sub_moes) == 5


def measured(*cpu_s, peak=0):
    return [Measured(s, 2 * s, PER_ROUND, peak) for s in cpu_s]


def test_times_are_medians_after_the_first_round_against_the_first_case():
    found = {Case("server, FedAvg", 1000): measured(9, 1, 3, 2)}
    found[Case("server, FedAvg", 2000)] = measured(9, 4, 5, 3)
    one, other = time_rows(found, "registered")
    assert (one["ours"], one["ratio"]) == (2, 1.0)
    assert (other["ours"], other["theirs"], other["ratio"], other["wall_s"]) == (4, 2, 0.5, 8)
    assert other["case"] == "server, FedAvg: 2,000 registered"
    assert other["peer"] == "1,000 registered"
    assert one.keys() >= KEYS


def test_memory_is_told_a_client_and_not_where_it_is_noise():
    base = measured(1, 1, peak=400 * MIB)
    found = {Case("server, FedAvg", 1000): base}
    found[Case("server, FedAvg", 2000)] = measured(1, 1, peak=401 * MIB)
    found[Case("server, FedAvg", 1_001_000)] = measured(1, 1, peak=400 * MIB + 50_000_000)
    rows = memory_rows(found)
    assert [r["ours"] for r in rows] == [None, None, 50.0]
    assert rows[2]["ratio"] == LIMIT / 50 and rows[2].keys() >= KEYS


def test_the_peak_is_that_of_this_process():
    assert 10 * MIB < peak_bytes() < 2**40


def test_the_last_line_is_the_format_that_scripts_read(monkeypatch, capsys):
    monkeypatch.setattr(
        bench_population,
        "in_turns",
        lambda cases, rounds: {c: measured(*[1.0] * (rounds + 1), peak=MIB) for c in cases},
    )
    main(["--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["bench"] == "population"
    assert report.keys() >= {"machine", "versions", "rows"}
    assert all(row.keys() >= KEYS for row in report["rows"])


@pytest.mark.slow
def test_processes_take_turns_and_end():
    cases = [Case("server, FedMoE", n) for n in (2000, 5000)]
    found = bench_population.in_turns(cases, rounds=1)
    assert [len(m) for m in found.values()] == [2, 2]
    for m in (m for of_case in found.values() for m in of_case):
        assert m.cpu_s > 0 and m.taking_part == PER_ROUND and m.peak_bytes > 50 * MIB
