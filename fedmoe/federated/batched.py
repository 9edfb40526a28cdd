"""Clients trained side by side in torch, on a CPU or a GPU: as `local.train` of each.

Clients are ordered by how many steps they have, and those who have finished fall away at the end
of the order: the others are a prefix of every tensor, so nobody's data are padded to anybody's
number of examples. Only where a client's last batch is short is it filled up, with examples that
weigh nothing. The last bits depend on who is trained together.

Shape suffixes: K clients, P those who still train, S steps, B examples of a batch, N examples,
E experts of a layer, H pairs of a client and an expert that it holds, L MoE layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedmoe.device import autocast
from fedmoe.federated.compiled import examples_unfit
from fedmoe.federated.local import (
    LocalPlan,
    LocalTask,
    Phase,
    Trained,
    finite_loss,
    moving_in,
)
from fedmoe.nn.stacked import Choices, Stack, StackedModel, forward, likeness, stack_models
from fedmoe.nn.stages import Embedding, Stage, UnknownPartError, stages_of
from fedmoe.state import layer_sizes, named_by_role
from fedmoe.types import ActivationProfile


def stages_for(task: LocalTask) -> tuple[Stage, ...] | str:
    """The stages that are to be trained side by side with those of others, or why they cannot."""
    try:
        stages = stages_of(task.model)
    except UnknownPartError as why:
        return str(why)
    if any(p.dtype != torch.float32 for p in task.model.parameters()):
        return "parameters must be float32"
    if any(isinstance(s, Embedding) for s in stages):
        return "an embedding is not known side by side"
    if likeness(stages) is None:
        return "convolutions gain nothing side by side, and experts of a layer must be alike"
    return stages


def train_many(tasks: Sequence[LocalTask]) -> list[Trained | Exception]:
    """What `LocalMethod.train` of each gives, in the order of tasks; models are trained in place.

    Those that are like no other, or cannot be taken, are trained by themselves.
    """
    trained: dict[int, Trained | Exception] = {}
    groups: list[tuple[object, list[int]]] = []  # not by hash: a plan need not have one
    stages_of_task = {}
    for i, task in enumerate(tasks):
        stages = stages_for(task)
        if isinstance(stages, str) or examples_unfit(stages, task.model, task.examples):
            trained[i] = _alone(task)
            continue
        stages_of_task[i] = stages
        like = task.plan, task.device, task.examples.x.shape[1:], likeness(stages)
        group = next((own for other, own in groups if other == like), None)
        if group is None:
            groups.append((like, [i]))
        else:
            group.append(i)
    for _, group in groups:
        if len(group) == 1:
            trained[group[0]] = _alone(tasks[group[0]])
            continue
        answers = _together([tasks[i] for i in group], [stages_of_task[i] for i in group])
        trained |= dict(zip(group, answers, strict=True))
    return [trained[i] for i in range(len(tasks))]


def _alone(task: LocalTask) -> Trained | Exception:
    try:
        return task.plan.method.train(task)
    except Exception as why:
        return why


def _together(
    tasks: Sequence[LocalTask], stages: Sequence[Sequence[Stage]]
) -> Sequence[Trained | Exception]:
    try:
        return _Group(tasks, stages).train()
    except Exception as why:  # a lack of memory, say: it meets all of them
        return [why] * len(tasks)


class _Group:
    """Clients of one likeness."""

    def __init__(self, tasks: Sequence[LocalTask], stages: Sequence[Sequence[Stage]]) -> None:
        self.plan: LocalPlan = tasks[0].plan
        self.device = tasks[0].device
        batch = self.plan.batch_size
        steps = [-(-len(t.examples.y) // batch) for t in tasks]
        self.places = sorted(range(len(tasks)), key=lambda i: -steps[i])
        self.tasks = [tasks[i] for i in self.places]
        self.steps = [steps[i] for i in self.places]  # of an epoch
        self.model: StackedModel = stack_models([stages[i] for i in self.places], self.device)
        self.received = (
            {id(s): s.values.clone() for s in self.model.stacks} if self.plan.proximal else {}
        )
        sizes = [len(t.examples.y) for t in self.tasks]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.x_N = torch.cat([t.examples.x.flatten(1) for t in self.tasks]).to(self.device)
        self.y_N = torch.cat([t.examples.y for t in self.tasks]).to(self.device)
        num = len(self.tasks)
        self.sizes_L = layer_sizes(self.tasks[0].model)
        self.loss_K = torch.zeros(num, dtype=torch.float64, device=self.device)
        self.seen = [0] * num
        shape = num, len(self.sizes_L), max(self.sizes_L, default=0)
        self.count_KLE, self.weight_KLE, self.score_KLE = (
            torch.zeros(shape, dtype=torch.float64, device=self.device) for _ in range(3)
        )

    def train(self) -> list[Trained | Exception]:
        for phase in self.plan.phases:
            moves = moving_in(phase, self.plan)
            moving = {
                id(p) for t in self.tasks for name, p in named_by_role(t.model) if moves(name)
            }
            if moving and phase.epochs > 0:
                self._phase(phase, moving)
        for stack in self.model.stacks:
            stack.give_back()
        count_KLE = self.count_KLE.cpu().long()
        weight_KLE, score_KLE = self.weight_KLE.cpu(), self.score_KLE.cpu()
        losses = self.loss_K.tolist()
        answers: dict[int, Trained | Exception] = {}
        for i, task in enumerate(self.tasks):
            token_L = torch.full((len(self.sizes_L),), self.seen[i], dtype=torch.int64)
            profile = ActivationProfile(count_KLE[i], weight_KLE[i], score_KLE[i], token_L)
            try:
                loss = finite_loss(losses[i] / max(self.seen[i], 1), self.plan, task.client)
                answers[self.places[i]] = Trained(profile, loss)
            except ValueError as why:
                answers[self.places[i]] = why
        return [answers[i] for i in range(len(self.tasks))]

    def _phase(self, phase: Phase, moving: set[int]) -> None:
        taught = [s for s in self.model.stacks if any(id(p) in moving for p in s.sources)]
        # Of an expert some rows of a stack may move and others not.
        masks = {}
        for s in taught:
            flags = [id(p) in moving for p in s.sources]
            masks[id(s)] = None if all(flags) else torch.tensor(flags, device=self.device)
        momentum = self.plan.momentum != 0
        velocity = {id(s): torch.zeros_like(s.values) for s in taught} if momentum else {}
        step = _Step(self, taught, masks, velocity)
        index_SKB, number_SK = self._batches(phase.epochs)
        steps = [n * phase.epochs for n in self.steps]
        for i, n in enumerate(steps):
            self.seen[i] += phase.epochs * len(self.tasks[i].examples.y)
            assert n >= steps[-1]
        active = len(steps)
        for at in range(steps[0]):
            while steps[active - 1] <= at:
                active -= 1
            step.take(index_SKB[at, :active], number_SK[at, :active])

    def _batches(self, epochs: int) -> tuple[Tensor, Tensor]:
        """Which examples each client takes in each step, and how many of them are real."""
        batch = min(self.plan.batch_size, max(len(t.examples.y) for t in self.tasks))
        most = self.steps[0] * epochs
        index_SKB = torch.zeros(most, len(self.tasks), batch, dtype=torch.int64)
        number_SK = torch.zeros(most, len(self.tasks), dtype=torch.int64)
        for i, task in enumerate(self.tasks):
            num, at = len(task.examples.y), 0
            for _ in range(epochs):
                order_N = torch.randperm(num, generator=task.generator)
                for index_B in torch.split(order_N, self.plan.batch_size):
                    index_SKB[at, i] = self.starts[i]
                    index_SKB[at, i, : len(index_B)] += index_B
                    number_SK[at, i] = len(index_B)
                    at += 1
        return index_SKB, number_SK


class _Step:
    """One step of all who still train."""

    def __init__(
        self,
        group: _Group,
        taught: Sequence[Stack],
        masks: dict[int, Tensor | None],
        velocity: dict[int, Tensor],
    ) -> None:
        self.group, self.taught, self.masks, self.velocity = group, taught, masks, velocity
        self.plan, self.model = group.plan, group.model
        # Plain steps along gradients that are zeros leave an expert as it was.
        self.plain = not (self.plan.momentum or self.plan.weight_decay or self.plan.proximal)

    def take(self, index_PB: Tensor, number_P: Tensor) -> None:
        group, plan, device = self.group, self.plan, self.group.device
        num, batch = index_PB.shape
        full = bool((number_P == batch).all())
        n_P = number_P.to(device)
        keep_PB = None if full else torch.arange(batch, device=device) < n_P[:, None]
        index_R = index_PB.to(device).flatten()
        x_PBD = group.x_N.index_select(0, index_R).view(num, batch, -1)
        y_R = group.y_N.index_select(0, index_R)
        leaves = {
            id(s): s.values[: self.model.pairs(s, num)].detach() for s in self.model.stacks
        }
        wanted = [leaves[id(s)].requires_grad_() for s in self.taught]
        with torch.enable_grad(), autocast(device):
            logit_PBC, seen = forward(self.model, leaves, x_PBD, keep_PB)
            each_PB = nn.functional.cross_entropy(
                logit_PBC.float().flatten(0, 1),
                y_R,
                label_smoothing=plan.label_smoothing,
                reduction="none",
            ).view(num, batch)
            if keep_PB is not None:
                each_PB = each_PB.masked_fill(~keep_PB, 0.0)
            task_P = each_PB.sum(1) / n_P
            loss_P, counts = task_P, []
            for layer, choices in enumerate(seen):
                counts.append(self._note(layer, choices, keep_PB))
                loss_P = loss_P + self._routing_loss(layer, choices, counts[-1], keep_PB, n_P)
            loss = loss_P.sum()
        with torch.no_grad():
            group.loss_K[:num] += task_P.double() * n_P
            gradients: Sequence[Tensor | None] = [None] * len(wanted)
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            self._settle(wanted, gradients, counts, num)

    def _note(self, layer: int, choices: Choices, keep_PB: Tensor | None) -> Tensor:
        """Into the profiles; returns how many examples each expert had, (P, E)."""
        group, num = self.group, len(choices.best_PBC)
        best_PR, weight_PR = choices.best_PBC.flatten(1), choices.weight_PBC.detach().flatten(1)
        score_PBE = choices.score_PBE.detach()
        if keep_PB is not None:
            score_PBE = score_PBE * keep_PB[..., None]
        width = score_PBE.shape[-1]
        zeros_PE = torch.zeros(num, width, dtype=torch.float64, device=group.device)
        count_PE = zeros_PE.scatter_add(1, best_PR, (weight_PR != 0).double())
        group.count_KLE[:num, layer, :width] += count_PE
        group.weight_KLE[:num, layer, :width] += zeros_PE.scatter_add(
            1, best_PR, weight_PR.double()
        )
        group.score_KLE[:num, layer, :width] += score_PBE.sum(1, dtype=torch.float64)
        return count_PE

    def _routing_loss(
        self,
        layer: int,
        choices: Choices,
        count_PE: Tensor,
        keep_PB: Tensor | None,
        n_P: Tensor,
    ) -> Tensor | float:
        """`load_balance_loss` and `z_loss` of each client."""
        plan = self.plan
        if not (plan.balance or plan.z):
            return 0.0
        mixture = self.model.mixtures[layer]
        present_PE = mixture.present_KE[: len(n_P)]
        real_PB = torch.ones_like(choices.score_PBE[..., 0]) if keep_PB is None else keep_PB
        loss_P: Tensor | float = 0.0
        if plan.balance:
            score_PBE = choices.score_PBE * present_PE[:, None]
            tiny = torch.finfo(score_PBE.dtype).tiny
            score_PBE = score_PBE / score_PBE.sum(-1, keepdim=True).clamp_min(tiny)
            share_PE = count_PE.float() / count_PE.sum(1, keepdim=True).clamp_min(1).float()
            mean_PE = (score_PBE * real_PB[..., None]).sum(1) / n_P[:, None]
            loss_P = plan.balance * present_PE.sum(1) * (share_PE * mean_PE).sum(1)
        if plan.z:
            log_sum_PB = choices.logit_PBE.logsumexp(-1) * real_PB
            loss_P = loss_P + plan.z * log_sum_PB.square().sum(1) / n_P
        return loss_P

    def _settle(
        self,
        leaves: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        counts: Sequence[Tensor],
        num: int,
    ) -> None:
        """The optimizer's step, with each client's gradient clipped by itself."""
        plan = self.plan
        learned = [
            (s, leaf, g, self._moved(s, counts, num))
            for s, leaf, g in zip(self.taught, leaves, gradients, strict=True)
            if g is not None
        ]
        if plan.proximal:
            for s, leaf, g, _ in learned:
                g.add_(leaf - self.group.received[id(s)][: len(leaf)], alpha=plan.proximal)
        if plan.clip is not None:
            square_P = torch.zeros(num, device=self.group.device)
            for s, _, g, moved in learned:
                own = g.flatten(1).square().sum(1)
                own = own if moved is None else own.masked_fill(~moved, 0.0)
                square_P.index_add_(0, self._owners(s, len(g)), own)
            by_P = (plan.clip / (square_P.sqrt() + 1e-6)).clamp_max(1.0)
            for s, _, g, _ in learned:
                g.mul_(_wide(by_P.index_select(0, self._owners(s, len(g))), g))
        for s, leaf, g, moved in learned:
            if plan.weight_decay:
                g.add_(leaf, alpha=plan.weight_decay)
            if plan.momentum:
                v = self.velocity[id(s)][: len(leaf)]
                new = v * plan.momentum + g
                g = new if moved is None else torch.where(_wide(moved, g), new, v)
                v.copy_(g)
            if moved is None:
                leaf.add_(g, alpha=-plan.lr)
            else:
                leaf.copy_(torch.where(_wide(moved, g), leaf - plan.lr * g, leaf))

    def _moved(self, s: Stack, counts: Sequence[Tensor], num: int) -> Tensor | None:
        """Which rows move in this step; None: all do, or those that do not have zeros to add."""
        mask = self.masks[id(s)]
        if s.mixture is None:
            return mask if mask is None else mask[:num]
        if mask is None and self.plain:
            return None
        mixture = self.model.mixtures[s.mixture]
        rows = mixture.ends[num]
        used_H = counts[s.mixture][mixture.model_H[:rows], mixture.expert_H[:rows]] > 0
        return used_H if mask is None else used_H & mask[:rows]

    def _owners(self, s: Stack, rows: int) -> Tensor:
        """The client of each row."""
        if s.mixture is None:
            return torch.arange(rows, device=self.group.device)
        return self.model.mixtures[s.mixture].model_H[:rows]


def _wide(value_H: Tensor, like: Tensor) -> Tensor:
    return value_H.view(-1, *(1 for _ in like.shape[1:]))
