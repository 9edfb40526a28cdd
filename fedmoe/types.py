"""The words of fedmoe: what an expert is called, and what passes between server and client.

Shape suffixes: T tokens, D model width, L MoE layers, E experts in a layer.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

State = Mapping[str, Tensor]  # parameter name -> values, as nn.Module.state_dict gives it


class ExpertId(NamedTuple):
    """One expert of the global model, by its place in it; the same on every client."""

    layer: int
    expert: int


SubMoE = frozenset[ExpertId]  # the experts that one client holds


class Routing(NamedTuple):
    """What a gate decides for T tokens over E experts.

    An expert runs for a token exactly where its weight is not zero, so top-k, threshold,
    tree and dense gates all return this.
    """

    weight_TE: Tensor  # share of each expert's output that the token receives
    score_TE: Tensor  # the gate's belief before it chose; see the gate for what its rows sum to
    logit_TE: Tensor | None = None  # before the softmax, -inf for absent experts; for the z-loss


@dataclass(frozen=True, eq=False)
class ActivationProfile:
    """How much each expert was used. Profiles add: over batches, clients and rounds.

    A layer with fewer experts than E has zeros behind its last one.
    """

    count_LE: Tensor  # tokens that ran the expert, int64
    weight_LE: Tensor  # sum of the gate weights they gave it, float64
    score_LE: Tensor  # sum of the gate's scores before it chose, float64
    token_L: Tensor  # tokens that passed each layer, padding not counted, int64

    def __add__(self, other: ActivationProfile) -> ActivationProfile:
        return ActivationProfile(
            self.count_LE + other.count_LE,
            self.weight_LE + other.weight_LE,
            self.score_LE + other.score_LE,
            self.token_L + other.token_L,
        )

    @property
    def frequency_LE(self) -> Tensor:
        """Share of each layer's activations that each expert received; a used layer sums to 1."""
        return _rows_to_one(self.count_LE)

    @property
    def mass_LE(self) -> Tensor:
        """Share of each layer's gate score that each expert received; a used layer sums to 1."""
        return _rows_to_one(self.score_LE)

    @staticmethod
    def empty(num_layers: int, num_experts: int) -> ActivationProfile:
        """The profile of no tokens at all: the zero of `+`."""
        zeros_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        zeros_L = torch.zeros(num_layers, dtype=torch.int64)
        return ActivationProfile(zeros_LE.long(), zeros_LE, zeros_LE.clone(), zeros_L)


def _rows_to_one(value_LE: Tensor) -> Tensor:
    total_L1 = value_LE.sum(-1, keepdim=True).double()
    return value_LE / total_L1.clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True, eq=False)
