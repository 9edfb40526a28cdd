"""Weighted means of states that are folded as they come: the arithmetic of aggregation.

Sums of floating-point numbers depend on their order, and updates arrive in any order. So terms
are put on a grid of whole multiples of 2**-GRID_BITS and added as 64-bit integers: the sum is the
same bit for bit whatever the order and the grouping, in one process or in many. A mean is off by
at most 2**-(GRID_BITS + 1) over the mean weight: 1e-11 for clients of 200 examples. Whole numbers,
such as a counter of batches, are their own grid.

Sums of a state lie in one piece of memory, and values are added there: by the kernel of
`fedmoe.native.fold` two states at a time, so that every other one waits for the next; without it,
one by one, in pieces that fit a processor's cache. Both give the same bits.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe.native import fold
from fedmoe.types import State, Term

GRID_BITS = 28
LIMIT = 2.0 ** (62 - GRID_BITS)  # of a sum of reaches: so that 64 bits hold it
UPDATE_LIMIT = LIMIT / 1024  # of one update, so that a thousand of the largest can be summed
PIECE = 2**14  # numbers that are worked on at a time, where there is no kernel
KERNEL_LIMIT = fold.MOST_TERM / 2.0**GRID_BITS  # of a reach

Reals = npt.NDArray[np.float64]
Kind = tuple[torch.dtype, torch.device]


class Mean:
    """A weighted mean of states; memory of one sum and two states, not of all.

    Each parameter is averaged over the states that have it. The mean of one is that one, bit for
    bit. A state that was added may be kept for a while: its tensors must not be changed any more.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []

    def add(self, state: State, weight: int) -> None:
        """Fold `state` in.

        Raises:
            ValueError: weight below 1, a value so large that the sum could overflow, or one whose
                shape or dtype is not that of those before. Nothing of the state is folded then.
        """
        if weight < 1:
            raise ValueError(f"weight must be at least 1, got {weight}")
        _add(self._arriving(state, weight), at_once=True)

    def merge(self, other: "Mean") -> None:
        """Fold in all that was folded into `other`, as if it had been added here.

        Raises:
            ValueError: as for `add`; some of it may have been folded then.
        """
        for theirs in other._parts:
            if theirs.weight:
                for mine, places in self._parts_of(theirs.shapes, (theirs.dtype, theirs.device)):
                    mine.merge(theirs.only(places))

    def result(self, old: State) -> dict[str, Tensor]:
        """The mean, in the dtypes of `old`; names that were never sent keep `old`'s values.

        Raises:
            ValueError: a parameter was sent that `old` has not, or has in another shape; or see
                `Sums.add`.
        """
        new = dict(old)
        for part in self._parts:
            if part.weight:
                for name, shape in part.shapes.items():
                    if name not in old or old[name].shape != shape:
                        was = tuple(old[name].shape) if name in old else "none"
                        raise ValueError(
                            f"parameter {name!r} must be of shape {was}, got {tuple(shape)}"
                        )
                new |= part.mean([old[n].dtype for n in part.shapes])
        return new

    def weights(self) -> dict[str, int]:
        """The sum of the weights of those who sent it, of every parameter."""
        return {n: part.weight for part in self._parts for n in part.shapes if part.weight}

    def _arriving(self, state: State, weight: int) -> "list[_Arrival]":
        if len(self._parts) == 1 and self._parts[0].shapes.keys() == state.keys():
            [part] = self._parts
            return [_Arrival(part, [state[n] for n in part.shapes], weight)]
        kinds: dict[Kind, dict[str, torch.Size]] = {}
        for name, value in state.items():
            kinds.setdefault((value.dtype, value.device), {})[name] = value.shape
        return [
            _Arrival(part, [state[n] for n in part.shapes], weight)
            for kind, shapes in kinds.items()
            for part, _ in self._parts_of(shapes, kind)
        ]

    def _parts_of(
        self, shapes: Mapping[str, torch.Size], kind: Kind
    ) -> "list[tuple[_Part, list[int]]]":
        """The parts that are just these parameters, and the places of theirs among these.

        A part of which only some are among them is cut in two; what is new becomes a part.
        """
        place = {name: i for i, name in enumerate(shapes)}
        parts: list[_Part] = []
        for part in self._parts:
            inside = [i for i, name in enumerate(part.shapes) if name in place]
            if 0 < len(inside) < len(part.shapes):
                parts.append(part.only(sorted(set(range(len(part.shapes))) - set(inside))))
                part = part.only(inside)
            parts.append(part)
        known = {name for part in parts for name in part.shapes}
        if new := {n: shape for n, shape in shapes.items() if n not in known}:
            parts.append(_Part(new, kind))
        self._parts = parts
        return [
            (part, [place[n] for n in part.shapes])
            for part in parts
            if next(iter(part.shapes)) in place
        ]


