"""The one table from names to experiments; and anybody's own by `module:function`.

An experiment's function takes a seed and a number of rounds (both with defaults) and returns its
methods: a mapping from a method's name to an `Experiment`.
"""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from fedmoe.experiments import crowd, fashion, natural, unseen
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec

Make = Callable[..., Mapping[str, Experiment]]

EXPERIMENTS: Mapping[str, Make] = MappingProxyType(
    {
        "demo": fashion.demo,
        "domains": fashion.domains,
        "domains-50": partial(fashion.domains, train=50, name="domains-50"),
        "domains-1000": partial(fashion.domains, train=1000, name="domains-1000"),
        # Each domain's images in one place: what is there to be learnt from them.
        "domains-pooled": partial(
            fashion.domains, train=1200, num_clients=4, name="domains-pooled"
        ),
        "domains-devices": fashion.domains_devices,
        "domains-drop-out": partial(fashion.domains, drop_out=0.3, name="domains-drop-out"),
        "two-domains": fashion.two_domains,
        "published-dirichlet": partial(fashion.published, partition="dirichlet"),
        "published-pathological": partial(fashion.published, partition="pathological"),
        "published-fifth-dirichlet": partial(
            fashion.published, partition="dirichlet", share=0.2
        ),
        "published-fifth-pathological": partial(
            fashion.published, partition="pathological", share=0.2
        ),
        "dirichlet-0.5": partial(fashion.dirichlet, alpha=0.5),
        "dirichlet-1.0": partial(fashion.dirichlet, alpha=1.0),
        "hundred": fashion.hundred,
        "crowd": crowd.crowd,
        "heldout-weak": partial(unseen.heldout, quality="weak"),
        "heldout-average": partial(unseen.heldout, quality="average"),
        "heldout-ablations": unseen.ablations,
        "motion": natural.motion,
        "vowels": natural.vowels,
        "shakespeare": natural.shakespeare,
    }
)


class UnknownNameError(ValueError):
    """An experiment or method that is not there; the message suggests the nearest that are."""


def find_experiment(target: str) -> Make:
    """The function of an experiment: a name of the table, or `module:function`.

    Raises:
        UnknownNameError: neither.
    """
    if target in EXPERIMENTS:
        return EXPERIMENTS[target]
    if ":" not in target:
        raise UnknownNameError(
            f"no experiment is called {target!r}; {_nearest(target, EXPERIMENTS)} "
            f"(your own is named module:function)"
        )
    module_name, _, function_name = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where a user's own module lies
    try:
        module = importlib.import_module(module_name)
    except ImportError as why:
        raise UnknownNameError(
            f"module {module_name!r} of {target!r} cannot be imported: {why}"
        ) from why
    function = getattr(module, function_name, None)
    if not callable(function):
        offered = [n for n, f in inspect.getmembers(module, callable) if not n.startswith("_")]
        raise UnknownNameError(
            f"module {module_name!r} has no function {function_name!r}; "
            f"{_nearest(function_name, offered)}"
        )
    made: Make = function
    return made


def make_experiment(spec: Spec) -> Experiment:
    """The experiment that a spec describes.

    Raises:
        UnknownNameError: there is no such experiment, or it has no such method.
    """
    methods = find_experiment(spec.target)(
        seed=spec.seed, rounds=spec.rounds, **spec.arguments
    )
    return pick_method(methods, spec.method, spec.target)


def pick_method(methods: Mapping[str, Experiment], method: str, target: str) -> Experiment:
    """Raises UnknownNameError where `target` has no such method."""
    if method not in methods:
        raise UnknownNameError(
            f"experiment {target!r} has no method {method!r}; {_nearest(method, methods)}"
        )
    return methods[method]


def default_rounds(target: str) -> int:
    """The rounds of an experiment when nobody asks for another number."""
    return int(inspect.signature(find_experiment(target)).parameters["rounds"].default)


def _nearest(name: str, names: Mapping[str, object] | list[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "there are " + ", ".join(sorted(names))
