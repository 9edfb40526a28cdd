"""A definition changes with every setting, and with nothing else."""

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedmoe.experiments.definition import Definition, definition_of, describe
from fedmoe.experiments.run import Spec
from fedmoe.federated.fedavg import FixedSubMoE
from fedmoe.federated.local import LocalPlan, Phase, private_router
from fedmoe.federated.rounds import Schedule
from fedmoe.state import is_gate, other_than
from fedmoe.types import ClientInfo, ExpertId
from fedmoe.wire.codecs import Int8
from fedmoe.wire.packing import Codecs
from tests.tiny import experiment

SPEC = Spec("tiny", "fedavg", 0, 3)


def test_the_same_settings_made_twice_have_the_same_definition():
    first, second = (definition_of(SPEC, experiment()) for _ in range(2))
    assert first == second and first.hash == second.hash and len(first.hash) == 16


@pytest.mark.parametrize(
    "made, differs",
    [
        ({"lr": "0.1", "clip": "None"}, []),
        ({"lr": "0.1"}, []),  # clip is new, and at its default
        ({"clip": "None"}, ["lr"]),  # lr is new, and not
        ({"lr": "0.1", "clip": "1.0"}, ["clip"]),  # its default was another
        ({"lr": "0.2", "clip": "None"}, ["lr"]),
        ({"lr": "0.1", "clip": "None", "mu": "0"}, ["mu"]),  # is no more
    ],
)
def test_new_settings_at_their_defaults_make_no_difference_and_all_others_do(made, differs):
    today = Definition({"lr": "0.1", "clip": "None"}, frozenset({"clip"}))
    assert today.differs_from(made) == differs


def test_settings_are_told_by_name_down_to_fields_of_fields_and_parameters():
    made = definition_of(SPEC, experiment(plan=PLAN))
    told = made.settings
    assert (told["spec.method"], told["plan"], told["plan.lr"]) == ("'fedavg'", "LocalPlan", "0.1")
    assert (told["factory"], told["factory.seed"]) == ("tests.tiny.tiny", "0")
    assert (told["factory.num_experts"], told["factory.k"]) == ("4", "1")
    assert {"factory.k", "plan.weight_decay", "plan.method"} <= made.defaults
    assert not {"factory.seed", "plan.lr", "plan", "data"} & made.defaults


CHOICE = {0: frozenset({ExpertId(0, 1)}), 1: frozenset({ExpertId(0, 2)})}
PLAN = LocalPlan((Phase(epochs=1),), lr=0.1, momentum=0.5, batch_size=5)
CHANGES = {
    "a learning rate": {"plan": replace(PLAN, lr=0.2)},
    "who keeps what": {"plan": private_router(PLAN)},
    "what a phase trains": {"plan": replace(PLAN, phases=(Phase(is_gate),))},
    "a strategy": {"strategy": FixedSubMoE(choice=CHOICE)},
    "a choice": {"strategy": FixedSubMoE(choice={**CHOICE, 1: CHOICE[0]})},
    "how often to evaluate": {"schedule": Schedule(3, seed=0, evaluate_every=2)},
    "a budget": {"clients": (ClientInfo(0, memory_bytes=7),)},
    "a model": {"factory": partial(nn.Linear, 3, 2)},
    "a name": {"name": "other"},
    "how assignments are coded": {"down": Codecs.of(Int8())},
    "how updates are coded": {"up": Codecs.of(Int8())},
    "a codec's levels": {"up": Codecs.of(Int8(levels=31))},
}


def test_every_change_gives_another_definition():
    found = {what: definition_of(SPEC, experiment(**new)).hash for what, new in CHANGES.items()}
    found["nothing"] = definition_of(SPEC, experiment()).hash
    for what, spec in {"a seed": {"seed": 1}, "arguments": {"arguments": {"rate": 0.1}}}.items():
        found[what] = definition_of(replace(SPEC, **spec), experiment()).hash
    assert len(set(found.values())) == len(found)


