import importlib
import random
import sys

import pytest

from fedmoe.exchange.actors import Actors
from fedmoe.exchange.ray import carrying
from fedmoe.exchange.ray.exchange import ActorExchange, in_actors
from fedmoe.federated.local import LocalPlan, fedper
from tests.exchange.ray.played import PlayedCrew, assignments, played
from tests.tiny import client_data, tiny


@pytest.mark.parametrize(
    "fields, what",
    [
        ({"count": 0}, "count must be at least 1 actor, got 0"),
        ({"cpus": -1.0}, "cpus must be a number of 0 or more, got -1.0"),
        ({"gpus": float("nan")}, "gpus must be a number of 0 or more, got nan"),
        ({"gpus": 1.5}, "gpus must be whole where it is above 1, got 1.5"),
    ],
)
def test_actors_that_cannot_be_are_refused(fields, what):
    with pytest.raises(ValueError, match=what):
        Actors(**fields)


def test_what_in_process_refuses_is_refused_before_any_actor_starts():
    plan = fedper(lambda name: name.startswith("stem."), LocalPlan())
    with pytest.raises(ValueError, match="store must not be None for a plan under which"):
        in_actors(tiny, client_data, plan, 0, Actors(1)).__enter__()


def test_where_ray_is_missing_it_is_said_how_it_comes(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("fedmoe.exchange.ray")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"only where Ray is installed: pip install"):
        importlib.import_module("fedmoe.exchange.ray.cluster")


def test_one_round_at_a_time(monkeypatch):
    monkeypatch.setattr(carrying, "MOST_CLIENTS", 2)
    with played():
        exchange = ActorExchange(
            PlayedCrew(1, lambda slip: False, random.Random(0)), lambda client: None
        )
        first = iter(exchange(assignments(6)))
        next(first)
        assert len(list(exchange(assignments(3)))) == 3
        with pytest.raises(RuntimeError, match="one round at a time"):
            next(first)
