"""All registered clients in a few bytes each, where a tuple of `ClientInfo` would take hundreds.

A `Population` is a sequence of `ClientInfo` over arrays, in order of id; each is made when it is
asked for. Whatever takes a sequence of clients takes one, and the functions below do for both
kinds of sequence what must not look at every client one by one.

Shape suffix: C clients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from fedmoe.types import ClientInfo

NO_LIMIT = -1  # in `memory_C`
NO_TASK = 0  # in `task_C`; task t is number t + 1
CHUNK = 4096  # clients that are turned into Python's numbers at once, when all are gone through
ID_LIMIT = 2**32  # ids key random draws, see fedmoe.rng

Whole = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False, repr=False)
class Population(Sequence[ClientInfo]):
    """Clients by their number, in arrays that must not be written to.

    Attributes:
        num_examples_C: training examples that each says it has.
        memory_C: budget of each in bytes, NO_LIMIT for none; None: nobody has a limit.
        task_C: for each NO_TASK, or 1 + its task's place in `tasks`; None: nobody says.
        tasks: the names of tasks.
        id_C: ids, ascending; None: 0, 1, 2 ...
    """

    num_examples_C: Whole
    memory_C: Whole | None = None
    task_C: Whole | None = None
    tasks: tuple[str, ...] = ()
    id_C: Whole | None = None

    def __post_init__(self) -> None:
        for name in ("num_examples_C", "memory_C", "task_C", "id_C"):
            value = getattr(self, name)
            if value is None:
                continue
            if value.shape != (len(self),) or not np.issubdtype(value.dtype, np.integer):
                raise ValueError(
                    f"{name} must hold a whole number for each of the {len(self)} clients, got "
                    f"{value.dtype} of shape {value.shape}"
                )
        if self.task_C is not None and len(self):
            low, high = int(self.task_C.min()), int(self.task_C.max())
            if low < NO_TASK or high > len(self.tasks):
                raise ValueError(
                    f"task_C must be from {NO_TASK} to the {len(self.tasks)} tasks, got {low} to "
                    f"{high}"
                )
        if self.id_C is not None and len(self):
            if int(self.id_C[0]) < 0 or int(self.id_C[-1]) >= ID_LIMIT:
                raise ValueError(
                    f"id_C must be 0 or more and below 2**32, got {self.id_C[0]} to {self.id_C[-1]}"
                )
            if bool((np.diff(self.id_C) <= 0).any()):
                raise ValueError("id_C must ascend, and have each id once")

    @staticmethod
    def of(clients: Iterable[ClientInfo]) -> Population:
        """The same clients as arrays, in order of id.

        Raises:
            ValueError: two have one id.
        """
        ordered = sorted(clients, key=lambda c: c.id)
        tasks = tuple(sorted({c.task for c in ordered if c.task is not None}))
        number: dict[str | None, int] = {t: i + 1 for i, t in enumerate(tasks)}
        number[None] = NO_TASK
        limits = [NO_LIMIT if c.memory_bytes is None else c.memory_bytes for c in ordered]
        id_C = np.array([c.id for c in ordered], np.int64)
        return Population(
            np.array([c.num_examples for c in ordered], np.int64),
            np.array(limits, np.int64) if any(n != NO_LIMIT for n in limits) else None,
            np.array([number[c.task] for c in ordered], np.int32) if tasks else None,
            tasks,
            None if np.array_equal(id_C, np.arange(len(id_C))) else id_C,
        )

    def __len__(self) -> int:
        return len(self.num_examples_C)

    @overload
    def __getitem__(self, place: int) -> ClientInfo: ...
    @overload
    def __getitem__(self, place: slice) -> Population: ...
    def __getitem__(self, place: int | slice) -> ClientInfo | Population:
        """A client by its place; a slice is a population over the same arrays."""
        if isinstance(place, slice):
            low, high, step = place.indices(len(self))
            if step < 1:
                raise ValueError(f"a slice of clients must have a step of 1 or more, got {step}")
            return self._cut(slice(low, max(low, high), step))
        place = int(place)
        if not -len(self) <= place < len(self):
            raise IndexError(f"place must be below the {len(self)} clients, got {place}")
        place %= len(self)
        memory = None if self.memory_C is None else int(self.memory_C[place])
        task = NO_TASK if self.task_C is None else int(self.task_C[place])
        return ClientInfo(
            place if self.id_C is None else int(self.id_C[place]),
            None if memory == NO_LIMIT else memory,
            int(self.num_examples_C[place]),
            None if task == NO_TASK else self.tasks[task - 1],
        )

    def __iter__(self) -> Iterator[ClientInfo]:
        for start in range(0, len(self), CHUNK):
            part = self[start : start + CHUNK]
            many = range(len(part))
            memory = [None] * len(part) if part.memory_C is None else part.memory_C.tolist()
            task = [NO_TASK] * len(part) if part.task_C is None else part.task_C.tolist()
            examples, ids = part.num_examples_C.tolist(), part.ids.tolist()
            for i in many:
                yield ClientInfo(
                    ids[i],
                    None if memory[i] == NO_LIMIT else memory[i],
                    examples[i],
                    None if task[i] == NO_TASK else self.tasks[task[i] - 1],
                )

    def __contains__(self, value: object) -> bool:
        return isinstance(value, ClientInfo) and self.by_id.get(value.id) == value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Population) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Population({len(self)} clients, {self.digest[:16]})"

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """All ids, ascending; made at each call where they are the places."""
        if self.id_C is None:
            return np.arange(len(self), dtype=np.int64)
        return self.id_C.astype(np.int64, copy=False)

    @property
    def by_id(self) -> ById:
        """The clients by their ids."""
        return ById(self)

    def place_of(self, client: int) -> int | None:
        """Where the client of this id stands; None where there is no such client."""
        if self.id_C is None:
            return client if 0 <= client < len(self) else None
        place = int(np.searchsorted(self.id_C, client))
        return place if place < len(self) and self.id_C[place] == client else None

    def with_memory(self, memory_C: npt.ArrayLike) -> Population:
        """The same clients under these budgets in bytes, NO_LIMIT for none."""
        return replace(self, memory_C=np.asarray(memory_C, np.int64))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what all clients are, hexadecimal; the same for equal clients, everywhere."""
        total = hashlib.sha256(b"fedmoe population 1")
        used = [] if self.task_C is None else np.unique(self.task_C).tolist()
        tasks = tuple(sorted(self.tasks[t - 1] for t in used if t != NO_TASK))
        total.update("\0".join([str(len(self)), *tasks]).encode())
        # What says no more than that there is nothing to say is left out.
        limited = self.memory_C is not None and bool((self.memory_C != NO_LIMIT).any())
        numbered = self.id_C is not None and bool((self.id_C != np.arange(len(self))).any())
        columns = (
            self.num_examples_C,
            self.memory_C if limited else None,
            _tasks(self, tasks) if tasks else None,
            self.id_C if numbered else None,
        )
        for column in columns:
            total.update(b"-" if column is None else column.astype("<i8").tobytes())
        return total.hexdigest()

    def _cut(self, places: slice) -> Population:
        """The clients at these places; they keep their ids."""

        def cut(column: Whole | None) -> Whole | None:
            return None if column is None else column[places]

        id_C = cut(self.id_C)
        if self.id_C is None and (places.start, places.step) != (0, 1):
            id_C = np.arange(places.start, places.stop, places.step, dtype=np.int64)
        return replace(
            self,
            num_examples_C=self.num_examples_C[places],
            memory_C=cut(self.memory_C),
            task_C=cut(self.task_C),
            id_C=id_C,
        )