class Sums(Mapping[Hashable, Mean]):
    """Means by key, as terms are folded into them; they are small to send, and can be merged."""

    def __init__(self) -> None:
        self._means: dict[Hashable, Mean] = {}

    def add(self, terms: Iterable[Term]) -> None:
        """Fold one update's terms in; those of weight 0 are left out.

        Raises:
            ValueError: as for `Mean.add`, or a key comes twice. A value that is too large may be
                found late, when the next terms are added, or the sums are merged, sent or read:
                so these are lost then.
        """
        arriving: list[_Arrival] = []
        seen: set[Hashable] = set()
        for key, state, weight in terms:
            if weight < 0:
                raise ValueError(f"weight must be 0 or more, got {weight} for {key}")
            if key in seen:
                raise ValueError(f"key must come once among an update's terms, got {key} again")
            seen.add(key)
            if weight and state:
                mean = self._means.get(key)
                if mean is None:
                    mean = self._means[key] = Mean()
                arriving += mean._arriving(state, weight)
        _add(arriving)

    def merge(self, other: "Sums") -> None:
        """Fold in all that was folded into `other`. Raises ValueError as `Mean.merge`."""
        for key, mean in other._means.items():
            self._means.setdefault(key, Mean()).merge(mean)

    def mean(self, key: Hashable, old: State) -> dict[str, Tensor]:
        """As `Mean.result`; `old` where nothing has this key."""
        return self._means[key].result(old) if key in self._means else dict(old)

    def within(self, outer: Hashable) -> "Sums":
        """Those with keys (outer, key), by key."""
        inner = Sums()
        for key, mean in self._means.items():
            if isinstance(key, tuple) and len(key) == 2 and key[0] == outer:
                inner._means[key[1]] = mean
        return inner

    def __getitem__(self, key: Hashable) -> Mean:
        return self._means[key]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._means)

    def __len__(self) -> int:
        return len(self._means)


class _Waiting(NamedTuple):
    values: list[Tensor]
    weight: int
    address: fold.Addresses | None  # for the kernel, if it can add them
    measured: bool  # their reaches are among those of their part


