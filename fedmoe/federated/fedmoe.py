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
- scouts also tell how far off their shares may be, since they saw few examples, and groups of
  similar clients are found by how similar they would be without that (`similar.similarity`);
- shares are smoothed over similar clients and demand is balanced over experts before the choice
  (`similar.balanced_demand`); `sharpness=0` and `smooth_over=0` choose by the client's own
  shares as the paper does.
`as_published()` is the paper's method, as far as the paper tells it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fedmoe.federated.average import ByExpert, Weigh, averaged, by_examples, by_tokens
from fedmoe.federated.fedavg import random_choice
from fedmoe.federated.folding import fold
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
    smoothed_in_groups,
)
from fedmoe.federated.sums import Sums
from fedmoe.population import ById, Population, by_id, first_of_each_budget
from fedmoe.profile import FREQUENCY_ERROR, MASS_ERROR
from fedmoe.rng import numpy_generator
from fedmoe.state import parameter_bytes, rows_of
from fedmoe.table import Form, Table, ids_of
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
    Term,
    Terms,
)

KIN = "kin"  # (KIN, g) is the key of the mean of group g's shared parts
DECIMALS = 4  # of a balanced demand, to which two must differ
NEIGHBOURHOOD = 0  # keys the draw of clients among whom similar ones are sought

V = TypeVar("V")


def mass(profile: ActivationProfile) -> Tensor:
    """Share of the gate's score that each expert gets, (L, E): graded, so few examples tell."""
    return profile.mass_LE


def frequency(profile: ActivationProfile) -> Tensor:
    """Share of activations that each expert gets, (L, E): the paper's p."""
    return profile.frequency_LE


# What scouts tell of the error of each measure.
ERRORS: Mapping[Callable[[ActivationProfile], Tensor], str] = {
    mass: MASS_ERROR,
    frequency: FREQUENCY_ERROR,
}


@dataclass(frozen=True)
class WithKin(ByExpert):
    """Terms by expert, and the shared part once more for the client's group."""

    kin: Mapping[int, int] = field(default_factory=dict)

    def __call__(self, update: ClientUpdate) -> Iterator[Term]:
        yield from super().__call__(update)
        if update.model.shared and update.client in self.kin:
            group = self.kin[update.client]
            yield Term((KIN, group), update.model.shared, update.num_examples)


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
    p: Mapping[int, Tensor]  # (L, E), of a population float32: last observed share, by client
    seen: Mapping[int, Tensor]  # (L, E): round of that observation, -1 for never
    whole: Mapping[int, bool]  # whether the client trained the full model while exploring
    sub_moes: Mapping[int, SubMoE]  # of the clients that have been given one
    progress: Mapping[int, Progress]
    changes: tuple[Change, ...] = ()  # made in the last round
    kin: Mapping[int, int] = field(default_factory=dict)  # group of similar clients, by client
    shared: Mapping[int, State] = field(default_factory=dict)  # shared part, by group
    chosen: tuple[Change, ...] = ()  # made in this round, before its work
    error: Mapping[int, float] = field(default_factory=dict)  # of p, as told by those who scouted


