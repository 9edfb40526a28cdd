"""FedMoE: learn which experts a client's data activates, and let it train only those.

Mei, Cai, Zhou, Wang, Xu 2024, "FedMoE: Personalized Federated Learning via Heterogeneous Mixture
of Experts", arXiv:2408.11304. No code of the authors is public; every point that the paper leaves
open is a field of `FedMoE`, and its docstring says what the paper says of it.

Stage one explores: which experts do a client's data activate? It ends with a choice for every
client by one threshold over all layers under its memory budget (`select.largest_coverage`). Stage
two trains: slice, train, validate, average by expert; a client that stops improving gains or loses
experts on the advice of similar clients, and goes back for good if that did not help.

How ours differs, and why, is measured in simulations/LOG.md:
- exploring need not train the full model. By default clients only run their data through the
  stem and the gates once (they scout): the share of gate score that each expert gets tells
  clients of different kinds apart before any training, costs no expert on the wire, and fits
  every device. `explore_trains=True` trains the full model as the paper does;
- shares are smoothed over similar clients and demand is balanced over experts before the choice
  (`similar.balanced_demand`); `sharpness=0` and `smooth_over=0` choose by the client's own
  shares as the paper does.
`as_published()` is the paper's method, as far as the paper tells it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fedmoe.federated.average import (
    Mean,
    Weigh,
    average_by_expert,
    by_examples,
    by_tokens,
)
from fedmoe.federated.fedavg import random_choice
from fedmoe.federated.select import (
    expert_bytes_of,
    experts_that_fit,
    fits_whole,
    largest_coverage,
)
from fedmoe.federated.similar import (
    advice,
    alike_groups,
    balanced_demand,
    neighbours,
    similarity,
    smoothed,
)
from fedmoe.rng import numpy_generator
from fedmoe.state import parameter_bytes, rows_of
from fedmoe.types import (
    ActivationProfile,
    Assignment,
    Change,
    ClientInfo,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
    State,
    SubMoE,
)


def mass(profile: ActivationProfile) -> Tensor:
    """Share of the gate's score that each expert gets, (L, E): graded, so few examples tell."""
    return profile.mass_LE


def frequency(profile: ActivationProfile) -> Tensor:
    """Share of activations that each expert gets, (L, E): the paper's p."""
    return profile.frequency_LE


@dataclass(frozen=True)
class Progress:
    """How a client's validation score has gone since its sub-MoE last changed."""

    best: float = -1.0  # share right, 0 to 1; -1 before the first score
    stale: int = 0  # rounds since `best`
    previous: SubMoE | None = None  # what to go back to while a change is on trial
    frozen: bool = False


@dataclass(frozen=True, eq=False)
class FedMoEState:
    """All that the server carries from one round to the next."""

    round: int
    model: MoEState
    clients: Mapping[int, ClientInfo]
    p: Mapping[int, Tensor]  # (L, E) float64: last observed share, by client
    seen: Mapping[int, Tensor]  # (L, E) int64: round of that observation, -1 for never
    whole: Mapping[int, bool]  # whether the client trained the full model while exploring
    sub_moes: Mapping[int, SubMoE]  # of the clients that have been given one
    progress: Mapping[int, Progress]
    changes: tuple[Change, ...] = ()  # made at the end of the last round
    kin: Mapping[int, int] = field(default_factory=dict)  # group of similar clients, by client
    shared: Mapping[int, State] = field(default_factory=dict)  # shared part, by group


