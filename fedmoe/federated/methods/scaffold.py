"""SCAFFOLD: control variates against client drift.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, "SCAFFOLD: Stochastic Controlled Averaging for
Federated Learning", arXiv:1910.06378. A client takes its steps along g - c_i + c: its gradient,
less its own control, plus the server's. Its new control (option II) is c_i - c + (x - y) / (K lr),
for x before and y after K steps, and the server's moves by the clients' mean change, times the
share of clients that took part.

`Scaffold` is the server and `Controlled` the client, and one needs the other. The server's
control travels down in `Assignment.extra` and a client's change of its own up in
`ClientUpdate.extra`, under role names (see `state.NameTest`), which doubles the traffic.

How ours differs: for plain SGD, option II's control is the mean of the gradients that the client
met on its way; that mean is what ours keeps, so that momentum, weight decay and clipping do not
leak into the controls. An expert without tokens takes no step, so K is counted for each
parameter, and what has not moved keeps its control. The model itself is averaged as in FedAvg,
with clients' weights and a server step of 1.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe.federated.average import ByExpert, Weigh, averaged, by_tokens
from fedmoe.federated.folding import fold
from fedmoe.federated.local import Correction, LocalMethod, LocalTask, Trained
from fedmoe.federated.sums import Sums
from fedmoe.state import ROW
from fedmoe.types import (
    Assignment,
    Change,
    ClientInfo,
    ClientUpdate,
    MoEState,
    State,
    Term,
    Terms,
)

CONTROL = "control"  # the key of the mean of the clients' changes


@dataclass(frozen=True, eq=False)
class ScaffoldState:
    """What the server carries from one round to the next."""

    round: int
    model: MoEState
    control: State  # by role
    num_clients: int  # registered, whether they take part or not


@dataclass(frozen=True)
class Scaffold:
    """The strategy: everybody trains the whole model. Its clients are `Controlled`."""

    weigh: Weigh = by_tokens

    def init(self, model: MoEState, clients: Sequence[ClientInfo]) -> ScaffoldState:
        return ScaffoldState(0, model, zeros_by_role(model), len(clients))

    def assign(
        self, state: ScaffoldState, clients: Sequence[ClientInfo]
    ) -> Mapping[int, Assignment]:
        whole = frozenset(state.model.experts)
        return {
            c.id: Assignment(state.round, state.model, whole, extra=state.control)
            for c in clients
        }

    def aggregate(self, state: ScaffoldState, updates: Iterable[ClientUpdate]) -> ScaffoldState:
        return fold(self, state, updates)

    def terms(self, state: ScaffoldState) -> Terms:
        return WithControl(self.weigh)

    def settle(
        self, state: ScaffoldState, sums: Sums, notes: Sequence[ClientUpdate]
    ) -> ScaffoldState:
        mean = sums.mean(CONTROL, {n: torch.zeros_like(c) for n, c in state.control.items()})
        senders = sums[CONTROL].weights() if CONTROL in sums else {}
        control = {
            n: c + mean[n] * (senders.get(n, 0) / state.num_clients)
            for n, c in state.control.items()
        }
        return ScaffoldState(
            state.round + 1, averaged(state.model, sums), control, state.num_clients
        )

    def merged(self, state: ScaffoldState) -> MoEState:
        return state.model

    def phase(self, state: ScaffoldState) -> str:
        return "train"

    def changes(self, state: ScaffoldState) -> Sequence[Change]:
        return ()


@dataclass(frozen=True)
class WithControl(ByExpert):
    """Terms by expert, and the change of the client's control: each change counts as one."""

    def __call__(self, update: ClientUpdate) -> Iterator[Term]:
        yield from super().__call__(update)
        yield Term(CONTROL, update.extra, 1)


@dataclass(frozen=True)
class Controlled(LocalMethod):
    """The client: it keeps its own controls and sends how they changed."""

    @property
    def keeps(self) -> bool:
        return True

    @property
    def fits(self) -> bool:
        return True

    def train(self, task: LocalTask) -> Trained:
        correction = Correction(shift_of(task))
        profile, loss = task.train(adjust=correction)
        steps = correction.steps
        new = {n: (total / steps[n]).cpu() for n, total in correction.met.items()}
        change = {n: c - task.kept[n] if n in task.kept else c for n, c in new.items()}
        return Trained(profile, loss, kept={**task.kept, **new}, extra=change)


def shift_of(task: LocalTask) -> dict[str, Tensor]:
    """The server's control less the client's own, which is 0 until the client has trained once."""
    shift = dict(task.extra)
    for name, c in task.kept.items():
        # The server sends none where only the cost of a step is measured.
        shift[name] = shift[name] - c if name in shift else -c
    return {n: c.to(task.device) for n, c in shift.items()}


def zeros_by_role(model: MoEState) -> dict[str, Tensor]:
    """A zero for each parameter of the whole model, under the names of `state.named_by_role`.

    The server does not know which shared values are buffers; a client sends nothing back for them.
    """
    zeros = {n: torch.zeros_like(t) for n, t in model.shared.items() if t.is_floating_point()}
    for e, own in model.experts.items():
        for name, value in own.items():
            if name.startswith(ROW):
                shape = (_num_experts(model, e.layer), *value.shape)
                zeros[f"gates.{e.layer}.{name.removeprefix(ROW)}"] = value.new_zeros(shape)
            elif value.is_floating_point():
                zeros[f"experts.{e.layer}.{e.expert}.{name}"] = torch.zeros_like(value)
    return zeros


def _num_experts(model: MoEState, layer: int) -> int:
    return 1 + max(e.expert for e in model.experts if e.layer == layer)