@dataclass(frozen=True, eq=False)
class Around:
    """Clients among whom similar ones are sought, and how similar they are."""

    known: Sequence[int]  # ascending
    p_KLE: Tensor
    sim_KK: Tensor


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
        smooth_over: average p over this many most similar clients before choosing, and over all of
            a client's group (`kinship`) where that has as many others: else clients of one kind may
            get different experts, and each of these learns from a few. 0: paper.
        sharpness: of the balanced demand; 0: choose by p alone, as the paper does.
        alpha: share of a client's memory that the first choice may fill; the rest is room for
            additions. Paper: 0 < alpha <= 1, value not given.
        theta_cap: coverage that is enough. Paper: 1.
        min_experts: per layer, at least the gate's k. Paper: silent. A gate that adds up
            (`TopKGate`) as many experts as the smallest device holds needs that number here.
        patience: rounds without a better validation score before advice is taken; None: never.
            Paper: "several" in the text, 1 in the algorithm.
        min_delta: what counts as better, share right. Paper: silent.
        adjusts: what advice may do, "both", "add" or "drop". Paper: both.
        neighbours: K of Eq. 5. Paper: silent.
        same_task_only: take advice from clients of the same task alone. Paper: from all.
        neighbourhood: similar clients are sought among all that have taken part while these are
            no more, and else among so many of them, drawn anew in each round. Paper: all.
        ask_newcomers: once exploring is over, a client that comes for the first time scouts and
            trains in one round, by one more message down and up. Default: it scouts, and trains
            when it takes part again; where few of many do, that may be never.
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
    neighbourhood: int = 500
    ask_newcomers: bool = False
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
        for name, low in (
            ("smooth_over", 0),
            ("neighbours", 1),
            ("min_experts", 1),
            ("neighbourhood", 2),
        ):
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
        for c in first_of_each_budget(clients):
            if c.memory_bytes is not None:
                self._check_memory(model, c)
        first: Mapping[int, SubMoE] = {}
        if not self.explore_rounds and not isinstance(clients, Population):
            first = self._drawn(model, clients)
        return FedMoEState(0, model, by_id(clients), {}, {}, {}, first, {})

    def ask(
        self, state: FedMoEState, clients: Sequence[ClientInfo]
    ) -> Mapping[int, Assignment]:
        """Newcomers are to scout, if they are asked at all."""
        if not self.ask_newcomers or state.round < self.explore_rounds:
            return {}
        return {c.id: self._scouting(state, c) for c in clients if self._held(state, c) is None}

    def heard(self, state: FedMoEState, answers: Iterable[ClientUpdate]) -> FedMoEState:
        notes = sorted(answers, key=lambda note: note.client)
        state = self._observed(replace(state, changes=()), notes)
        state = self._chosen(state, [note.client for note in notes])
        return replace(state, changes=(), chosen=state.changes)

    def assign(
        self, state: FedMoEState, clients: Sequence[ClientInfo]
    ) -> Mapping[int, Assignment]:
        return {c.id: self._assignment(state, c) for c in clients}

    def aggregate(self, state: FedMoEState, updates: Iterable[ClientUpdate]) -> FedMoEState:
        return fold(self, state, updates)

    def terms(self, state: FedMoEState) -> Terms:
        return WithKin(self.weigh, kin=state.kin) if state.kin else ByExpert(self.weigh)

    def settle(
        self, state: FedMoEState, sums: Sums, notes: Sequence[ClientUpdate]
    ) -> FedMoEState:
        model = averaged(state.model, sums)
        shared = {
            g: _between(model.shared, sums.mean((KIN, g), own), self.kinship)
            for g, own in state.shared.items()
        }
        state = self._with_drawn(state, notes)
        # An explorer's score is that of the full model, and must not be what its part is held to.
        scored = [note for note in notes if note.client in state.sub_moes]
        state = replace(state, model=model, shared=shared, changes=state.chosen, chosen=())
        state = self._observed(state, notes)
        left = self.explore_rounds - (state.round + 1)  # rounds of exploring
        if left <= 0:
            came = [note.client for note in notes]
            # Those who explored before the last such round have waited for its end.
            state = self._chosen(state, ids_of(state.p).tolist() if left == 0 else came)
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
        sub_moe = self._held(state, client)
        if sub_moe is not None:
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
        return self._scouting(state, client)

    def _held(self, state: FedMoEState, client: ClientInfo) -> SubMoE | None:
        """The client's experts; None before it has any.

        Where nobody explores, those of a population's clients are drawn when they are asked for.
        """
        if client.id in state.sub_moes:
            return state.sub_moes[client.id]
        if self.explore_rounds or not isinstance(state.clients, ById):
            return None
        return self._drawn(state.model, [client])[client.id]

    def _drawn(self, model: MoEState, clients: Sequence[ClientInfo]) -> dict[int, SubMoE]:
        limited = [replace(c, memory_bytes=self._first_limit(model, c)) for c in clients]
        return random_choice(model, limited, self.seed)

    def _with_drawn(self, state: FedMoEState, notes: Sequence[ClientUpdate]) -> FedMoEState:
        """The state with what these clients held in this round, where it was drawn for it."""
        new = {
            note.client: held
            for note in notes
            if note.client not in state.sub_moes
            and (held := self._held(state, state.clients[note.client])) is not None
        }
        return replace(state, sub_moes=self._with_sub_moes(state, new)) if new else state

    def _scouting(self, state: FedMoEState, client: ClientInfo) -> Assignment:
        sub_moe = self._scouting_part(state, client)
        rows = rows_of(state.model, frozenset(state.model.experts) - sub_moe)
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
        if not notes:
            return state
        p: dict[int, Tensor] = {}
        seen: dict[int, Tensor] = {}
        whole: dict[int, bool] = {}
        error: dict[int, float] = {}
        for note in notes:
            share_LE = self.measure(note.profile).double()
            if note.client in state.sub_moes:
                observed_LE = _mask(state.sub_moes[note.client], share_LE)
            else:
                observed_LE = torch.ones_like(share_LE, dtype=torch.bool)
                before = state.whole.get(note.client, False)
                whole[note.client] = before or "loss" in note.metrics
                error[note.client] = self._error(note)
            old_LE = state.p.get(note.client, torch.zeros_like(share_LE))
            when_LE = state.seen.get(note.client, torch.full(share_LE.shape, -1))
            p[note.client] = torch.where(observed_LE, share_LE, old_LE)
            seen[note.client] = torch.where(observed_LE, state.round, when_LE)
        shape = tuple(next(iter(p.values())).shape)
        return replace(
            state,
            p=_changed(state.p, p, Form(Tensor, dtype=self._precision(state), shape=shape)),
            seen=_changed(state.seen, seen, Form(Tensor, dtype="int32", shape=shape)),
            whole=_changed(state.whole, whole, Form(bool)),
            error=_changed(state.error, error, Form(float)),
        )

    def _error(self, note: ClientUpdate) -> float:
        """How far off a scout says that its p may be; 0 where nobody says."""
        name = ERRORS.get(self.measure)
        return 0.0 if name is None else note.metrics.get(name, 0.0)

    def _precision(self, state: FedMoEState) -> str:
        """Of p: half as many bytes where there may be very many."""
        return "float32" if isinstance(state.clients, ById) else "float64"

    def _known(self, state: FedMoEState, about: Iterable[int]) -> list[int]:
        """Clients among whom those like `about` are sought, ascending; `about` are among them."""
        if len(state.p) <= self.neighbourhood:
            return [int(k) for k in ids_of(state.p)]
        known = ids_of(state.kin if state.kin else state.p)
        if len(known) > self.neighbourhood:
            rng = numpy_generator(self.seed, state.round, 0, NEIGHBOURHOOD)
            known = known[rng.choice(len(known), self.neighbourhood, replace=False)]
        return sorted({*about, *known.tolist()})

    def _chosen(self, state: FedMoEState, clients: Iterable[int]) -> FedMoEState:
        """Give a first sub-MoE to those clients that have been observed and have none yet."""
        waiting = [k for k in clients if k in state.p and k not in state.sub_moes]
        for start in range(0, len(waiting), self.neighbourhood):
            state = self._chosen_for(state, waiting[start : start + self.neighbourhood])
        return state

    def _chosen_for(self, state: FedMoEState, waiting: Sequence[int]) -> FedMoEState:
        known = self._known(state, waiting)
        if self.kinship:
            state = self._grouped(state, known)
        p_KLE = self._wanted(state, known)
        place = {k: i for i, k in enumerate(known)}
        sub_moes: dict[int, SubMoE] = {}
        sizes, shared = expert_bytes_of(state.model), parameter_bytes(state.model.shared)
        for k in waiting:
            sub_moes[k], _ = largest_coverage(
                p_KLE[place[k]],
                sizes,
                self._first_limit(state.model, state.clients[k]),
                shared_bytes=shared,
                min_experts=self.min_experts,
                theta_cap=self.theta_cap,
            )
        changes = [Change(k, "choose", tuple(sorted(sub_moes[k]))) for k in waiting]
        return replace(
            state,
            sub_moes=self._with_sub_moes(state, sub_moes),
            changes=(*state.changes, *changes),
        )

    def _with_sub_moes(
        self, state: FedMoEState, changes: Mapping[int, SubMoE]
    ) -> Mapping[int, SubMoE]:
        form = Form(SubMoE, experts=tuple(sorted(state.model.experts)))
        return _changed(state.sub_moes, changes, form)

    def _grouped(self, state: FedMoEState, known: Sequence[int]) -> FedMoEState:
        """Find groups once, when first there is a choice; who comes later joins the nearest."""
        error_K = torch.tensor([state.error.get(k, 0.0) for k in known])
        p_KLE = _stacked(state.p, known)
        sim_KK = similarity(p_KLE, centred=self.centred, error_K=error_K)
        kin: dict[int, int] = {}
        if not state.kin:
            kin = dict(zip(known, alike_groups(sim_KK, self.alike), strict=True))
            shared = dict.fromkeys(kin.values(), state.model.shared)
            return replace(state, kin=_changed({}, kin, Form(int)), shared=shared)
        settled = [i for i, k in enumerate(known) if k in state.kin]
        for i, k in enumerate(known):
            if k not in state.kin:
                [nearest] = neighbours(sim_KK, i, 1, settled)
                kin[k] = state.kin[known[nearest]]
        return replace(state, kin=_changed(state.kin, kin, Form(int)))

    def _wanted(self, state: FedMoEState, known: Sequence[int]) -> Tensor:
        """The shares to choose by, (K, L, E): measured or predicted, smoothed, balanced."""
        p_KLE = _stacked(state.p, known)
        sim_KK = similarity(p_KLE, centred=self.centred)
        if self.predict:
            p_KLE = self._predicted(state, known, p_KLE, sim_KK)
        alone_KLE = p_KLE
        if self.smooth_over:
            p_KLE = smoothed(alone_KLE, sim_KK, self.smooth_over)
            if self.kinship:
                group_K = torch.tensor([state.kin[k] for k in known])
                p_KLE = smoothed_in_groups(alone_KLE, p_KLE, group_K, self.smooth_over)
        if self.sharpness and len(known) > 1:  # one client alone is like the mean client
            limits = [state.clients[k].memory_bytes for k in known]
            fits = {limit: experts_that_fit(state.model, limit) for limit in set(limits)}
            room = [fits[limit] for limit in limits]
            demand_KLE = balanced_demand(p_KLE, torch.tensor(room), self.sharpness)
            # Between demands that hardly differ the shares decide, and not how sums were rounded:
            # if there are two kinds of clients, a kind demands all that it prefers alike.
            p_KLE = demand_KLE.round(decimals=DECIMALS) + 10.0 ** -(DECIMALS + 1) * p_KLE
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
        progress: dict[int, Progress] = {}
        sub_moes: dict[int, SubMoE] = {}
        changes = list(state.changes)
        around: Around | None = None
        for note in notes:
            score = note.metrics.get("trained_validation")
            if score is None:
                continue
            now = state.progress.get(note.client, Progress())
            if score > now.best + self.min_delta or now.best < 0:
                progress[note.client] = replace(now, best=score, stale=0, previous=None)
                continue
            now = replace(now, stale=now.stale + 1)
            if now.stale >= self.patience and not now.frozen:
                held = state.sub_moes[note.client]
                if now.previous is not None:
                    sub_moes[note.client] = now.previous
                    back = tuple(sorted(held ^ now.previous))
                    changes += [
                        Change(note.client, "revert", back),
                        Change(note.client, "freeze", ()),
                    ]
                    now = replace(now, stale=0, previous=None, frozen=True)
                else:
                    around = around or self._around(state, [n.client for n in notes])
                    new = self.adjusted(state, note.client, around)
                    if new != held:
                        action = "add" if len(new) > len(held) else "drop"
                        changes.append(Change(note.client, action, tuple(sorted(new ^ held))))
                        sub_moes[note.client] = new
                        now = replace(now, stale=0, previous=held)
            progress[note.client] = now
        form = Form(Progress, experts=tuple(sorted(state.model.experts)))
        return replace(
            state,
            progress=_changed(state.progress, progress, form),
            sub_moes=self._with_sub_moes(state, sub_moes) if sub_moes else state.sub_moes,
            changes=tuple(changes),
        )

    def _around(self, state: FedMoEState, clients: Iterable[int]) -> Around:
        known = self._known(state, clients)
        p_KLE = _stacked(state.p, known)
        return Around(known, p_KLE, similarity(p_KLE, centred=self.centred))

    def adjusted(
        self, state: FedMoEState, client: int, around: Around | None = None
    ) -> SubMoE:
        """The client's experts after the advice of its K most similar clients (Eq. 4 to 6).

        n, the mean number of experts of those clients less its own, is rounded half away from
        zero. For n > 0 the n experts that they use most and it lacks are added as far as its
        memory goes; for n < 0 the |n| that they use least are dropped, never below
        `min_experts` of a layer. Without similar clients, or for n = 0, nothing changes.

        Args:
            around: among whom to seek them, itself among them; None: drawn for it alone.
        """
        held = state.sub_moes[client]
        around = around or self._around(state, [client])
        known, p_KLE, sim_KK = around.known, around.p_KLE, around.sim_KK
        me = known.index(client)
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


def _between(one: State, other: State, share: float) -> dict[str, Tensor]:
    """The way from `one` to `other`, as far as `share`; whole numbers are `one`'s."""
    return {
        n: torch.lerp(t, other[n], share) if t.is_floating_point() else t for n, t in one.items()
    }


def _stacked(p: Mapping[int, Tensor], clients: Iterable[int]) -> Tensor:
    return torch.stack([p[k] for k in clients]).double()


def _changed(values: Mapping[int, V], changes: Mapping[int, V], form: Form) -> Mapping[int, V]:
    """Values with changes, in a table; `form` is of one that is not there yet."""
    table = values if isinstance(values, Table) else Table.of(form, values)
    return table | changes


def _mask(sub_moe: SubMoE, like_LE: Tensor) -> Tensor:
    mask_LE = torch.zeros_like(like_LE, dtype=torch.bool)
    for e in sub_moe:
        mask_LE[e.layer, e.expert] = True
    return mask_LE


def _rounded(value: float) -> int:
    """To the nearest whole number, halves away from zero."""
    return int(value + 0.5) if value >= 0 else -int(-value + 0.5)
