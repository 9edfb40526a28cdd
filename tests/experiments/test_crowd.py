"""Experiments of many clients: what is asked of those who take part, and told of the others."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from fedmoe.cli.plan import total
from fedmoe.data.examples import FederatedData, InTurns
from fedmoe.experiments import experiment as experiment_module
from fedmoe.experiments.crowd import crowd
from fedmoe.experiments.definition import definition_of
from fedmoe.experiments.experiment import with_budgets
from fedmoe.experiments.planning import plan_clients
from fedmoe.experiments.run import Spec, run_experiment
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.rounds import Schedule
from fedmoe.population import Population
from fedmoe.report.log import read_run
from fedmoe.report.measures import result_row
from fedmoe.report.rows import full_row
from fedmoe.state import split_state
from fedmoe.types import ClientInfo
from tests.experiments.tiny import CLASSES, tiny, tiny_data, tiny_model

MODEL = split_state(tiny_model())
SCHEDULE = Schedule(3, clients_per_round=6, evaluate_clients=5)
EAGER = FedMoE(smooth_over=1, kinship=1.0, ask_newcomers=True)


def lazily_made(count: int) -> FederatedData:
    clients = Population(np.full(count, 8, np.int32))
    groups = InTurns(count, ("upright", "turned"))
    return FederatedData("many", clients, tiny_data, CLASSES, "0123456789abcdef", groups)


def many(count: int = 3000):
    data = lazily_made(count)
    budgets = with_budgets(data, MODEL, (0.5, 1.0))
    return replace(
        tiny()["fedmoe"], data=data, clients=budgets, schedule=SCHEDULE, strategy=EAGER
    )


@pytest.mark.parametrize("groups", ["none", "in turns", "any"])
def test_a_population_gets_the_budgets_that_a_tuple_gets(groups):
    names = {
        "none": {},
        "in turns": InTurns(50, ("a", "b", "c")),
        "any": {k: "ab"[k * k % 7 % 2] for k in range(50)},
    }[groups]
    data = replace(lazily_made(50), groups=names)
    plain = replace(data, clients=tuple(data.clients))
    shares = (0.25, 0.5, 1.0)
    assert tuple(with_budgets(data, MODEL, shares)) == with_budgets(plain, MODEL, shares)


def test_a_population_takes_the_rounds_that_a_tuple_takes(tmp_path):
    e = many(40)
    plain = replace(e, clients=tuple(e.clients))
    logs = []
    for name, one in (("population", e), ("tuple", plain)):
        run_experiment(one, tmp_path / name)
        records = read_run(tmp_path / name).rounds
        logs.append([replace(r, seconds=0.0, model_hash="") for r in records])
    assert logs[0] == logs[1]


def test_newcomers_scout_and_train_in_one_round(tmp_path):
    run_experiment(many(), tmp_path / "run")
    first, second, third, final = read_run(tmp_path / "run").rounds
    assert first.phase == "explore" and first.loss is None
    for record in (second, third):
        assert record.loss is not None and len(record.count) == 6
        newcomers = [c.client for c in record.changes if c.action == "choose"]
        assert newcomers and set(newcomers) <= set(record.clients)
        assert all(any(record.held[c]) for c in newcomers)
    assert len(final.accuracy) == 5 and not final.failed


def test_of_many_clients_those_are_listed_whom_the_closing_evaluation_asks(tmp_path):
    e = many()
    loaded = []
    data = replace(e.data, load=lambda c: loaded.append(c) or tiny_data(c))
    run_experiment(replace(e, data=data), tmp_path / "run")
    run = read_run(tmp_path / "run")
    asked = [c.id for c in SCHEDULE.evaluated(e.clients)]
    assert [c.id for c in run.info.clients] == asked and len(asked) == 5
    assert run.info.num_clients == 3000 and run.info.others.count == 2995
    assert run.info.others.num_train == 2995 * 8
    budgets = {c.memory_bytes for c in e.clients}
    told = (run.info.others.least_memory_bytes, run.info.others.most_memory_bytes)
    assert told == (min(budgets), max(budgets))
    assert sorted(run.rounds[-1].accuracy) == asked
    taken_part = {c for r in run.rounds for c in r.clients}
    measured = {0}  # whose peak of memory stands for all who hold as much
    assert set(loaded) <= taken_part | set(asked) | measured
    assert (tmp_path / "run" / "run.json").stat().st_size < 5000
    assert result_row(run, "many")["num_clients"] == 3000
    assert full_row(run, "many")["personal_weighted_mean"] is not None


def test_a_run_of_other_clients_is_not_gone_on_with(tmp_path):
    run_experiment(many(), tmp_path / "run")
    e = many()
    other = replace(e, clients=e.clients.with_memory(np.full(3000, 10**6)))
    with pytest.raises(ValueError, match="holds a run with other clients"):
        run_experiment(other, tmp_path / "run", resume=True)
    run_experiment(e, tmp_path / "run", resume=True)


def test_a_run_that_was_killed_goes_on_with_the_same_bits(tmp_path):
    class KilledError(Exception):
        pass

    def kill(record):
        if record.round == 1:
            raise KilledError

    end = run_experiment(many(), tmp_path / "whole")
    with pytest.raises(KilledError):
        run_experiment(many(), tmp_path / "cut", on_round=kill)
    assert run_experiment(many(), tmp_path / "cut", resume=True) == end
    logs = [
        [replace(r, seconds=0.0) for r in read_run(tmp_path / n).rounds] for n in ("whole", "cut")
    ]
    assert logs[0] == logs[1]


def test_below_the_limit_all_are_listed(tmp_path):
    e = many(experiment_module.LISTED)
    assert e.listed is e.clients
    run_experiment(replace(e, schedule=replace(SCHEDULE, rounds=1)), tmp_path / "run")
    raw = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(raw["clients"]) == 1000 and raw["others"] is None


def test_a_definition_and_a_plan_do_not_tell_each_client():
    one, other = many(), many()
    spec = Spec("many", "fedmoe", 0, 3)
    told = definition_of(spec, one)
    assert told.hash == definition_of(spec, other).hash
    assert len(json.dumps(dict(told.settings))) < 20_000
    poorer = replace(one, clients=one.clients.with_memory(np.full(3000, 10**6)))
    assert definition_of(spec, poorer).hash != told.hash
    plans = plan_clients(one)
    assert [p.client for p in plans] == [c.id for c in SCHEDULE.evaluated(one.clients)]
    down = sum(p.bytes_down for p in plans)
    up = sum(p.bytes_up for p in plans)
    # 3 rounds of 6 like these 5, and a closing evaluation of these 5
    assert total(one, plans).bytes == round(3 * 6 / 5 * (down + up) + down)


def test_the_first_so_many_are_a_population_too():
    assert list(many().of_first(3).clients) == list(many().clients)[:3]


def test_crowd_names_its_settings():
    runs = crowd(1, 4, clients=2000, per_round=50, evaluate=20, shares=(0.25, 0.5))
    assert list(runs) == ["fedmoe", "fedavg", "local"]
    for e in runs.values():
        assert len(e.clients) == 2000 and e.schedule.clients_per_round == 50
        assert (e.schedule.rounds, e.schedule.seed, e.schedule.evaluate_clients) == (4, 1, 20)
        budgets = [c.memory_bytes for c in e.clients[:8]]
        assert budgets[:4] == [budgets[0]] * 4 and budgets[4:] == [budgets[4]] * 4
        assert budgets[0] < budgets[4]


def test_clients_of_a_schedule_are_the_same_of_a_population_and_a_tuple():
    population = Population(np.full(700, 8)).with_memory(np.arange(700))
    clients = tuple(population)[::-1]
    quotas = ((frozenset({3, 600, 77}), 2), (frozenset(range(100, 200)), 5))
    for make in (
        partial(Schedule, 2, 3, 20),
        partial(Schedule, 2, 3, quotas=quotas),
        partial(Schedule, 2, 3),
    ):
        for round in range(2):
            drawn = make().participants(round, population)
            assert drawn == make().participants(round, clients)
    few = Schedule(1, 5, evaluate_clients=30)
    assert few.evaluated(population) == few.evaluated(clients)
    assert len(few.evaluated(population)) == 30
    assert Schedule(1, 5, evaluate_clients=800).evaluated(population) == list(population)
    with pytest.raises(ValueError, match="quotas must be of the 700 clients .* client 700"):
        Schedule(1, quotas=((frozenset({700, 701}), 1),)).participants(0, population)
    assert few.evaluated(population) != Schedule(1, 6, evaluate_clients=30).evaluated(population)
    assert isinstance(few.evaluated([ClientInfo(3)])[0], ClientInfo)
