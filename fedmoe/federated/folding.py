"""Strategies that only average say so as data, so that any process may fold any of the updates.

What an update adds to which mean (`terms`) is a value that travels; what a round makes of the means
(`settle`) happens once, at the server. Between the two sums are formed, in any number of processes
and in any grouping, with the same bits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeGuard

from fedmoe.federated.check import RefusedUpdateError
from fedmoe.federated.sums import Sums
from fedmoe.types import (
    Assignment,
    ClientFailure,
    ClientUpdate,
    MoEState,
    Note,
    Refusal,
    S,
    Strategy,
    Terms,
)

Accept = Callable[[ClientUpdate, Assignment], None]  # raises RefusedUpdateError
Measure = Callable[[Assignment | ClientUpdate], int]  # bytes on the wire


class FoldingStrategy(Strategy[S], Protocol[S]):
    """A strategy whose `aggregate` is to fold terms and to settle, `fold(self, state, updates)`."""

    def terms(self, state: S) -> Terms:
        """What each update adds to the means of this round."""
        ...

    def settle(self, state: S, sums: Sums, notes: Sequence[ClientUpdate]) -> S:
        """The state after a round; `notes` are its updates without parameters, by client."""
        ...


@dataclass(frozen=True, eq=False)
class Folded:
    """Some clients' updates as sums, and whose they are. It counts as a whole or not at all."""

    notes: tuple[Note, ...]
    refused: tuple[Refusal, ...]
    sums: Sums


class FoldingExchange(Protocol):
    """An exchange that can also fold updates where clients run, and bring the sums back."""

    def __call__(
        self, assignments: Mapping[int, Assignment]
    ) -> Iterable[ClientUpdate | ClientFailure]: ...

    def fold(
        self,
        assignments: Mapping[int, Assignment],
        terms: Terms,
        accept: Accept,
        measure: Measure,
    ) -> Iterable[Folded | ClientFailure]:
        """Do all jobs, and come back with every client in one `Folded` or as a failure.

        Where clients run there is a `Folding(terms, accept, measure)` that takes their updates.
        """
        ...


@dataclass(eq=False)
class Folding:
    """Takes updates where they are made, and leaves sums and notes of them."""

    terms: Terms
    accept: Accept
    measure: Measure
    _notes: list[Note] = field(default_factory=list)
    _refused: list[Refusal] = field(default_factory=list)
    _sums: Sums = field(default_factory=Sums)

    def add(self, update: ClientUpdate, assignment: Assignment) -> None:
        """Fold it in, unless it is refused."""
        bytes_up = self.measure(update)
        try:
            self.accept(update, assignment)
        except RefusedUpdateError as why:
            self._refused.append(Refusal(update.client, str(why), bytes_up))
            return
        self._sums.add(self.terms(update))
        self._notes.append(Note(without_parameters(update), bytes_up))

    def done(self) -> Folded:
        """All that was added."""
        return Folded(tuple(self._notes), tuple(self._refused), self._sums)


def fold(strategy: FoldingStrategy[S], state: S, updates: Iterable[ClientUpdate]) -> S:
    """`aggregate` of a strategy that folds."""
    sums, terms = Sums(), strategy.terms(state)
    notes: list[ClientUpdate] = []
    for update in updates:
        sums.add(terms(update))
        notes.append(without_parameters(update))
    notes.sort(key=lambda note: note.client)  # they came as they pleased
    return strategy.settle(state, sums, notes)


def without_parameters(update: ClientUpdate) -> ClientUpdate:
    """What is small of an update."""
    return replace(update, model=MoEState({}, {}), extra={})


def folds(strategy: Strategy[S]) -> TypeGuard[FoldingStrategy[S]]:
    """Whether sums are all that this strategy needs.

    Who derives from one that folds and writes an `aggregate` of their own is taken at their word.
    """
    for kind in type(strategy).__mro__:
        if "settle" in vars(kind):
            return True
        if "aggregate" in vars(kind):
            return False
    return False
