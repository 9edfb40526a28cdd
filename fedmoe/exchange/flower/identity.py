"""By what two sides tell that they made the same experiment."""

from typing import NamedTuple

from fedmoe.experiments.definition import definition_of
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec


class Identity(NamedTuple):
    """Hashes of the settings, empty where they cannot be told by content, and of the partition."""

    definition: str
    partition: str


def identity_of(spec: Spec, experiment: Experiment) -> Identity:
    """The same in every process that makes the same experiment. Loads no data."""
    try:
        definition = definition_of(spec, experiment).hash
    except TypeError:  # it has an object of which nothing but its address is known
        definition = ""
    return Identity(definition, experiment.data.partition_hash)
