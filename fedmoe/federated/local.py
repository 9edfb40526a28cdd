"""One client's share of a round: load the assigned part, train it in phases, report.

Shape suffixes: N examples, B examples of a batch, C classes.
"""

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn

from fedmoe.data.examples import ClientData, Examples
from fedmoe.device import autocast, flush_denormals
from fedmoe.nn.losses import load_balance_loss, z_loss
from fedmoe.profile import errors_of, open_gates, profile_of, watch_gates
from fedmoe.rng import torch_generator
from fedmoe.state import (
    Layers,
    NameTest,
    build_part,
    everything,
    layer_sizes,
    load_state,
    moe_layers,
    named_by_role,
    nothing,
    other_than,
    overlay,
    rows_of,
    split_state,
    take_names,
)
from fedmoe.types import (
    ActivationProfile,
    Assignment,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
    Routing,
    State,
    SubMoE,
)

EVALUATION_BATCH = 500  # examples; bounds the memory that an evaluation takes
SCOUTED_PARTS = 10  # in which a scout looks at its data, to tell how well they tell its shares
KEPT, ONCE = "kept:", "once:"  # mark, in what a client stores, a method's own and frozen tensors

Adjust = Callable[[str, nn.Parameter], None]  # may change a parameter's gradient before a step
BuildPart = Callable[[Callable[[], nn.Module], SubMoE], nn.Module]
Done = tuple[ClientUpdate, MoEState | None]  # what goes to the server, and what a client keeps
Forward = Callable[[nn.Module, Tensor], Tensor]  # a model and inputs (B, ...) to logits (B, C)


@dataclass(eq=False)
class Correction:
    """An `Adjust` that adds a constant to gradients, and keeps what they were without it.

    A value and not just a function, so that a faster way of training can do the same.
    """

    shift: State  # added to a parameter's gradient in each step, by role; others stay as they are
    met: dict[str, Tensor] = field(default_factory=dict)  # the sum of the gradients over steps
    steps: Counter[str] = field(default_factory=Counter)  # in how many steps there was one

    def __call__(self, name: str, p: nn.Parameter) -> None:
        assert p.grad is not None
        self.add(name, p.grad, 1)
        if name in self.shift:
            p.grad.add_(self.shift[name])

    def add(self, name: str, total: Tensor, steps: int) -> None:
        """Count the sum of the gradients of so many steps more."""
        self.met[name] = self.met[name] + total if name in self.met else total.clone()
        self.steps[name] += steps


@dataclass(eq=False)
class Slope:
    """An `Adjust` that changes nothing: it adds up over steps the inner product of the gradient and
    the distance from `origin`, which is the loss's slope along the line from there.
    """

    origin: State  # by role
    total: float = 0.0

    def __call__(self, name: str, p: nn.Parameter) -> None:
        assert p.grad is not None
        away = p.detach() - self.origin[name]
        self.total += float((p.grad * away).sum(dtype=torch.float64))


class Fit(Protocol):
    """A way to do what `train` of this module does."""

    def __call__(
        self,
        model: nn.Module,
        examples: Examples,
        plan: "LocalPlan",
        generator: torch.Generator,
        device: torch.device,
        client: int = 0,
        adjust: Adjust | None = None,
        forward: Forward | None = None,
        towards: State | None = None,
    ) -> tuple[ActivationProfile, float]: ...


@dataclass(frozen=True)
class Phase:
    """Epochs during which only the parameters that `trains` names move."""

    trains: NameTest = everything
    epochs: int = 1