class _Part:
    """Parameters of one kind that always came together, so that one weight serves them all.

    A state waits, to be added to the totals together with the next. One that is alone, without
    totals, is the mean as it came.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], kind: Kind) -> None:
        self.shapes = dict(shapes)
        self.dtype, self.device = kind
        self.sizes = [*self.shapes.values()]
        self.counts = [shape.numel() for shape in self.sizes]
        self.weight = 0
        self.reach_N: Reals = np.zeros(len(self.counts))  # bounds of |sum|, of each parameter
        self.flat: Tensor | None = None  # int64: all totals in one, unless the part was cut
        self.totals: list[Tensor] = []
        self.waiting: _Waiting | None = None
        self.rows: fold.Rows = np.zeros(len(self.counts), fold.ROW)
        self.rows["count"], self.rows["num"] = self.counts, 1

    @property
    def compiled(self) -> bool:
        return self.dtype is torch.float32 and self.device.type == "cpu" and fold.available()

    def check(self, values: Sequence[Tensor]) -> None:
        """Raise ValueError where they are not of the kind of those before."""
        for value, (name, shape) in zip(values, self.shapes.items(), strict=True):
            if (value.shape, value.dtype, value.device) != (shape, self.dtype, self.device):
                raise ValueError(
                    f"parameter {name!r} must be {self.dtype} of shape {tuple(shape)} on "
                    f"{self.device} as in the states before, got {value.dtype} of shape "
                    f"{tuple(value.shape)} on {value.device}"
                )

    def new_totals(self) -> Tensor:
        return self.empty(torch.Size([sum(self.counts)]), torch.int64)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        new = torch.empty(shape, dtype=dtype, device=self.device)
        if self.compiled:
            fold.large_pages(new)
        return new

    def begin(self, flat: Tensor) -> None:
        """Have totals, all in `flat`."""
        self.flat, self.totals = flat, list(torch.split(flat, self.counts))
        if self.compiled:
            self.rows["total"] = self.addresses(self.totals)

    def addresses(self, totals: Sequence[Tensor]) -> fold.Addresses:
        return fold.addresses(totals, [(n,) for n in self.counts], torch.int64)

    def wait(self, arrival: "_Arrival") -> None:
        values, address = _owned(arrival.values), arrival.address
        if address is not None and values is not arrival.values:
            address = fold.addresses(values, self.sizes, self.dtype)
        self.waiting = _Waiting(values, arrival.weight, address, arrival.measured)

    def alone(self) -> list[Tensor]:
        """The only state; none if there were several, and then all are in the totals."""
        if self.totals or self.waiting is None:
            self.settle()
            return []
        if not self.waiting.measured:
            self.reach_N = self.bound([reach_of(v, self.weight) for v in self.waiting.values])
            self.waiting = self.waiting._replace(measured=True)
        return self.waiting.values

    def settle(self) -> None:
        """Add what waits to the totals; there are some from then on."""
        if self.waiting is None:
            return
        it, self.waiting = self.waiting, None
        fresh = not self.totals
        if fresh:
            self.begin(self.new_totals())
        if it.address is None:
            if fresh:
                for total in self.totals:
                    total.zero_()
            self.put(it.values, it.weight)
        else:
            rows = self.rows_of(it)
            rows["begin"] = fresh
            fold.arrive(rows)
            self.check_added(rows, it)

    def rows_of(self, *them: "_Waiting | _Arrival") -> fold.Rows:
        """What tells the kernel to add these."""
        rows = self.rows.copy()
        rows["num"] = len(them)
        for place, it in enumerate(them):
            rows["value"][:, place] = it.address
            rows["scale"][:, place] = it.weight * _steps(self.dtype)
        return rows

    def rows_of_pair(self, one: "_Arrival") -> fold.Rows:
        assert self.waiting is not None
        fresh = not self.totals
        if fresh:
            self.begin(self.new_totals())
        rows = self.rows_of(self.waiting, one)
        rows["begin"] = fresh
        return rows

    def check_added(self, rows: fold.Rows, *them: "_Waiting | _Arrival") -> None:
        """Count in how large what the kernel has added is, and put it right where it could not.

        Raises:
            ValueError: so large that the sum could overflow.
        """
        most = rows["most"]
        bound_N = self.reach_N + sum(most[:, place] * it.weight for place, it in enumerate(them))
        if bound_N.max() < KERNEL_LIMIT and not any(it.measured for it in them):
            self.reach_N = bound_N  # as nearly always; NaN is not less
            return
        for place, it in enumerate(them):
            reach_N = most[:, place] * it.weight
            if not it.measured:
                self.reach_N = self.bound(reach_N)
            if not (reach_N < KERNEL_LIMIT).all():
                fold.take_away(rows, place)
                self.put(it.values, it.weight)

    def bound(self, reach_N: Reals | list[float]) -> Reals:
        """Of the sum with more of these reaches. Raises ValueError where it could overflow."""
        bound_N = self.reach_N + reach_N
        if not (bound_N < LIMIT).all():  # so that NaN is refused too
            at = int((~(bound_N < LIMIT)).argmax())
            raise ValueError(
                f"parameter {[*self.shapes][at]!r}: weight times value must stay below "
                f"{LIMIT:.0f} in sum, got {bound_N[at]:.3g}"
            )
        return bound_N

    def take(self, one: "_Arrival") -> None:
        """Add the values, or let them wait."""
        self.weight += one.weight
        if self.waiting is not None:
            self.settle()
        if one.address is not None or not self.totals:
            self.wait(one)
        else:
            self.put(one.values, one.weight)

    def put(self, values: Sequence[Tensor], weight: int) -> None:
        """Add to the totals without the kernel."""
        for total, value in zip(self.totals, values, strict=True):
            _increase(total, value, weight)

    def only(self, places: Sequence[int]) -> "_Part":
        """The part of these of its parameters, in this order; it has the same memory."""
        if list(places) == list(range(len(self.counts))):
            return self
        names = [*self.shapes]
        some = _Part({names[i]: self.shapes[names[i]] for i in places}, (self.dtype, self.device))
        some.weight, some.reach_N = self.weight, self.reach_N[list(places)]
        some.totals = [self.totals[i] for i in places] if self.totals else []
        some.rows = self.rows[list(places)]
        if (it := self.waiting) is not None:
            address = None if it.address is None else it.address[list(places)]
            some.waiting = it._replace(values=[it.values[i] for i in places], address=address)
        return some

    def merge(self, other: "_Part") -> None:
        """Add all of the other's, which has the same parameters in the same order."""
        if values := other.alone():  # it stays alone if it is the only one here too
            _add([_Arrival(self, values, other.weight)], at_once=True)
            return
        for name, size, its_size in zip(self.shapes, self.sizes, other.sizes, strict=True):
            if (size, self.dtype) != (its_size, other.dtype):
                raise ValueError(
                    f"parameter {name!r} must be {self.dtype} of shape {tuple(size)}, got sums of "
                    f"{other.dtype} of shape {tuple(its_size)}"
                )
        self.settle()
        self.reach_N = self.bound(other.reach_N)
        if self.totals:
            for total, more in zip(self.totals, other.totals, strict=True):
                _plus(total, more)
        else:
            self.begin(torch.cat(other.totals))
        self.weight += other.weight

    def mean(self, dtypes: Sequence[torch.dtype]) -> dict[str, Tensor]:
        if values := self.alone():
            return dict(zip(self.shapes, values, strict=True))
        outs = [
            self.empty(shape, dtype) for shape, dtype in zip(self.sizes, dtypes, strict=True)
        ]
        steps = _steps(self.dtype)
        if self.compiled and set(dtypes) == {torch.float32}:
            to = fold.addresses(outs, self.sizes, torch.float32)
            fold.divide(to, self.rows, self.weight, 1 / steps)
        else:
            for out, total in zip(outs, self.totals, strict=True):
                _divide(out.view(-1), total, self.weight, steps)
        return dict(zip(self.shapes, outs, strict=True))

    def __getstate__(self) -> tuple[object, ...]:
        """All numbers in one array, which other processes may be given without a copy."""
        alone = self.alone()
        flat = self.flat
        if flat is None:
            flat = torch.cat([t.reshape(-1) for t in alone or self.totals])
        raw = flat.cpu().view(torch.uint8).numpy()
        return (self.shapes, self.dtype, self.weight, self.reach_N, not alone, raw)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shapes, dtype, weight, reach_N, summed, raw = state
        self.__init__(shapes, (dtype, torch.device("cpu")))  # type: ignore[misc]
        self.weight, self.reach_N = weight, np.array(reach_N)
        if not raw.flags.writeable:  # totals are added to where they lie
            raw = raw.copy()
        flat = torch.from_numpy(raw)
        if summed:
            self.begin(flat.view(torch.int64))
        elif weight:
            values = torch.split(flat.view(dtype), self.counts)
            shaped = [v.view(s) for v, s in zip(values, self.sizes, strict=True)]
            it = _Arrival(self, shaped, weight, measured=True)
            it.look()
            self.wait(it)