class MoEState:
    """A model's parameters, cut along its experts. `shared` is all the rest.

    A gate's row for an expert belongs to that expert and travels with it.
    """

    shared: State
    experts: Mapping[ExpertId, State]

    def only(self, sub_moe: SubMoE) -> MoEState:
        """The part of the model that a client with these experts needs.

        Raises:
            KeyError: `sub_moe` names an expert that this state does not have.
        """
        return MoEState(self.shared, {e: self.experts[e] for e in sorted(sub_moe)})


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client before it asks anything of it."""

    id: int
    memory_bytes: int | None = None  # for the parameters of its part; None: no limit
    num_examples: int = 1  # training examples that it says it has
    task: str | None = None  # what kind of data it says it has; None: it does not say


class Job(enum.Enum):
    """What a client is asked to do in a round."""

    TRAIN = "train"
    SCOUT = "scout"  # run the data through the gates once, and report where it wants to go
    EVALUATE = "evaluate"  # report how good the part is as received, and after local training
    SERVE = "serve"  # use the part as received: no label is looked at, but to tell how good it is


@dataclass(frozen=True, eq=False)
class Assignment:
    """Server to client: train this part of the model. The only message down in a round."""

    round: int
    model: MoEState
    sub_moe: SubMoE  # what to hold; parts of it that `model` lacks are the client's own
    job: Job = Job.TRAIN
    validate: bool = False  # also report the accuracy on the client's validation part
    evaluate: bool = False  # also report accuracies on its test part, before and after training
    # Gate rows of experts that the client is not to hold: a scout needs them, and a gate whose
    # softmax keeps its full denominator.
    absent_rows: Mapping[ExpertId, State] = field(default_factory=dict)
    # Shared parameters that never change, such as a frozen encoder's: the client keeps them.
    once: State = field(default_factory=dict)
    extra: State = field(default_factory=dict)  # what the method sends besides the model
    # Of a scout: report only which so many experts of each layer it wants most, not how much.
    choose: int | None = None


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """Client to server: the part as trained, and how its experts were used doing so."""

    client: int
    num_examples: int  # distinct training examples, not counted again in each epoch
    model: MoEState  # empty after a job that does not train
    profile: ActivationProfile  # of the training, or of the scouting
    metrics: Mapping[str, float]
    extra: State = field(default_factory=dict)  # what the method sends besides the model


@dataclass(frozen=True)
class ClientFailure:
    """In place of an update: this client has none this round."""

    client: int
    reason: str


class Term(NamedTuple):
    """What an update adds to one of the means that a round ends with."""

    key: Hashable  # which mean: an expert's, the shared part's; what a strategy takes for it
    state: State
    weight: int  # 0: it is left out


Terms = Callable[[ClientUpdate], Iterable[Term]]  # each key once; picklable, for other processes


class Note(NamedTuple):
    """What is left of an update whose parameters have been folded in where it was made."""

    update: ClientUpdate  # without model and extra
    bytes_up: int  # that the whole update took, or would have taken, on the wire


class Refusal(NamedTuple):
    """In place of a note: this client's update may not be folded in."""

    client: int
    reason: str
    bytes_up: int


@dataclass(frozen=True)
class Change:
    """One step in the history of a client's sub-MoE, for the log."""

    client: int
    action: str  # "choose", "add", "drop", "revert" or "freeze"
    experts: tuple[ExpertId, ...]


S = TypeVar("S")


class Strategy(Protocol[S]):
    """A federated algorithm: pure functions of an explicit state. Knows neither Flower nor Ray.

    The state is a frozen dataclass whose fields `fedmoe.checkpoint` can write: numbers, text,
    tensors, the types of this module, and mappings and tuples of them.
    """

    def init(self, model: MoEState, clients: Sequence[ClientInfo]) -> S:
        """The state before the first round; `clients` are all that are registered."""
        ...

    def assign(self, state: S, clients: Sequence[ClientInfo]) -> Mapping[int, Assignment]:
        """What each of this round's `clients` is to do. Changes nothing."""
        ...

    def aggregate(self, state: S, updates: Iterable[ClientUpdate]) -> S:
        """The state after a round. Takes each update once, and must not depend on their order."""
        ...

    def merged(self, state: S) -> MoEState | None:
        """The one model for everybody, or None where there is no such model."""
        ...

    def phase(self, state: S) -> str:
        """The coming round's phase, for the log: "explore" or "train"."""
        ...

    def changes(self, state: S) -> Sequence[Change]:
        """How sub-MoEs changed at the end of the round that led to `state`."""
        ...


class AskingStrategy(Strategy[S], Protocol[S]):
    """A strategy that asks its clients something before it assigns a round's work.

    One more message down and up within a round: FedJETs sends the gate and hears which experts a
    client wants. A strategy that has no such question leaves both methods out.
    """

    def ask(self, state: S, clients: Sequence[ClientInfo]) -> Mapping[int, Assignment]:
        """The questions, jobs of kind SCOUT; may be empty. Changes nothing."""
        ...

    def heard(self, state: S, answers: Iterable[ClientUpdate]) -> S:
        """The state with which this round's `assign` is called; it may outlive the round."""
        ...


# Carries assignments to clients and brings their updates back, as they arrive: in process, by
# Ray or by Flower.
Exchange = Callable[[Mapping[int, Assignment]], Iterable[ClientUpdate | ClientFailure]]