@dataclass(frozen=True)
class FedMoE:
    """The strategy. Fields say what the paper leaves open ("paper: silent") and our default.

    Attributes:
        explore_rounds: length of stage one. Paper: a few, e.g. 5, local epochs without exchange.
            With 0 there is none: first sub-MoEs are drawn (`fedavg.random_choice`), and since
            nobody has scouted there is no kinship either.
        explore_trains: clients that can hold the full model train it while exploring (paper:
            yes, LoRA); the others scout. Default: everybody scouts.
        measure: what p is, `mass` or `frequency` (paper).
        centred: compare clients by how their p differs from the mean client's. Paper: plain
            cosine.
        predict: a client that could not train the full model takes its p from those that could,
            of its own task if tasks are known, else by similarity (paper: same task, weights by
            data size). Default: it uses what it scouted.
        smooth_over: average p over this many most similar clients before choosing; 0: paper.
        sharpness: of the balanced demand; 0: choose by p alone, as the paper does.
        alpha: share of a client's memory that the first choice may fill; the rest is room for
            additions. Paper: 0 < alpha <= 1, value not given.
        theta_cap: coverage that is enough. Paper: 1.
        min_experts: per layer, at least the gate's k. Paper: silent.
        patience: rounds without a better validation score before advice is taken; None: never.
            Paper: "several" in the text, 1 in the algorithm.
        min_delta: what counts as better, share right. Paper: silent.
        adjusts: what advice may do, "both", "add" or "drop". Paper: both.
        neighbours: K of Eq. 5. Paper: silent.
        same_task_only: take advice from clients of the same task alone. Paper: from all.
        weigh: of an expert in the average: tokens (ours) or examples (paper, as we read it).
        kinship: how far a group of similar clients has a shared part of its own: 0, one for all
            (paper), to 1, its clients' mean alone. Where kinds of data contradict each other, what
            all clients share is pulled apart, however well experts are chosen.
        alike: least similarity, -1 to 1, on average over pairs, of clients that form a group.
        all_rows: send every gate row, for gates whose softmax keeps the full denominator.
        seed: keys the draws of a scout's experts in models of several MoE layers.
    """

    explore_rounds: int = 1
    explore_trains: bool = False
    measure: Callable[[ActivationProfile], Tensor] = mass
    centred: bool = True
    predict: bool = False
    smooth_over: int = 5
    sharpness: float = 2.0
    alpha: float = 1.0
    theta_cap: float = 1.0
    min_experts: int = 1
    patience: int | None = 3
    min_delta: float = 0.0
    adjusts: Literal["both", "add", "drop"] = "both"
    neighbours: int = 3
    same_task_only: bool = False
    weigh: Weigh = by_tokens
    kinship: float = 0.0
    alike: float = 0.8
    all_rows: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.explore_rounds < 0:
            raise ValueError(f"explore_rounds must be 0 or more, got {self.explore_rounds}")
        if self.adjusts not in ("both", "add", "drop"):
            raise ValueError(f'adjusts must be "both", "add" or "drop", got {self.adjusts!r}')
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be above 0 and at most 1, got {self.alpha}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1 round or None, got {self.patience}")
        for name, low in (("smooth_over", 0), ("neighbours", 1), ("min_experts", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("sharpness", "min_delta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.kinship <= 1:
            raise ValueError(f"kinship must be between 0 and 1, got {self.kinship}")
        if not -1 <= self.alike <= 1:
            raise ValueError(f"alike must be between -1 and 1, got {self.alike}")
        if not 0 <= self.theta_cap <= 1:
            raise ValueError(f"theta_cap must be between 0 and 1, got {self.theta_cap}")

    def init(self, model: MoEState, clients: Sequence[ClientInfo]) -> FedMoEState:
        """Raises ValueError, before the first round, for a client whose memory is too small."""
        for layer in sorted({e.layer for e in model.experts}):
            if (count := self._layer_count(model.experts, layer)) < self.min_experts:
                raise ValueError(
                    f"min_experts must be at most the {count} experts of layer {layer}, "
                    f"got {self.min_experts}"
                )
        for c in clients:
            if c.memory_bytes is not None:
                self._check_memory(model, c)
        first: Mapping[int, SubMoE] = {}
        if not self.explore_rounds:
            limited = [replace(c, memory_bytes=self._first_limit(model, c)) for c in clients]
            first = random_choice(model, limited, self.seed)
        return FedMoEState(0, model, {c.id: c for c in clients}, {}, {}, {}, first, {})

    def assign(
        self, state: FedMoEState, clients: Sequence[ClientInfo]
    ) -> Mapping[int, Assignment]:
        return {c.id: self._assignment(state, c) for c in clients}

    def aggregate(self, state: FedMoEState, updates: Iterable[ClientUpdate]) -> FedMoEState:
        notes: list[ClientUpdate] = []
        groups = {g: Mean() for g in state.shared}
        passing = _by_group(_noted(updates, notes), groups, state.kin)
        model = average_by_expert(state.model, passing, self.weigh)
        shared = {
            g: _between(model.shared, mean.result(state.shared[g]), self.kinship)
            for g, mean in groups.items()
        }
        notes.sort(key=lambda note: note.client)  # they came as they pleased
        # An explorer's score is that of the full model, and must not be what its part is held to.
        scored = [note for note in notes if note.client in state.sub_moes]
        state = self._observed(replace(state, model=model, shared=shared, changes=()), notes)
        exploring = state.round + 1 < self.explore_rounds
        if not exploring:
            state = self._chosen(state)
            state = self._advised(state, scored)
        return replace(state, round=state.round + 1)

    def merged(self, state: FedMoEState) -> MoEState:
        return state.model

    def phase(self, state: FedMoEState) -> str:
        return "explore" if state.round < self.explore_rounds else "train"

    def changes(self, state: FedMoEState) -> Sequence[Change]:
        return state.changes

    # Going down

    def _assignment(self, state: FedMoEState, client: ClientInfo) -> Assignment:
        everything = frozenset(state.model.experts)
        if client.id in state.sub_moes:
            sub_moe = state.sub_moes[client.id]
            own = state.model.shared
            if client.id in state.kin:
                own = state.shared[state.kin[client.id]]
            rows = rows_of(state.model, everything - sub_moe) if self.all_rows else {}
            model = MoEState(own, state.model.only(sub_moe).experts)
            return Assignment(
                state.round, model, sub_moe, validate=self.patience is not None, absent_rows=rows
            )
        if self.explore_trains and fits_whole(client, state.model):
            return Assignment(state.round, state.model, everything)
        sub_moe = self._scouting_part(state, client)
        rows = rows_of(state.model, everything - sub_moe)
        return Assignment(
            state.round, state.model.only(sub_moe), sub_moe, Job.SCOUT, absent_rows=rows
        )

    def _scouting_part(self, state: FedMoEState, client: ClientInfo) -> SubMoE:
        """The experts that a scout needs: none for one MoE layer, else as many as it can hold.

        The gate of a deeper layer sees what the experts before it put out, so a scout draws
        experts for every layer but the last; those it does not hold give nothing.
        """
        layers = sorted({e.layer for e in state.model.experts})
        count = experts_that_fit(state.model, client.memory_bytes)
        rng = numpy_generator(self.seed, state.round, client.id)
        chosen: set[ExpertId] = set()
        for layer in layers[:-1]:
            experts = sorted(e for e in state.model.experts if e.layer == layer)
            order = rng.permutation(len(experts))[:count]
            chosen |= {experts[i] for i in order}
        return frozenset(chosen)

    # Coming back

    def _observed(self, state: FedMoEState, notes: Sequence[ClientUpdate]) -> FedMoEState:
        """Remember the last observed share per client and expert, and when it was."""
        p, seen, whole = dict(state.p), dict(state.seen), dict(state.whole)
        for note in notes:
            share_LE = self.measure(note.profile).double()
            if note.client in state.sub_moes:
                observed_LE = _mask(state.sub_moes[note.client], share_LE)
            else:
                observed_LE = torch.ones_like(share_LE, dtype=torch.bool)
                whole[note.client] = whole.get(note.client, False) or bool(note.metrics)
            old_LE = p.get(note.client, torch.zeros_like(share_LE))
            when_LE = seen.get(note.client, torch.full(share_LE.shape, -1))
            p[note.client] = torch.where(observed_LE, share_LE, old_LE)
            seen[note.client] = torch.where(observed_LE, state.round, when_LE)
        return replace(state, p=p, seen=seen, whole=whole)

    def _chosen(self, state: FedMoEState) -> FedMoEState:
        """Give a first sub-MoE to every client that has been observed and has none yet."""
        known = sorted(state.p)
        waiting = [k for k in known if k not in state.sub_moes]
        if not waiting:
            return state
        p_KLE = self._wanted(state, known)
        sub_moes, changes = dict(state.sub_moes), list(state.changes)
        sizes, shared = expert_bytes_of(state.model), parameter_bytes(state.model.shared)
        for k in waiting:
            sub_moes[k], _ = largest_coverage(
                p_KLE[known.index(k)],
                sizes,
                self._first_limit(state.model, state.clients[k]),
                shared_bytes=shared,
                min_experts=self.min_experts,
                theta_cap=self.theta_cap,
            )
            changes.append(Change(k, "choose", tuple(sorted(sub_moes[k]))))
        state = replace(state, sub_moes=sub_moes, changes=tuple(changes))
        return self._grouped(state, known) if self.kinship else state

    def _grouped(self, state: FedMoEState, known: Sequence[int]) -> FedMoEState:
        """Find groups once, when first there is a choice; who comes later joins the nearest."""
        sim_KK = similarity(torch.stack([state.p[k] for k in known]), centred=self.centred)
        if not state.kin:
            kin = dict(zip(known, alike_groups(sim_KK, self.alike), strict=True))
            return replace(state, kin=kin, shared=dict.fromkeys(kin.values(), state.model.shared))
        kin = dict(state.kin)
        settled = [i for i, k in enumerate(known) if k in kin]
        for i, k in enumerate(known):
            if k not in kin:
                [nearest] = neighbours(sim_KK, i, 1, settled)
                kin[k] = state.kin[known[nearest]]
        return replace(state, kin=kin)

    def _wanted(self, state: FedMoEState, known: Sequence[int]) -> Tensor:
        """The shares to choose by, (K, L, E): measured or predicted, smoothed, balanced."""
        p_KLE = torch.stack([state.p[k] for k in known])
        sim_KK = similarity(p_KLE, centred=self.centred)
        if self.predict:
            p_KLE = self._predicted(state, known, p_KLE, sim_KK)
        if self.smooth_over:
            p_KLE = smoothed(p_KLE, sim_KK, self.smooth_over)
        if self.sharpness and len(known) > 1:  # one client alone is like the mean client
            room = [experts_that_fit(state.model, state.clients[k].memory_bytes) for k in known]
            p_KLE = balanced_demand(p_KLE, torch.tensor(room), self.sharpness)
        return p_KLE

    def _predicted(
        self, state: FedMoEState, known: Sequence[int], p_KLE: Tensor, sim_KK: Tensor
    ) -> Tensor:
        """p of clients that could not explore, from those of their task or like them that could."""
        able = [i for i, k in enumerate(known) if state.whole.get(k)]
        size_K = torch.tensor([state.clients[k].num_examples for k in known])
        out_KLE = p_KLE.clone()
        for i, k in enumerate(known):
            if i in able:
                continue
            task = state.clients[k].task
            mates = [j for j in able if task and state.clients[known[j]].task == task]
            if mates:
                weight_M = size_K[mates].double()
                out_KLE[i] = torch.einsum("m,mle->le", weight_M, p_KLE[mates]) / weight_M.sum()
            else:
                near = neighbours(sim_KK, i, self.neighbours, able)
                told_LE = advice(p_KLE, sim_KK, i, near, size_K)
                out_KLE[i] = p_KLE[i] if told_LE is None else told_LE
        return out_KLE

    def _advised(self, state: FedMoEState, notes: Sequence[ClientUpdate]) -> FedMoEState:
        """Stage two: a stuck client takes advice, keeps what helps, else goes back for good."""
        if self.patience is None:
            return state
        progress, sub_moes = dict(state.progress), dict(state.sub_moes)
        changes = list(state.changes)
        for note in notes:
            score = note.metrics.get("trained_validation")
            if score is None:
                continue
            now = progress.get(note.client, Progress())
            if score > now.best + self.min_delta or now.best < 0:
                progress[note.client] = replace(now, best=score, stale=0, previous=None)
                continue
            now = replace(now, stale=now.stale + 1)
            if now.stale >= self.patience and not now.frozen:
                held = sub_moes[note.client]
                if now.previous is not None:
                    sub_moes[note.client] = now.previous
                    back = tuple(sorted(held ^ now.previous))
                    changes += [
                        Change(note.client, "revert", back),
                        Change(note.client, "freeze", ()),
                    ]
                    now = replace(now, stale=0, previous=None, frozen=True)
                else:
                    new = self.adjusted(state, note.client)
                    if new != held:
                        action = "add" if len(new) > len(held) else "drop"
                        changes.append(Change(note.client, action, tuple(sorted(new ^ held))))
                        sub_moes[note.client] = new
                        now = replace(now, stale=0, previous=held)
            progress[note.client] = now
        return replace(
            state, progress=progress, sub_moes=sub_moes, changes=tuple(changes)
        )

    def adjusted(self, state: FedMoEState, client: int) -> SubMoE:
        """The client's experts after the advice of its K most similar clients (Eq. 4 to 6).

        n, the mean number of experts of those clients less its own, is rounded half away from
        zero. For n > 0 the n experts that they use most and it lacks are added as far as its
        memory goes; for n < 0 the |n| that they use least are dropped, never below
        `min_experts` of a layer. Without similar clients, or for n = 0, nothing changes.
        """
        held = state.sub_moes[client]
        known = sorted(state.p)
        me = known.index(client)
        p_KLE = torch.stack([state.p[k] for k in known])
        sim_KK = similarity(p_KLE, centred=self.centred)
        task = state.clients[client].task
        among = [
            i
            for i, k in enumerate(known)
            if k in state.sub_moes and (not self.same_task_only or state.clients[k].task == task)
        ]
        near = neighbours(sim_KK, me, self.neighbours, among)
        told_LE = advice(p_KLE, sim_KK, me, near)
        if told_LE is None:
            return held
        n = _rounded(
            sum(len(state.sub_moes[known[i]]) for i in near) / len(near) - len(held)
        )
        advised_LE = told_LE
        if self.adjusts == ("drop" if n > 0 else "add"):
            return held
        if n > 0:
            absent = sorted(
                set(state.model.experts) - held,
                key=lambda e: (-float(advised_LE[e.layer, e.expert]), e),
            )
            return self._with_room(state, client, held, absent[:n])
        new = set(held)
        for e in sorted(held, key=lambda e: (float(advised_LE[e.layer, e.expert]), e)):
            if len(new) > len(held) + n and self._layer_count(new, e.layer) > self.min_experts:
                new.remove(e)
        return frozenset(new)

    def _with_room(
        self, state: FedMoEState, client: int, held: SubMoE, wanted: Sequence[ExpertId]
    ) -> SubMoE:
        """`held` and those of `wanted`, in order, that the client's full memory still holds."""
        sizes = expert_bytes_of(state.model)
        limit = state.clients[client].memory_bytes
        new, used = set(held), parameter_bytes(state.model.shared) + sum(sizes[e] for e in held)
        for e in wanted:
            if limit is None or used + sizes[e] <= limit:
                new.add(e)
                used += sizes[e]
        return frozenset(new)

    def _layer_count(self, sub_moe: Iterable[ExpertId], layer: int) -> int:
        return sum(e.layer == layer for e in sub_moe)

    def _first_limit(self, model: MoEState, client: ClientInfo) -> int | None:
        """Memory that the first choice may fill."""
        limit = client.memory_bytes
        return None if limit is None else max(self._least(model), int(self.alpha * limit))

    def _least(self, model: MoEState) -> int:
        """Bytes of the shared part and the `min_experts` largest experts of each layer."""
        sizes = expert_bytes_of(model)
        total = parameter_bytes(model.shared)
        for layer in {e.layer for e in sizes}:
            largest = sorted((b for e, b in sizes.items() if e.layer == layer), reverse=True)
            total += sum(largest[: self.min_experts])
        return total

    def _check_memory(self, model: MoEState, client: ClientInfo) -> None:
        least = self._least(model)
        assert client.memory_bytes is not None
        if client.memory_bytes < least:
            raise ValueError(
                f"client {client.id}: memory_bytes must be at least {least} for the shared part "
                f"and {self.min_experts} expert(s) per MoE layer, got {client.memory_bytes}; "
                f"give it more memory, lower min_experts, or leave it out"
            )


def as_published(explore_rounds: int = 5, alpha: float = 0.8, patience: int = 3) -> FedMoE:
    """FedMoE as the paper describes it; the values that it does not give are ours."""
    return FedMoE(
        explore_rounds=explore_rounds,
        explore_trains=True,
        measure=frequency,
        centred=False,
        predict=True,
        smooth_over=0,
        sharpness=0.0,
        alpha=alpha,
        patience=patience,
        weigh=by_examples,
    )


def _by_group(
    updates: Iterable[ClientUpdate], means: Mapping[int, Mean], kin: Mapping[int, int]
) -> Iterator[ClientUpdate]:
    """Pass updates on, and fold the shared part of each into its group's mean."""
    for update in updates:
        if update.model.shared and update.client in kin:
            means[kin[update.client]].add(update.model.shared, update.num_examples)
        yield update


def _between(one: State, other: State, share: float) -> dict[str, Tensor]:
    """The way from `one` to `other`, as far as `share`; whole numbers are `one`'s."""
    return {
        n: torch.lerp(t, other[n], share) if t.is_floating_point() else t for n, t in one.items()
    }


def _noted(
    updates: Iterable[ClientUpdate], notes: list[ClientUpdate]
) -> Iterator[ClientUpdate]:
    """Pass updates on to be folded, and keep of each what is small."""
    for update in updates:
        notes.append(replace(update, model=MoEState({}, {})))
        yield update


def _mask(sub_moe: SubMoE, like_LE: Tensor) -> Tensor:
    mask_LE = torch.zeros_like(like_LE, dtype=torch.bool)
    for e in sub_moe:
        mask_LE[e.layer, e.expert] = True
    return mask_LE


def _rounded(value: float) -> int:
    """To the nearest whole number, halves away from zero."""
    return int(value + 0.5) if value >= 0 else -int(-value + 0.5)
