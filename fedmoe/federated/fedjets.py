"""FedJETs: whole-model experts and a gate that ranks them, trained together; new clients at once.

Dun, Hipolito Garcia, Zheng, Awadallah, Sim, Kyrillidis, Dimitriadis 2023, "FedJETs: Efficient
Just-In-Time Personalization with Federated Mixture of Experts", arXiv:2306.08586; its third version
(2025) calls it DDOME. No code of the authors is public.

A server has M models of one kind, its experts, and a gate on the features of a frozen encoder. Each
round it sends the gate to the clients that take part; each says which K experts its data want most,
gets them, and trains them and the gate together. Some clients are anchors: bound to one expert
each from the start, they train it alone, and teach the gate that their data are that expert's. A
client that comes later needs no label and no step of training: the gate ranks the experts on its
unlabelled data, it gets the best K, and each example is answered by the one of them that the gate
puts first.

How ours differs, or is one reading of what the paper leaves open:
- what normal clients train is the likelihood of the mixture of probabilities, the gate's scores
  rescaled to the experts at hand (fields of `nn.members.Members` and `nn.gates.ranking` say else);
- experts are averaged over their trainers by examples; an expert without trainers stays;
- an anchor's part in the mean of gates has a weight;
- the gate may be computed from sums that anchors tell once, in place of being trained (`Fitted`);
- a client with little memory gets as many experts as it holds;
- the gate goes down twice to a normal client, in the question and with the work: messages leave
  nothing behind but the encoder. So a round moves, with 5 anchors, 5 normal clients and K = 2,
  15 gates and 15 experts down, and 10 gates and 15 experts up.

What the server learns of a client's data: the set of K experts that it wants, and how its data
moved the gate; both tell about its labels. With `chooses="server"` also the scores. With a fitted
gate an anchor tells how many examples it has of each label, and sums of their features.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from fedmoe.data.examples import Examples
from fedmoe.federated.average import ByExpert, averaged, by_examples
from fedmoe.federated.folding import fold
from fedmoe.federated.frozen import sent_once
from fedmoe.federated.local import (
    EVALUATION_BATCH,
    LocalMethod,
    LocalPlan,
    LocalTask,
    Phase,
    Trained,
    accuracy,
    only_chosen,
    train,
)
from fedmoe.federated.select import experts_that_fit
from fedmoe.federated.sums import Sums
from fedmoe.nn.discriminant import COUNT, SHRINK, fitted, nothing_told, told
from fedmoe.profile import watch_gates
from fedmoe.state import NameTest, moe_layers, nothing, other_than
from fedmoe.types import (
    Assignment,
    Change,
    ClientInfo,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
    State,
    SubMoE,
    Term,
    Terms,
)

ANCHOR = "anchor"  # the name of what tells a client that it is one
TOLD = "told"  # the key of the mean of what anchors tell


@dataclass(frozen=True)
class Fitted:
    """A gate that the server computes: the model's gate is a `gates.discriminant.DiscriminantGate`.

    Each anchor tells its sums once, the first time that it takes part and its update arrives. The
    clients' plan must not train the gate.

    Attributes:
        num_features, num_classes: F and C of the gate.
        shrink: see `nn.discriminant.discriminant`.
        prefix: of the gate's parameters among the model's.
    """

    num_features: int
    num_classes: int
    shrink: float = SHRINK
    prefix: str = "mixture.gate."

    def __post_init__(self) -> None:
        if not 0 < self.shrink < float("inf"):
            raise ValueError(f"shrink must be a number above 0, got {self.shrink}")

    def nothing(self, num_experts: int) -> dict[str, Tensor]:
        """What the server knows before anybody tells."""
        return nothing_told(self.num_features, self.num_classes, num_experts)

    def put(self, model: MoEState, sums: State) -> MoEState:
        """The model, its gate computed from these sums."""
        gate = {self.prefix + n: t for n, t in fitted(sums, self.shrink).items()}
        return MoEState({**model.shared, **gate}, model.experts)

    def check(self, model: MoEState) -> None:
        """Raise ValueError where the model's gate is another."""
        wanted = fitted(self.nothing(len(model.experts)), self.shrink)
        for name, value in wanted.items():
            got = model.shared.get(self.prefix + name)
            if got is None or got.shape != value.shape:
                raise ValueError(
                    f"gate is to be fitted, so the model must have a DiscriminantGate with "
                    f"{self.prefix + name!r} of shape {tuple(value.shape)}, got "
                    f"{'none' if got is None else tuple(got.shape)}"
                )