@dataclass(eq=False)
class _Arrival:
    """Values on their way into a part."""

    part: _Part
    values: list[Tensor]
    weight: int
    address: fold.Addresses | None = None
    measured: bool = False

    def look(self) -> None:
        """Check the values, and find out whether the kernel can add them."""
        part = self.part
        if part.compiled and self.weight < fold.MOST_WEIGHT:
            try:
                self.address = fold.addresses(self.values, part.sizes, part.dtype)
                return
            except ValueError:  # of another kind; or in several pieces, which can be helped
                part.check(self.values)
        part.check(self.values)
        self.values = [v.detach().contiguous() for v in self.values]
        if part.compiled and self.weight < fold.MOST_WEIGHT:
            self.address = fold.addresses(self.values, part.sizes, part.dtype)

    @property
    def paired(self) -> bool:
        """Whether the kernel can add them together with what waits."""
        it = self.part.waiting
        return self.address is not None and it is not None and it.address is not None


def _add(arriving: Sequence[_Arrival], at_once: bool = False) -> None:
    """Fold all of them in.

    Args:
        at_once: measure them before anything is folded, and not while it is.
    """
    for one in arriving:
        one.look()
    slow = [one for one in arriving if at_once or one.address is None]
    reaches = [[reach_of(v, one.weight) for v in one.values] for one in slow]
    bounds = [one.part.bound(reach_N) for one, reach_N in zip(slow, reaches, strict=True)]
    for one, bound_N in zip(slow, bounds, strict=True):
        one.part.reach_N, one.measured = bound_N, True

    pairs = [one for one in arriving if one.paired]
    others = [one for one in arriving if not one.paired]
    if pairs:
        rows = fold.joined([one.part.rows_of_pair(one) for one in pairs])
        fold.arrive(rows)
        end = 0
        for one in pairs:
            begin, end = end, end + len(one.values)
            one.part.weight += one.weight
            it, one.part.waiting = one.part.waiting, None
            assert it is not None
            one.part.check_added(rows[begin:end], it, one)
    for one in others:
        one.part.take(one)


