"""Which parameters a personalised method keeps on the client: tests of names, for `LocalPlan`.

A model of one body and one classifier has an obvious head. In a model whose experts each own a
slice of the classifier, as `nn.classifier.moe_head` makes them, there are two readings of "the
last layers stay at home", and both are here: each expert's output layer (`is_classifier`), with
what the experts compute before it shared, or the whole MoE layer (`is_moe`). Either goes with
`local.fedper` and `local.fedrep`.
"""

import re

from fedmoe.state import is_expert, is_gate

OUTPUT = "down"  # the output layer of `nn.experts.ffn.FFN`
NORM = re.compile(r"norm\d*(_\w+)?")


def is_classifier(name: str) -> bool:
    """True of every expert's output layer, its slice of the classifier."""
    return is_expert(name) and name.split(".")[3] == OUTPUT


def is_moe(name: str) -> bool:
    """True of every expert and of the gates: all but the body."""
    return is_expert(name) or is_gate(name)


def is_norm(name: str) -> bool:
    """True of normalisation layers, called norm, norm1, norm_ffn: parameters and statistics.

    FedBN: Li, Jiang, Zhang, Kamp, Dou 2021, "FedBN: Federated Learning on Non-IID Features via
    Local Batch Normalization", arXiv:2102.07623. Names are all that a test sees, so a layer that
    is called otherwise is missed.
    """
    return any(NORM.fullmatch(part) for part in name.split("."))


def is_classifier_or_norm(name: str) -> bool:
    """True of what `is_classifier` or `is_norm` is true of."""
    return is_classifier(name) or is_norm(name)


def is_not_shared_extractor(name: str) -> bool:
    """True of all but expert 1 of layer 0, the shared extractor of `nn.extractors`.

    pFedMoE: Yi et al. 2024, arXiv:2402.01350. The private extractor, the gate and the header never
    leave the client.
    """
    return not name.startswith("experts.0.1.")
