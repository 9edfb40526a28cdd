"""How clients train is chosen once, kept with the run, and not changed by going on with it."""

import json
from dataclasses import replace
from functools import partial

import pytest

from fedmoe.cli import run as cli
from fedmoe.cli.run import FASTEST, trainer_of
from fedmoe.cli.trouble import CommandError
from fedmoe.experiments.definition import definition_of
from fedmoe.experiments.run import Spec, run_experiment
from fedmoe.native import client as native
from fedmoe.nn.tabular import vowel_mlp
from tests.tiny import CLASSES, IN, experiment

SPEC = Spec("tiny", "fedavg", 0, 3)
flat = partial(vowel_mlp, IN, 6, 4, 5, 1, CLASSES, gate_mass="full")


def test_without_a_wish_clients_train_one_by_one(tmp_path):
    assert trainer_of(None, experiment(), tmp_path, "cpu") == "one-by-one"
    assert trainer_of("batched", experiment(), tmp_path, "cpu") == "batched"


@pytest.mark.parametrize("wish", [None, FASTEST, "compiled"])
def test_a_run_goes_on_as_it_was_begun(tmp_path, wish, monkeypatch):
    monkeypatch.setattr(cli, "choose", lambda *a: pytest.fail("nothing is to be measured"))
    replace(SPEC, trainer="compiled").write(tmp_path)
    assert trainer_of(wish, experiment(), tmp_path, "cpu") == "compiled"


def test_another_way_than_the_one_begun_is_refused(tmp_path):
    SPEC.write(tmp_path)
    with pytest.raises(CommandError, match="begun with --trainer one-by-one, not compiled"):
        trainer_of("compiled", experiment(), tmp_path, "cpu")


def test_the_fastest_is_measured_on_what_the_model_takes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "choose", lambda *a: asked.append(a) or "batched")

    def halve(client, model, data):
        return replace(data, train=data.train._replace(x=data.train.x / 2))

    made = experiment()
    made = replace(made, plan=replace(made.plan, prepare=halve))
    assert trainer_of(FASTEST, made, tmp_path, "cpu") == "batched"
    [(factory, examples, plan, device)] = asked
    assert factory is made.factory and plan is made.plan and device == "cpu"
    assert (examples.x == made.data.load(0).train.x / 2).all()


def test_a_run_from_before_trainers_trains_one_by_one(tmp_path):
    SPEC.write(tmp_path)
    path = tmp_path / "experiment.json"
    told = json.loads(path.read_text())
    del told["trainer"]
    path.write_text(json.dumps(told))
    assert Spec.read(tmp_path) == SPEC and SPEC.trainer == "one-by-one"


def test_a_result_by_another_trainer_counts_all_the_same():
    made = definition_of(SPEC, experiment())
    assert made.differs_from({k: v for k, v in made.settings.items() if "trainer" not in k}) == []
    other = definition_of(replace(SPEC, trainer="batched"), experiment())
    assert other.differs_from(made.settings) == []


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["batched", "compiled"])
def test_a_run_that_goes_on_has_the_bits_of_one_that_was_not_stopped(tmp_path, trainer):
    if trainer == "compiled" and not native.available():
        pytest.skip("no compiler here")
    made = experiment(factory=flat)
    whole = run_experiment(made, tmp_path / "whole", trainer=trainer)

    class StoppedError(Exception):
        pass

    def stop(record):
        if record.round == 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_experiment(made, tmp_path / "cut", trainer=trainer, on_round=stop)
    assert run_experiment(made, tmp_path / "cut", trainer=trainer, resume=True) == whole
    assert whole != run_experiment(made, tmp_path / "slow")
