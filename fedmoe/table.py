"""What a server remembers of each client that has taken part, in rows of a few bytes.

A `Table` is a mapping from a client's number to a value. `table | changes` is a new table, and
leaves the old one as it is; it copies the pages that the changes are on, so a round's cost goes
by who took part in it and not by all who ever did (but for 12 bytes a client: its number, and
where its row is).

How a value lies in a row is told by a `Form`, made from the value's type: tensors of one shape,
numbers, sets of experts as bits, and dataclasses of these.

Shape suffix: K clients in the table.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe.types import ExpertId

PAGE = 64  # rows that are copied where one of them changes

V = TypeVar("V")
Rows = npt.NDArray[Any]


@dataclass(frozen=True)
class Form:
    """How values of one type lie in rows of fixed width.

    Attributes:
        kind: their type, as a field's hint has it: Tensor, bool, int, float, a set of experts, a
            dataclass of these, or one of them or None.
        experts: that a set of experts may hold.
        dtype, shape: of tensors, by numpy's name.
    """

    kind: Any
    experts: tuple[ExpertId, ...] = ()
    dtype: str = "float64"
    shape: tuple[int, ...] = ()

    @cached_property
    def row(self) -> np.dtype[Any]:
        """The type of a row.

        Raises:
            TypeError: values of this type have no fixed width.
        """
        return np.dtype([("value", *self._layout(self.kind))])

    def pack(self, value: object, row: Any) -> None:
        """Write a value into a row, which must be zeros."""
        self._pack(self.kind, value, row, "value")

    def unpack(self, row: Any) -> Any:
        return self._unpack(self.kind, row["value"])

    @cached_property
    def _place(self) -> Mapping[ExpertId, int]:
        return {e: i for i, e in enumerate(self.experts)}

    def _layout(self, kind: Any) -> tuple[Any, ...]:
        if kind is Tensor:
            return np.dtype(self.dtype), self.shape
        if kind in (bool, int, float):
            return ({bool: "?", int: "<i8", float: "<f8"}[kind],)
        if _is_sub_moe(kind):
            return "u1", (-(-len(self.experts) // 8),)
        if (inner := _or_none(kind)) is not None:
            return ([("there", "?"), ("value", *self._layout(inner))],)
        if dataclasses.is_dataclass(kind):
            return ([(n, *self._layout(k)) for n, k in _fields(kind)],)
        raise TypeError(f"a table's values must have a fixed width, got {kind}")

    def _pack(self, kind: Any, value: Any, row: Any, name: str) -> None:
        if kind is Tensor:
            if tuple(value.shape) != self.shape:
                raise ValueError(
                    f"a tensor of this table must have shape {self.shape}, got "
                    f"{tuple(value.shape)}"
                )
            row[name] = value.detach().cpu().numpy()
        elif _is_sub_moe(kind):
            held = np.zeros(len(self.experts), bool)
            held[[self._place[e] for e in value]] = True
            row[name] = np.packbits(held)
        elif (inner := _or_none(kind)) is not None:
            if value is not None:
                row[name]["there"] = True
                self._pack(inner, value, row[name], "value")
        elif dataclasses.is_dataclass(kind):
            for n, k in _fields(kind):
                self._pack(k, getattr(value, n), row[name], n)
        else:
            row[name] = value

    def _unpack(self, kind: Any, value: Any) -> Any:
        if kind is Tensor:
            return torch.from_numpy(np.array(value))
        if _is_sub_moe(kind):
            held = np.unpackbits(value, count=len(self.experts))
            return frozenset(self.experts[i] for i in np.flatnonzero(held))
        if (inner := _or_none(kind)) is not None:
            return self._unpack(inner, value["value"]) if value["there"] else None
        if dataclasses.is_dataclass(kind):
            parts = {n: self._unpack(k, value[n]) for n, k in _fields(kind)}
            return typing.cast(Any, kind)(**parts)
        return kind(value)


@dataclass(frozen=True, eq=False)
class Table(Mapping[int, V]):
    """Values by client, in pages of rows that are never written to once they are in a table."""

    form: Form
    id_K: npt.NDArray[np.int64]  # ascending
    row_K: npt.NDArray[np.int32]  # where each one's row is, counted over all pages
    pages: Sequence[Rows]

    @staticmethod
    def of(form: Form, values: Mapping[int, V]) -> Table[V]:
        """The same values in a table of this form."""
        empty: Table[V] = Table(form, np.zeros(0, np.int64), np.zeros(0, np.int32), ())
        return empty | values

    @staticmethod
    def from_rows(form: Form, id_K: npt.NDArray[np.int64], rows: Rows) -> Table[V]:
        """A table of rows as `rows` gives them.

        Raises:
            ValueError: as many ids as rows are needed, and they must ascend.
        """
        if len(id_K) != len(rows) or bool((np.diff(id_K) <= 0).any()):
            raise ValueError("a table's ids must ascend, and be as many as its rows")
        padded = np.zeros(-(-len(rows) // PAGE) * PAGE, form.row)
        padded[: len(rows)] = rows
        pages = [padded[i : i + PAGE] for i in range(0, len(padded), PAGE)]
        return Table(form, id_K, np.arange(len(id_K), dtype=np.int32), pages)

    def __or__(self, changes: Mapping[int, V]) -> Table[V]:
        """These values beside or in place of the ones here."""
        if not changes:
            return self
        pages, copied = list(self.pages), set[int]()
        changed = np.array(sorted(changes), np.int64)
        place_N = np.searchsorted(self.id_K, changed)
        known_N = np.zeros(len(changed), bool)
        inside_N = place_N < len(self)
        known_N[inside_N] = self.id_K[place_N[inside_N]] == changed[inside_N]
        row_N = np.zeros(len(changed), np.int32)
        row_N[known_N] = self.row_K[place_N[known_N]]
        num_new = int((~known_N).sum())
        row_N[~known_N] = np.arange(len(self), len(self) + num_new)
        for client, row in zip(changed.tolist(), row_N.tolist(), strict=True):
            page, at = divmod(row, PAGE)
            if page == len(pages):
                pages.append(np.zeros(PAGE, self.form.row))
            elif page not in copied:
                pages[page] = pages[page].copy()
            copied.add(page)
            new = np.zeros((), self.form.row)
            self.form.pack(changes[client], new)
            pages[page][at] = new
        id_K, row_K = self.id_K, self.row_K
        if num_new:
            id_K = np.insert(id_K, place_N[~known_N], changed[~known_N])
            row_K = np.insert(row_K, place_N[~known_N], row_N[~known_N])
        return Table(self.form, id_K, row_K, pages)

    def __getitem__(self, client: int) -> V:
        place = self._place(client)
        if place is None:
            raise KeyError(client)
        page, at = divmod(int(self.row_K[place]), PAGE)
        value: V = self.form.unpack(self.pages[page][at])
        return value

    def __contains__(self, client: object) -> bool:
        return isinstance(client, Integral) and self._place(int(client)) is not None

    def __iter__(self) -> Iterator[int]:
        return iter(self.id_K.tolist())

    def __len__(self) -> int:
        return len(self.id_K)

    def __repr__(self) -> str:
        return f"Table({len(self)} clients, {self.form.row.itemsize} bytes each)"

    def rows(self) -> Rows:
        """All rows, in order of client."""
        if not self.pages:
            return np.zeros(0, self.form.row)
        whole: Rows = np.concatenate(list(self.pages))
        width = self.form.row.itemsize  # bytes are copied many times faster than fields
        raw = whole.view(np.uint8).reshape(len(whole), width).take(self.row_K, axis=0)
        return raw.reshape(-1).view(self.form.row)

    def _place(self, client: int) -> int | None:
        place = int(self.id_K.searchsorted(client))
        return place if place < len(self.id_K) and self.id_K[place] == client else None


def ids_of(values: Mapping[int, Any]) -> npt.NDArray[np.int64]:
    """The clients of a table, or of another mapping, ascending."""
    if isinstance(values, Table):
        return values.id_K
    return np.array(sorted(values), np.int64)


def _is_sub_moe(kind: Any) -> bool:
    return bool(typing.get_origin(kind) is frozenset and typing.get_args(kind) == (ExpertId,))


def _or_none(kind: Any) -> Any:
    """The other type of `X | None`; None for other types."""
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return None
    inner = [k for k in typing.get_args(kind) if k is not types.NoneType]
    return inner[0] if len(inner) == 1 else None


def _fields(kind: Any) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        yield f.name, hints[f.name]