@dataclass(frozen=True)
class LocalPlan:
    """What a client does with its part of the model, and what it keeps to itself."""

    phases: tuple[Phase, ...] = (Phase(),)
    personal: NameTest = nothing  # these never leave the client
    frozen: NameTest = nothing  # these never move: they may come once, and the client keeps them
    lr: float = 0.05
    lr_decay: float = 1.0  # by which lr is multiplied from one round to the next
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 20  # examples
    label_smoothing: float = 0.0
    balance: float = 0.0  # weight of the load-balance loss, summed over MoE layers
    z: float = 0.0  # weight of the router z-loss, summed over MoE layers
    clip: float | None = None  # largest norm of a step's gradient; None: any
    proximal: float = 0.0  # FedProx's mu: pull towards the parameters as received
    method: "LocalMethod" = field(default_factory=lambda: LocalMethod())
    # Turns a client's data into what its model takes, for instance a frozen encoder's features.
    prepare: Callable[[int, nn.Module, ClientData], ClientData] | None = None

    def __post_init__(self) -> None:
        if not self.phases or all(p.epochs < 1 for p in self.phases):
            raise ValueError("phases must train for at least 1 epoch in all, got none")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 example, got {self.batch_size}")
        for name in ("lr", "momentum", "weight_decay", "balance", "z", "proximal"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of 0 or more, got {value}")
        if not 0 < self.lr_decay <= 1:
            raise ValueError(f"lr_decay must be above 0 and at most 1, got {self.lr_decay}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0, or None for no limit, got {self.clip}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(
                f"label_smoothing must be between 0 and 1, got {self.label_smoothing}"
            )


    @property
    def stores(self) -> bool:
        """Whether a client must keep anything of its own from round to round."""
        return (
            self.personal is not nothing or self.frozen is not nothing or self.method.keeps
        )


@dataclass(eq=False)
class LocalTask:
    """What a local method is given in one round: a model with the received part in it, and data.

    `kept` is what the method stored on this client in its last round, empty at first; `extra`
    what its server side sent.
    """

    client: int
    model: nn.Module
    examples: Examples  # to train on
    plan: LocalPlan
    generator: torch.Generator
    device: torch.device
    kept: State
    extra: State
    validation: Examples | None = None  # to choose by; may be empty
    fit: Fit = field(default_factory=lambda: train)  # what `train` trains with

    def train(
        self,
        model: nn.Module | None = None,
        plan: "LocalPlan | None" = None,
        batches: torch.Generator | None = None,
        adjust: Adjust | None = None,
        forward: Forward | None = None,
        towards: State | None = None,
    ) -> tuple[ActivationProfile, float]:
        """Train a model in place on the task's examples, as `train` of this module does.

        Args:
            model, plan, batches: in place of the task's model, plan and generator of batches.
            adjust, forward, towards: see `train` of this module.

        Returns:
            How experts were used, and the mean loss over examples and epochs.
        """
        return self.fit(
            self.model if model is None else model,
            self.examples,
            self.plan if plan is None else plan,
            self.generator if batches is None else batches,
            self.device,
            self.client,
            adjust,
            forward,
            towards,
        )


@dataclass(frozen=True, eq=False)
class Trained:
    """What a local method gives back. What goes to the server is the task's model, as trained."""

    profile: ActivationProfile
    loss: float  # mean over examples and epochs
    used: nn.Module | None = None  # what the client itself uses from now; None: the task's model
    kept: State = field(default_factory=dict)  # for this client's next round; replaces the last
    extra: State = field(default_factory=dict)  # for the method's server side


@dataclass(frozen=True)
class LocalMethod:
    """How a client trains, and how it is served without training. This one just trains."""

    # Examples of every label, whichever the client's own are: who is served says how it does there.
    full_test: Examples | None = field(default=None, kw_only=True, compare=False)

    @property
    def keeps(self) -> bool:
        """Whether `train` gives back anything to keep."""
        return False

    @property
    def fits(self) -> bool:
        """Whether all training is by `task.train`, so that a faster way may be set."""
        return type(self).train is LocalMethod.train

    def begin(self, task: LocalTask) -> None:
        """Make `task.model` fit to be measured as received, where it takes more than loading."""

    def train(self, task: LocalTask) -> Trained:
        """Train `task.model` in place."""
        return Trained(*task.train())

    def serve(
        self, model: nn.Module, examples: Examples, device: torch.device
    ) -> dict[str, float]:
        """How good the model is as it came, by each way of using it that the method has."""
        served = {"served_test": accuracy(model, examples, device)}
        if self.full_test is not None:
            served["full_test"] = accuracy(model, self.full_test, device)
        return served


def private_router(plan: LocalPlan) -> LocalPlan:
    """As `plan`, but the gates' rows stay on the client."""
    personal = plan.personal
    return replace(plan, personal=lambda name: name.startswith("gates.") or personal(name))


def frozen_router(plan: LocalPlan) -> LocalPlan:
    """As `plan`, but the gates' rows never move."""
    phases = tuple(Phase(_both(p.trains, _not_a_gate), p.epochs) for p in plan.phases)
    return replace(plan, phases=phases)


def fedper(head: NameTest, plan: LocalPlan) -> LocalPlan:
    """As `plan`, but the parameters that `head` names stay on the client.

    FedPer: Arivazhagan et al. 2019, arXiv:1912.00818.
    """
    return replace(plan, personal=head)


def fedrep(head: NameTest, plan: LocalPlan, head_epochs: int = 5) -> LocalPlan:
    """As FedPer, but the head trains first, on the body as it arrived, and then the body.

    FedRep: Collins et al. 2021, arXiv:2102.07078.
    """
    epochs = sum(p.epochs for p in plan.phases)
    phases = (Phase(head, head_epochs), Phase(other_than(head), epochs))
    return replace(plan, personal=head, phases=phases)


def work(
    client: int,
    assignment: Assignment,
    factory: Callable[[], nn.Module],
    data: ClientData,
    plan: LocalPlan,
    personal: MoEState | None,
    seed: int,
    device: torch.device | str = "cpu",
) -> Done:
    """Do what the server assigned. Profiling the training costs no pass of its own.

    Args:
        factory: makes the full model, with the parameters that every client starts from.
        personal: the client's own parameters after its last training; None at first.

    Returns:
        What goes to the server, and what the client keeps for its next round.

    Raises:
        ValueError: the assignment does not fit the model, the client has no training data, or
            its loss is not finite.
    """
    steps = working(client, assignment, factory, data, plan, personal, seed, device)
    try:
        task = next(steps)
        steps.send(task.plan.method.train(task))
    except StopIteration as end:
        done: Done = end.value
        return done
    raise AssertionError("a client trains once")


def working(
    client: int,
    assignment: Assignment,
    factory: Callable[[], nn.Module],
    data: ClientData,
    plan: LocalPlan,
    personal: MoEState | None,
    seed: int,
    device: torch.device | str = "cpu",
    build: BuildPart = build_part,
) -> Generator[LocalTask, Trained, Done]:
    """`work`, whose training somebody else does: yields the task, is sent what came of it.

    A job without training returns at once.

    Args:
        build: what makes the client's model, to be loaded; it may have been another client's.
    """
    flush_denormals()  # wherever clients work, so that all places come to the same bits
    device = torch.device(device)
    plan = replace(plan, lr=plan.lr * plan.lr_decay**assignment.round)
    if not len(data.train.y):
        raise ValueError(f"client {client} has no training examples: leave it out of the run")
    stored = personal
    personal, kept, frozen = _apart(stored)
    frozen = {**frozen, **assignment.once}
    own = own_part(factory, assignment.sub_moe, plan.personal, personal)
    part = overlay(overlay(assignment.model, own), MoEState(frozen, {}))
    if lacking := sorted(assignment.sub_moe - set(part.experts)):
        e = lacking[0]
        raise ValueError(
            f"client {client} was assigned expert {e.expert} of layer {e.layer}, and neither was "
            f"sent its parameters nor has its own ({len(lacking)} in all)"
        )
    rows = MoEState({}, assignment.absent_rows)
    if assignment.job is Job.SCOUT:
        rows = overlay(rows, own_rows(factory, plan.personal, personal))
    model = build(factory, assignment.sub_moe)
    load_state(model, part, rows.experts)
    model.to(device)
    sizes = layer_sizes(model)
    num_examples = len(data.train.y)
    if plan.prepare is not None:
        data = plan.prepare(client, model, data)

    def answer(
        profile: ActivationProfile, metrics: Mapping[str, float]
    ) -> Done:
        """Of a job that does not train; frozen parameters that came with it are kept."""
        update = ClientUpdate(client, num_examples, MoEState({}, {}), profile, metrics)
        return update, _together(personal, kept, frozen) if assignment.once else stored

    if assignment.job is Job.SCOUT:
        open_gates(model)
        if assignment.choose is not None:
            profile = profile_data(model, data.train, device)
            return answer(only_chosen(profile, assignment.choose), {})
        generator = torch_generator(seed, assignment.round, client)
        return answer(*scouted(model, data.train, generator, device))

    check_k(model)
    empty = ActivationProfile.empty(len(sizes), max(sizes, default=0))
    if assignment.job is Job.SERVE:
        return answer(empty, _measured(plan.method.serve(model, data.test, device)))
    generator = torch_generator(seed, assignment.round, client)
    task = LocalTask(
        client, model, data.train, plan, generator, device, kept, assignment.extra, data.validation
    )
    plan.method.begin(task)
    metrics: dict[str, float] = {}
    if assignment.evaluate:
        metrics["received_validation"] = accuracy(model, data.validation, device)
        metrics["received_test"] = accuracy(model, data.test, device)
    trained = yield task
    metrics["loss"] = trained.loss
    used = model if trained.used is None else trained.used
    if assignment.evaluate or assignment.validate:
        metrics["trained_validation"] = accuracy(used, data.validation, device)
    if assignment.evaluate:
        metrics["trained_test"] = accuracy(used, data.test, device)
    if assignment.job is Job.EVALUATE:
        return answer(empty, _measured(metrics))

    state = split_state(model)
    mine = take_names(state, plan.personal)
    ours = take_names(state, lambda name: name not in frozen and not plan.personal(name))
    if personal is not None:  # experts that it held before and may hold again
        mine = overlay(personal, mine)
    ours = MoEState(ours.shared, {e: s for e, s in ours.experts.items() if _moved(trained, e)})
    update = ClientUpdate(
        client, num_examples, ours, trained.profile, _measured(metrics), trained.extra
    )
    return update, _together(mine, trained.kept, frozen)


def own_part(
    factory: Callable[[], nn.Module],
    sub_moe: SubMoE,
    test: NameTest,
    personal: MoEState | None,
) -> MoEState:
    """A client's own parameters for these experts: as it left them, or as everybody starts."""
    if test is nothing:
        return MoEState({}, {})
    start = _started(factory, test)
    start = MoEState(start.shared, {e: s for e, s in start.experts.items() if e in sub_moe})
    if personal is None:
        return start
    held = {e: s for e, s in personal.experts.items() if e in sub_moe}
    return overlay(start, MoEState(personal.shared, held))


def own_rows(
    factory: Callable[[], nn.Module], test: NameTest, personal: MoEState | None
) -> MoEState:
    """A client's own gate rows, of all experts: what a scout with a private router needs."""
    if test is nothing:
        return MoEState({}, {})
    whole = _started(factory, test)
    if personal is not None:
        whole = overlay(whole, personal)
    return take_names(MoEState({}, rows_of(whole, frozenset(whole.experts))), test)


@lru_cache(maxsize=2)
def _started(factory: Callable[[], nn.Module], test: NameTest) -> MoEState:
    """The parameters of these names as everybody starts; made once, since each round asks."""
    return take_names(split_state(factory()), test)


def only_chosen(profile: ActivationProfile, count: int) -> ActivationProfile:
    """Of each layer the `count` experts with the highest score, as 1, and nothing else.

    What a client reports that chooses for itself, so that the server learns the set alone. Ties
    go to the lower number.
    """
    order_LE = profile.score_LE.argsort(dim=1, descending=True, stable=True)
    mark_LE = torch.zeros_like(profile.count_LE).scatter_(1, order_LE[:, :count], 1)
    mark_LE[profile.score_LE == 0] = 0
    return ActivationProfile(
        mark_LE, mark_LE.double(), mark_LE.double(), (mark_LE.sum(1) > 0).long()
    )


def _moved(trained: Trained, e: ExpertId) -> bool:
    return bool(trained.profile.count_LE[e.layer, e.expert])


def _measured(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _apart(stored: MoEState | None) -> tuple[MoEState | None, State, State]:
    """A client's own parameters, a method's tensors and frozen parameters, as it stored them."""
    if stored is None:
        return None, {}, {}

    def under(prefix: str) -> State:
        return {
            n.removeprefix(prefix): t for n, t in stored.shared.items() if n.startswith(prefix)
        }

    rest = {n: t for n, t in stored.shared.items() if not n.startswith((KEPT, ONCE))}
    return MoEState(rest, stored.experts), under(KEPT), under(ONCE)


def _together(personal: MoEState | None, kept: State, frozen: State) -> MoEState | None:
    """What `_apart` takes apart; None where there is nothing."""
    if personal is None and not kept and not frozen:
        return None
    own = MoEState({}, {}) if personal is None else personal
    marked = {KEPT + n: t for n, t in kept.items()} | {ONCE + n: t for n, t in frozen.items()}
    return MoEState({**own.shared, **marked}, own.experts)


def check_k(model: nn.Module) -> None:
    """Raise ValueError where a gate wants more experts for a token than the layer holds."""
    for layer, (_, moe) in enumerate(moe_layers(model)):
        k = getattr(moe.gate, "k", 1)
        if k > len(moe.held):
            raise ValueError(
                f"k must be at most the {len(moe.held)} expert(s) held in layer {layer}, got {k}; "
                f"give the client at least {k} experts per layer, or lower the gate's k"
            )


def train(
    model: nn.Module,
    examples: Examples,
    plan: LocalPlan,
    generator: torch.Generator,
    device: torch.device,
    client: int = 0,
    adjust: Adjust | None = None,
    forward: Forward | None = None,
    towards: State | None = None,
) -> tuple[ActivationProfile, float]:
    """Train in place; returns how experts were used, and the mean loss over examples and epochs.

    An expert that saw no token in a step is left alone by the optimizer in that step: no
    momentum, no weight decay.

    Args:
        adjust: called before each step, and before clipping, with each parameter that has a
            gradient and its name by role (see `state.NameTest`).
        forward: what to call in place of the model itself; it must reach the model's gates.
        towards: what the plan's proximal term pulls to, by role; None: the model as it is now.
    """
    # Looked up once: of a small model, walking its modules in each step takes a tenth of the time.
    layers = moe_layers(model)
    sizes = layer_sizes(model)
    total = ActivationProfile.empty(len(sizes), max(sizes, default=0))
    if towards is None and plan.proximal:
        towards = {n: p.detach().clone() for n, p in named_by_role(model)}
    loss_sum, seen = 0.0, 0
    model.train()
    x_N, y_N = examples.x.to(device), examples.y.to(device)
    for phase in plan.phases:
        moves = moving_in(phase, plan)
        moving = [(n, p) for n, p in named_by_role(model) if moves(n)]
        if not moving or phase.epochs < 1:
            continue
        for name, p in named_by_role(model):
            p.requires_grad_(moves(name))
        optimizer = torch.optim.SGD(
            [p for _, p in moving],
            lr=plan.lr,
            momentum=plan.momentum,
            weight_decay=plan.weight_decay,
        )
        with watch_gates(model) as routings:
            for index_B in _batches(len(y_N), plan.batch_size, phase.epochs, generator):
                x_B, y_B = x_N[index_B], y_N[index_B]
                routings.clear()
                with autocast(device):
                    logit_BC = model(x_B) if forward is None else forward(model, x_B)
                    task_loss = nn.functional.cross_entropy(
                        logit_BC.float(), y_B, label_smoothing=plan.label_smoothing
                    )
                    loss = task_loss + _routing_losses(layers, routings, plan)
                optimizer.zero_grad()
                if loss.requires_grad:  # not so where a phase trains experts that none of these use
                    loss.backward()  # type: ignore[no-untyped-call]
                step_profile = profile_of(routings, sizes)
                _spare_unused_experts(layers, step_profile)
                for name, p in moving:
                    if towards is not None and plan.proximal and p.grad is not None:
                        p.grad.add_(p.detach() - towards[name], alpha=plan.proximal)
                    if adjust is not None and p.grad is not None:
                        adjust(name, p)
                if plan.clip is not None:
                    torch.nn.utils.clip_grad_norm_([p for _, p in moving], plan.clip)
                optimizer.step()
                total = total + step_profile
                loss_sum += float(task_loss.detach()) * len(index_B)
                seen += len(index_B)
    for p in model.parameters():
        p.requires_grad_(True)
    return total, finite_loss(loss_sum / max(seen, 1), plan, client)


def finite_loss(mean_loss: float, plan: LocalPlan, client: int) -> float:
    """Raise ValueError for one that is not."""
    if not math.isfinite(mean_loss):
        raise ValueError(
            f"client {client}: the training loss must be finite, got {mean_loss}; "
            f"a smaller lr than {plan.lr} may help"
        )
    return mean_loss


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples, device: torch.device) -> float:
    """Share of examples whose highest logit is their label; nan when there are none."""
    if not len(examples.y):
        return math.nan
    model.eval()
    right = 0
    for x_B, y_B in _slices(examples):
        with autocast(device):
            logit_BC = model(x_B.to(device))
        right += int((logit_BC.argmax(-1) == y_B.to(device)).sum())
    return right / len(examples.y)


@torch.no_grad()
def loss_on(model: nn.Module, examples: Examples, device: torch.device) -> float:
    """Cross-entropy, mean over examples; nan when there are none."""
    if not len(examples.y):
        return math.nan
    model.eval()
    total = 0.0
    for x_B, y_B in _slices(examples):
        with autocast(device):
            logit_BC = model(x_B.to(device))
        total += float(
            nn.functional.cross_entropy(logit_BC.float(), y_B.to(device), reduction="sum")
        )
    return total / len(examples.y)


@torch.no_grad()
def profile_data(model: nn.Module, examples: Examples, device: torch.device) -> ActivationProfile:
    """How the data uses the experts, without training."""
    sizes = layer_sizes(model)
    model.eval()
    total = ActivationProfile.empty(len(sizes), max(sizes, default=0))
    for x_B, _ in _slices(examples):
        with watch_gates(model) as routings, autocast(device):
            model(x_B.to(device))
        total = total + profile_of(routings, sizes)
    return total


def scouted(
    model: nn.Module, examples: Examples, generator: torch.Generator, device: torch.device
) -> tuple[ActivationProfile, dict[str, float]]:
    """How the data uses the experts, and how far off other data of the same kind might be.

    Returns:
        The profile, and under `profile.MASS_ERROR` and `FREQUENCY_ERROR` the expected squared
        distance of its shares, over all layers and experts, from those of endless data, as told by
        how far ten random parts of it are apart (`profile.errors_of`). Neither of one example.
    """
    order_N = torch.randperm(len(examples.y), generator=generator)
    parts = [
        profile_data(model, Examples(examples.x[i_B], examples.y[i_B]), device)
        for i_B in torch.tensor_split(order_N, min(SCOUTED_PARTS, len(order_N)))
    ]
    return sum(parts[1:], parts[0]), errors_of(parts)


def _slices(examples: Examples) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(
        torch.split(examples.x, EVALUATION_BATCH),
        torch.split(examples.y, EVALUATION_BATCH),
        strict=True,
    )


def _batches(
    num_examples: int, batch_size: int, epochs: int, generator: torch.Generator
) -> Iterator[Tensor]:
    for _ in range(epochs):
        order_N = torch.randperm(num_examples, generator=generator)
        yield from torch.split(order_N, batch_size)


def _routing_losses(
    layers: Layers, routings: Mapping[int, Routing], plan: LocalPlan
) -> Tensor | float:
    total: Tensor | float = 0.0
    if not (plan.balance or plan.z):
        return total
    for layer, (_, moe) in enumerate(layers):
        if layer in routings:
            if plan.balance:
                balance = load_balance_loss(routings[layer], moe.present_E)
                total = total + plan.balance * balance
            if plan.z:
                total = total + plan.z * z_loss(routings[layer])
    return total


def _spare_unused_experts(layers: Layers, profile: ActivationProfile) -> None:
    """Take the gradients (zeros, if any) from experts that saw no token in this step."""
    for (_, moe), count_E in zip(layers, profile.count_LE.tolist(), strict=True):
        for number, expert in moe.experts.items():
            if not count_E[int(number)]:
                for p in expert.parameters():
                    p.grad = None


def moving_in(phase: Phase, plan: LocalPlan) -> NameTest:
    """Which parameters move in this phase."""
    return _both(phase.trains, other_than(plan.frozen))


def _both(a: NameTest, b: NameTest) -> NameTest:
    return lambda name: a(name) and b(name)


def _not_a_gate(name: str) -> bool:
    return not name.startswith("gates.")