def reach_of(value: Tensor, weight: int) -> float:
    """Weight times the largest magnitude, NaN if there is one; 2**-GRID_BITS of it where whole."""
    return weight * _magnitude(value.detach()) * _steps(value.dtype) / 2.0**GRID_BITS


def _magnitude(value: Tensor) -> float:
    if not value.numel():
        return 0.0
    if value.dtype is torch.float32 and value.is_cpu and fold.available():
        rows: fold.Rows = np.zeros(1, fold.ROW)
        value = value.contiguous()
        rows["value"][0, 0] = fold.addresses([value], [value.shape], torch.float32)[0]
        rows["count"], rows["num"] = value.numel(), 1
        fold.arrive(rows)
        return float(rows["most"][0, 0])
    if not value.is_floating_point():
        value = value.double()  # bool has no magnitude, and that of the least integer overflows
    least, most = torch.aminmax(value)
    return float(torch.maximum(least.abs(), most.abs()))


def _steps(dtype: torch.dtype) -> float:
    """Of the grid, between two whole numbers."""
    return 2.0**GRID_BITS if dtype.is_floating_point else 1.0


def _owned(values: list[Tensor]) -> list[Tensor]:
    """The values without their history; copied if they would keep much more memory alive."""
    own = [v.nbytes for v in values]
    if [v.untyped_storage().nbytes() for v in values] != own:
        storages = {s.data_ptr(): s.nbytes() for s in [v.untyped_storage() for v in values]}
        if sum(storages.values()) > 2 * sum(own):
            return [v.detach().clone() for v in values]
    if True in [v.requires_grad for v in values]:
        return [v.detach() for v in values]
    return values


def _pieces(count: int) -> Iterator[slice]:
    return (slice(at, at + PIECE) for at in range(0, count, PIECE))


def _increase(total_N: Tensor, value: Tensor, weight: int) -> None:
    value_N = value.view(-1)
    for piece in _pieces(len(total_N)):
        term_P = value_N[piece].to(torch.float64, copy=True)
        _plus(total_N[piece], term_P.mul_(weight * _steps(value.dtype)).round_())


def _plus(total_N: Tensor, more_N: Tensor) -> None:
    """Add whole numbers, which may be float64."""
    if total_N.is_cpu:  # torch takes several times as long to convert and add them
        total = total_N.numpy()
        np.add(total, more_N.numpy().astype(np.int64, copy=False), out=total)
    else:
        total_N.add_(more_N.to(torch.int64))


def _divide(out_N: Tensor, total_N: Tensor, weight: int, steps: float) -> None:
    for piece in _pieces(len(total_N)):
        mean_P = total_N[piece].double().div_(weight).div_(steps)
        out_N[piece] = mean_P if out_N.is_floating_point() else mean_P.round_()