def test_codecs_are_told_only_where_there_are_any():
    plain = definition_of(SPEC, experiment()).settings
    assert not {name for name in plain if name.split(".")[0] in ("down", "up")}
    coded = definition_of(SPEC, experiment(down=Codecs(experts=Int8(levels=47)))).settings
    assert {n: v for n, v in coded.items() if n not in plain} == {
        "down": "Codecs",
        "down.shared": "Raw",
        "down.experts": "Int8",
        "down.experts.block": "1024",
        "down.experts.levels": "47",
        "down.experts.zstd": "True",
    }


def test_who_holds_which_example_is_told_by_the_hash_of_the_partition():
    whole = experiment()

    def load(client):
        raise AssertionError("a definition must not load data")

    same = replace(whole, data=replace(whole.data, load=load))
    other = replace(whole, data=replace(whole.data, partition_hash="elsewhere"))
    assert definition_of(SPEC, same) == definition_of(SPEC, whole)
    assert definition_of(SPEC, other).differs_from(definition_of(SPEC, whole).settings) == ["data"]


def test_that_a_run_is_a_control_says_nothing_of_what_it_does():
    assert definition_of(SPEC, experiment(control=True)) == definition_of(SPEC, experiment())


def test_which_trainer_rounded_the_last_bits_is_no_setting():
    compiled = replace(SPEC, trainer="compiled")
    assert definition_of(compiled, experiment()) == definition_of(SPEC, experiment())


def by_lambda(prefix):
    return lambda name: name.startswith(prefix)


@dataclass
class Node:
    next: "Node | None" = None


class Plain:
    def __init__(self) -> None:
        self.width = 3

    def method(self) -> None: ...


@pytest.mark.parametrize(
    "value, text",
    [
        ({3, 1, 2}, "{1, 2, 3}"),
        ({"b": 1, "a": (2, [3])}, "{'a': (2, (3)), 'b': 1}"),
        (partial(is_gate, "x"), "partial(fedmoe.state.is_gate, 'x')"),
        (nn.Linear, "torch.nn.modules.linear.Linear"),
        (Plain().method, "Plain(width=3).method"),
        (Node(Node()), "Node(next=Node())"),
        (Schedule(3, seed=1), "Schedule(rounds=3, seed=1)"),
        (np.float64(0.5), "np.float64(0.5)"),
        (len, "builtins.len"),
    ],
)
def test_values_are_told_by_their_content(value, text):
    assert describe(value) == text


def test_a_function_is_told_by_its_name_and_what_it_closes_over():
    assert "test=fedmoe.state.is_gate" in describe(other_than(is_gate))
    assert describe(by_lambda("a")) == describe(by_lambda("a")) != describe(by_lambda("b"))


def test_two_lambdas_of_one_function_are_told_apart():
    tests = [lambda name: name.startswith("a"), lambda name: name.startswith("b")]
    assert describe(tests[0]) != describe(tests[1])


def test_tensors_arrays_and_modules_are_told_by_their_numbers():
    for make in (torch.tensor, np.array):
        assert describe(make([1.0, 2.0])) == describe(make([1.0, 2.0]))
        assert describe(make([1.0, 2.0])) != describe(make([1.0, 3.0]))
        assert describe(make(1.0)) != describe(make([1.0]))
    linear = nn.Linear(2, 1)
    before = describe(linear)
    with torch.no_grad():
        linear.weight.add_(1)
    assert describe(linear) != before


def test_what_holds_itself_comes_to_an_end():
    node = Node()
    node.next = node
    assert describe(node) == "Node(next=...)"


def test_a_setting_that_has_nothing_but_an_address_is_an_error():
    with pytest.raises(TypeError, match="of object only the address is known"):
        describe({"what": object()})


@pytest.mark.slow
def test_another_process_tells_the_same_definition():
    code = (
        "from tests.experiments.test_definition import *\n"
        "changed = experiment(strategy=FixedSubMoE(choice=CHOICE), plan=private_router(PLAN))\n"
        "print(definition_of(SPEC, changed).hash)"
    )
    root = Path(__file__).parents[2]
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1