@dataclass(frozen=True, eq=False)
class FedJETsState:
    """What the server carries from one round to the next."""

    round: int
    model: MoEState  # `shared` is the gate, and the encoder
    room: Mapping[int, int]  # experts that each client is to hold, K or fewer
    have: frozenset[int] = frozenset()  # clients that have the encoder
    wanted: Mapping[int, SubMoE] = field(default_factory=dict)  # by who answered this round
    told: State = field(default_factory=dict)  # of a fitted gate: the sums over anchors


@dataclass(frozen=True)
class FedJETs:
    """The strategy.

    Attributes:
        anchors: the expert of each client that is an anchor (see `fedmoe.federated.anchors`).
        k: experts of a normal client, K.
        chooses: who takes the K best by summed scores, "client" (paper), which then tells the set
            alone, or "server", which is told the sums. Both come to the same experts.
        frozen: names the encoder's parameters.
        anchor_weight, normal_weight: of a client's gate in the mean. Paper: both the same. 0 leaves
            those clients' gates out.
        gate: None, and clients train it (paper), or how it is computed.
    """

    anchors: Mapping[int, int]
    k: int = 2
    chooses: Literal["client", "server"] = "client"
    frozen: NameTest = nothing
    anchor_weight: int = 1
    normal_weight: int = 1
    gate: Fitted | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1 expert, got {self.k}")
        if self.chooses not in ("client", "server"):
            raise ValueError(f'chooses must be "client" or "server", got {self.chooses!r}')
        for name in ("anchor_weight", "normal_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if len(set(self.anchors.values())) < len(self.anchors):
            raise ValueError(f"anchors must have an expert each of their own, got {self.anchors}")

    def init(self, model: MoEState, clients: Sequence[ClientInfo]) -> FedJETsState:
        """Raises ValueError where anchors, K and the model's experts do not fit each other."""
        if {e.layer for e in model.experts} != {0}:
            raise ValueError(
                f"the model must have one MoE layer, its experts whole models, got experts in "
                f"{len({e.layer for e in model.experts})} layers"
            )
        if self.k > len(model.experts):
            raise ValueError(f"k must be at most the {len(model.experts)} experts, got {self.k}")
        known = {c.id for c in clients}
        for k, e in self.anchors.items():
            if k not in known:
                raise ValueError(f"anchors must be among the {len(known)} clients, got client {k}")
            if ExpertId(0, e) not in model.experts:
                raise ValueError(
                    f"anchors must have experts from 0 to {len(model.experts) - 1}, got expert "
                    f"{e} for client {k}"
                )
        room = {c.id: min(self.k, experts_that_fit(model, c.memory_bytes)) for c in clients}
        if self.gate is None:
            return FedJETsState(0, model, room)
        self.gate.check(model)
        return FedJETsState(0, model, room, told=self.gate.nothing(len(model.experts)))

    def ask(self, state: FedJETsState, clients: Sequence[ClientInfo]) -> Mapping[int, Assignment]:
        """The gate, and the encoder at first, for every client but anchors to rank experts with."""
        nobody: SubMoE = frozenset()
        return {
            c.id: self._sent(
                state,
                c.id,
                nobody,
                job=Job.SCOUT,
                choose=state.room[c.id] if self.chooses == "client" else None,
            )
            for c in clients
            if c.id not in self.anchors
        }

    def heard(self, state: FedJETsState, answers: Iterable[ClientUpdate]) -> FedJETsState:
        wanted = {}
        for answer in answers:
            marks_LE = only_chosen(answer.profile, state.room[answer.client]).count_LE
            wanted[answer.client] = frozenset(
                ExpertId(layer, e) for layer, e in marks_LE.nonzero().tolist()
            )
        return replace(state, wanted=wanted, have=state.have.union(wanted))

    def assign(
        self, state: FedJETsState, clients: Sequence[ClientInfo]
    ) -> Mapping[int, Assignment]:
        """Nothing for a normal client that was not heard."""
        given = {}
        for c in clients:
            if c.id in self.anchors:
                own = frozenset({ExpertId(0, self.anchors[c.id])})
                extra = {ANCHOR: torch.ones(1), **self._lacking(state, self.anchors[c.id])}
                given[c.id] = self._sent(state, c.id, own, extra=extra)
            elif c.id in state.wanted:
                given[c.id] = self._sent(state, c.id, state.wanted[c.id])
        return given

    def aggregate(
        self, state: FedJETsState, updates: Iterable[ClientUpdate]
    ) -> FedJETsState:
        return fold(self, state, updates)

    def terms(self, state: FedJETsState) -> Terms:
        parts = ByPart(frozenset(self.anchors), self.anchor_weight, self.normal_weight)
        if self.gate is None:
            return ByExpert(by_examples, parts)
        return WithTold(by_examples, replace(parts, anchor_weight=0, normal_weight=0))

    def settle(
        self, state: FedJETsState, sums: Sums, notes: Sequence[ClientUpdate]
    ) -> FedJETsState:
        have = state.have.union(note.client for note in notes)
        model, known = averaged(state.model, sums), state.told
        if self.gate is not None and TOLD in sums:
            nothing_yet = self.gate.nothing(len(model.experts))
            mean, examples = sums.mean(TOLD, nothing_yet), sums[TOLD].weights()
            known = {n: t + mean[n] * examples[n] for n, t in known.items()}
            model = self.gate.put(model, known)
        return FedJETsState(state.round + 1, model, state.room, have, told=known)

    def merged(self, state: FedJETsState) -> MoEState:
        return state.model

    def phase(self, state: FedJETsState) -> str:
        return "train"

    def changes(self, state: FedJETsState) -> Sequence[Change]:
        return ()

    def _lacking(self, state: FedJETsState, expert: int) -> State:
        """What the anchor of this expert is to tell, in its shape."""
        if self.gate is None or state.told[COUNT][:, expert].any():
            return {}
        return self.gate.nothing(len(state.model.experts))

    def _sent(
        self, state: FedJETsState, client: int, sub_moe: SubMoE, **more: object
    ) -> Assignment:
        whole = Assignment(state.round, state.model.only(sub_moe), sub_moe, **more)  # type: ignore[arg-type]
        return sent_once(whole, self.frozen, client in state.have)


@dataclass(frozen=True)
class ByPart:
    """What a client's gate weighs in the mean: by the part that the client plays."""

    anchors: frozenset[int]
    anchor_weight: int
    normal_weight: int

    def __call__(self, update: ClientUpdate) -> int:
        return self.anchor_weight if update.client in self.anchors else self.normal_weight


@dataclass(frozen=True)
class WithTold(ByExpert):
    """Terms by expert, and what anchors tell: means over examples, each counts as many."""

    def __call__(self, update: ClientUpdate) -> Iterator[Term]:
        yield from super().__call__(update)
        yield Term(TOLD, update.extra, update.num_examples)


@dataclass(frozen=True)
class FedJETsClient(LocalMethod):
    """What a client does: normal ones train gate and experts on one loss, anchors on two.

    The model's gate must be a `nn.ranking.Ranking`, or have its `use` and `gate_mass`. One
    that the plan does not train stays as it came.
    """

    gate_lr: float | None = None  # None: that of the plan

    def train(self, task: LocalTask) -> Trained:
        of_gate = gate_names(task.model)
        if ANCHOR in task.extra:
            return self._train_anchor(task, of_gate)
        scale = self._gate_lr(task.plan) / task.plan.lr if task.plan.lr else 0.0

        def slow_gate(name: str, p: nn.Parameter) -> None:
            if of_gate(name) and p.grad is not None:
                p.grad.mul_(scale)

        return Trained(
            *train(
                task.model,
                task.examples,
                task.plan,
                task.generator,
                task.device,
                task.client,
                adjust=slow_gate if scale != 1 else None,
            )
        )

    def _train_anchor(self, task: LocalTask, of_gate: NameTest) -> Trained:
        """The expert on the labels, and the gate to tell that all these examples are its own."""
        [(_, moe)] = moe_layers(task.model)
        [expert] = moe.held
        rest = (task.generator, task.device, task.client)
        with _set(moe.gate, "gate_mass", "renormalise"):  # the expert alone: two separate losses
            plan = _restricted(task.plan, other_than(of_gate))
            profile, loss = train(task.model, task.examples, plan, *rest)
        gate_plan = replace(_restricted(task.plan, of_gate), lr=self._gate_lr(task.plan))
        its_own = Examples(task.examples.x, torch.full_like(task.examples.y, expert))
        with _present(moe.present_E, ()):
            train(task.model, its_own, gate_plan, *rest, forward=_ranking)
        return Trained(profile, loss, extra=_tell(task, expert) if COUNT in task.extra else {})

    def _gate_lr(self, plan: LocalPlan) -> float:
        return plan.lr if self.gate_lr is None else self.gate_lr

    def serve(
        self, model: nn.Module, examples: Examples, device: torch.device
    ) -> dict[str, float]:
        """As every method, and of the same experts: `weighted_test`, all of them by their scores;
        and what takes labels to know: `oracle_test`, the share of examples that some held expert
        gets right, and `gate_hit`, the share for which the gate's choice is the held expert of
        least loss.
        """
        served = super().serve(model, examples, device)
        [(_, moe)] = moe_layers(model)
        with _set(moe.gate, "use", "weighted"):
            served["weighted_test"] = accuracy(model, examples, device)
        if len(examples.y):
            loss_NE, right_NE, choice_N = each_expert(model, examples, device)
            served["oracle_test"] = float(right_NE.any(1).float().mean())
            served["gate_hit"] = float((choice_N == loss_NE.argmin(1)).float().mean())
        return served


@torch.no_grad()
def each_expert(
    model: nn.Module, examples: Examples, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """How every held expert does by itself, and which one the gate puts first.

    Returns:
        loss_NE (float32) and right_NE (bool), a column for each held expert in order of number,
        and choice_N (int64), the column that the gate chooses.
    """
    [(_, moe)] = moe_layers(model)
    model.eval()
    losses, rights, choices = [], [], []
    with _set(moe.gate, "use", "best"):
        for x_B, y_B in zip(*(torch.split(t, EVALUATION_BATCH) for t in examples), strict=True):
            x_B, y_B = x_B.to(device), y_B.to(device)
            with watch_gates(model) as seen:
                model(x_B)
            choices.append(seen[0].weight_TE[:, list(moe.held)].argmax(1))
            logits = []
            for e in moe.held:
                with _present(moe.present_E, (e,)):
                    logits.append(model(x_B).float())
            logit_BEC = torch.stack(logits, 1)
            y_BE = y_B[:, None].expand(-1, len(moe.held))
            losses.append(nn.functional.cross_entropy(logit_BEC.mT, y_BE, reduction="none"))
            rights.append(logit_BEC.argmax(-1) == y_BE)
    return torch.cat(losses).cpu(), torch.cat(rights).cpu(), torch.cat(choices).cpu()


@torch.no_grad()
def _tell(task: LocalTask, expert: int) -> dict[str, Tensor]:
    """What the anchor of this expert was asked for."""
    [(_, moe)] = moe_layers(task.model)
    num_classes, num_experts = task.extra[COUNT].shape
    x_N, y_N = (t.to(task.device) for t in task.examples)
    feature_NF = cast(Rows, task.model).rows(x_N)[:, -cast(Reads, moe.gate).width :]
    own = told(feature_NF, y_N, num_classes, expert, num_experts)
    return {n: t.cpu() for n, t in own.items()}


class Rows(Protocol):
    """A model whose gate reads the last columns of rows, as `nn.members.Members` is."""

    def rows(self, x: Tensor) -> Tensor: ...


class Reads(Protocol):
    """A gate that reads so many columns, as `nn.ranking.Ranking`."""

    width: int


def gate_names(model: nn.Module) -> NameTest:
    """The names of the parameters of the gate of the model's one MoE layer."""
    [(path, _)] = moe_layers(model)
    return lambda name: name.startswith((f"{path}.gate.", "gates.0."))


def _restricted(plan: LocalPlan, test: NameTest) -> LocalPlan:
    """The plan, moving only what `test` names too."""

    def both(trains: NameTest) -> NameTest:
        return lambda name: trains(name) and test(name)

    return replace(plan, phases=tuple(Phase(both(p.trains), p.epochs) for p in plan.phases))


def _ranking(model: nn.Module, x: Tensor) -> Tensor:
    """Logarithms of the gate's scores of all experts."""
    with watch_gates(model) as seen:
        model(x)
    score_TE = seen[0].score_TE
    return score_TE.clamp_min(torch.finfo(score_TE.dtype).tiny).log()


@contextmanager
def _present(present_E: Tensor, experts: Sequence[int]) -> Iterator[None]:
    """Meanwhile the layer's gate may choose these alone."""
    before_E = present_E.clone()
    present_E.zero_()
    present_E[list(experts)] = True
    try:
        yield
    finally:
        present_E.copy_(before_E)


@contextmanager
def _set(module: nn.Module, name: str, value: str) -> Iterator[None]:
    """Meanwhile the module's attribute is this."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
