"""plan: what a run will cost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fedmoe.cli.plan import total
from fedmoe.experiments.planning import ClientPlan, plan_clients
from fedmoe.experiments.table import find_experiment
from fedmoe.wire.messages import message_bytes


@pytest.fixture
def tiny(inside):
    return find_experiment("lab:tiny")(seed=0, rounds=3)


@pytest.mark.slow
def test_json_has_every_client_and_every_method_and_nothing_else_is_on_stdout(fedmoe, inside):
    result = fedmoe("plan", "lab:tiny", "--json", "--rounds", "3")
    assert result.exit_code == 0, result.output
    seen = json.loads(result.stdout)
    assert seen["method"] == "fedmoe" and seen["rounds"] == 3
    assert [c["client"] for c in seen["clients"]] == [0, 1, 2, 3]
    assert {c["experts_per_layer"] for c in seen["clients"]} == {2}  # half of 4
    totals = {t["method"]: t for t in seen["totals"]}
    assert {"fedmoe", "fedavg", "local", "chosen-by-group"} <= set(totals)
    assert totals["fedavg"]["over_budget"] == 4 and totals["fedmoe"]["over_budget"] == 0
    assert totals["local"]["bytes"] < totals["fedmoe"]["bytes"] < totals["fedavg"]["bytes"]
    assert totals["chosen-by-group"]["control"] is True


def test_a_method_that_ignores_budgets_is_planned_with_what_it_sends(tiny):
    for plan in plan_clients(tiny["fedavg"]):
        assert (plan.experts_per_layer, plan.experts_held) == (2, 4)
        assert plan.memory_bytes is not None and plan.parameter_bytes > plan.memory_bytes


def test_planned_bytes_are_those_of_the_first_message(tiny):
    experiment = tiny["random"]
    from fedmoe.state import split_state

    state = experiment.strategy.init(split_state(experiment.factory()), experiment.clients)
    sent = experiment.strategy.assign(state, experiment.clients)
    for plan in plan_clients(experiment):
        assert plan.bytes_down == message_bytes(sent[plan.client])


def test_the_cost_of_a_run_worked_by_hand(tiny):
    plans = [
        ClientPlan(0, None, 10, 1, 1, 10, 100, 50, 40, 2.0),
        ClientPlan(1, None, 10, 1, 1, 11, 200, 60, 30, 3.0),
    ]
    found = total(tiny["fedavg"], plans)
    assert found.bytes == 3 * (50 + 40 + 60 + 30) + 50 + 60  # 3 rounds and the closing one
    assert found.seconds == 4 * 5.0
    assert (found.memory_bytes, found.over_budget) == (200, 1)


def test_of_clients_drawn_by_quotas_only_those_count(tiny):
    e, one = tiny["fedavg"], ClientPlan(0, None, None, 1, 1, 8, 100, 10, 6, 2.0)
    plans = [replace(one, client=c) for c in range(4)]
    some = ((frozenset({0, 1}), 1), (frozenset({2, 3}), 1))
    by_quota = replace(e, schedule=replace(e.schedule, clients_per_round=None, quotas=some))
    rounds = e.schedule.rounds
    # Two clients a round, 10 bytes down and 6 up, and all four once at the end.
    assert total(by_quota, plans).bytes == rounds * 2 * 16 + 4 * 10
    assert total(by_quota, plans).seconds == (rounds * 2 + 4) * 2.0


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_tables_fit_the_terminal_uncut(fedmoe, inside, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    result = fedmoe("plan", "lab:tiny", "--method", "fedavg")
    assert result.exit_code == 0
    assert "…" not in result.stdout and "transposed" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= int(columns)