@dataclass(frozen=True, eq=False)
class ById(Mapping[int, ClientInfo]):
    """The clients of a population by their ids, each made when it is asked for."""

    population: Population

    def __getitem__(self, client: int) -> ClientInfo:
        place = self.population.place_of(client)
        if place is None:
            raise KeyError(client)
        return self.population[place]

    def __contains__(self, client: object) -> bool:
        return isinstance(client, Integral) and self.population.place_of(int(client)) is not None

    def __iter__(self) -> Iterator[int]:
        return iter(self.population.ids.tolist())

    def __len__(self) -> int:
        return len(self.population)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ById):
            return self.population == other.population
        return super().__eq__(other)

    def __hash__(self) -> int:
        return hash(self.population)


def by_id(clients: Sequence[ClientInfo]) -> Mapping[int, ClientInfo]:
    """Clients by their ids."""
    return clients.by_id if isinstance(clients, Population) else {c.id: c for c in clients}


def in_order(clients: Sequence[ClientInfo]) -> Sequence[ClientInfo]:
    """Clients in order of id."""
    if isinstance(clients, Population):
        return clients
    return sorted(clients, key=lambda c: c.id)


def first_of_each_budget(clients: Sequence[ClientInfo]) -> list[ClientInfo]:
    """One client for each different budget, the first that has it, in the order of clients."""
    if isinstance(clients, Population):
        if clients.memory_C is None:
            return [clients[0]] if len(clients) else []
        _, places = np.unique(clients.memory_C, return_index=True)
        return [clients[int(place)] for place in sorted(places)]
    found: dict[int | None, ClientInfo] = {}
    for c in clients:
        found.setdefault(c.memory_bytes, c)
    return list(found.values())


def together(
    clients: Sequence[ClientInfo], others: Sequence[ClientInfo]
) -> Sequence[ClientInfo]:
    """All of both.

    Raises:
        ValueError: one of them is a population, and two clients have one id.
    """
    if not len(others):
        return clients
    if not isinstance(clients, Population) and not isinstance(others, Population):
        return (*clients, *others)
    one, other = (p if isinstance(p, Population) else Population.of(p) for p in (clients, others))
    tasks = tuple(sorted({*one.tasks, *other.tasks}))
    ids = np.concatenate([one.ids, other.ids])
    order = np.argsort(ids, kind="stable")
    limited = one.memory_C is not None or other.memory_C is not None
    return Population(
        np.concatenate([one.num_examples_C, other.num_examples_C])[order],
        np.concatenate([_memory(one), _memory(other)])[order] if limited else None,
        np.concatenate([_tasks(one, tasks), _tasks(other, tasks)])[order] if tasks else None,
        tasks,
        None if np.array_equal(ids[order], np.arange(len(ids))) else ids[order],
    )


def _memory(population: Population) -> Whole:
    if population.memory_C is None:
        return np.full(len(population), NO_LIMIT, np.int64)
    return population.memory_C


def _tasks(population: Population, tasks: Sequence[str]) -> Whole:
    """Each client's task by its number among these, of which all that are used are."""
    if population.task_C is None:
        return np.full(len(population), NO_TASK, np.int32)
    place = {t: i + 1 for i, t in enumerate(tasks)}
    number = [NO_TASK, *(place.get(t, NO_TASK) for t in population.tasks)]
    return np.array(number, np.int32)[population.task_C]
