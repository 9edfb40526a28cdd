import re

import pytest

from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec
from fedmoe.experiments.table import (
    EXPERIMENTS,
    UnknownNameError,
    default_rounds,
    find_experiment,
    make_experiment,
)


def test_an_unknown_experiment_is_told_the_nearest_names():
    with pytest.raises(UnknownNameError, match="did you mean 'domains'"):
        find_experiment("domain")


def test_an_unknown_method_is_told_the_nearest_names(tiny_target):
    with pytest.raises(UnknownNameError, match="did you mean 'fedmoe'"):
        make_experiment(Spec(tiny_target, "fedmo", 0, 2))


@pytest.mark.parametrize(
    "target, why",
    [("no_such_module:f", "cannot be imported"), ("json:dump_it", "did you mean 'dump'")],
)
def test_an_own_experiment_that_is_not_there_says_what_is_missing(target, why):
    with pytest.raises(UnknownNameError, match=re.escape(why)):
        find_experiment(target)


def test_an_own_experiment_is_found_by_module_and_function(tiny_target):
    made = make_experiment(Spec(tiny_target, "fedavg", 5, 7))
    assert isinstance(made, Experiment)
    assert (made.method, made.schedule.seed, made.schedule.rounds) == ("fedavg", 5, 7)


@pytest.mark.parametrize("target", EXPERIMENTS)
def test_every_experiment_says_how_many_rounds_it_runs(target):
    assert default_rounds(target) >= 8
