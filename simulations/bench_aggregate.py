"""How fast updates are averaged, beside Flower, a bare stream of additions, and memory itself.

    python -m simulations.bench_aggregate --json [--full]

Ours is what a round does with updates that have come: terms, sums, means (`federated.sums`), by the
compiled kernel and without it. It gives the same bits in any order, and refuses what is not finite.
The peers:

- flat stream: `acc.add_(x, alpha=weight)` on one float32 tensor that holds all, and a division. No
  names, no check, and its bits depend on the order. For parts of experts it is `index_add_` on a
  matrix with a row for each expert, which can only give all experts of an update one weight;
- flower: `aggregate_arrayrecords`, which its strategies call, from the records that messages bring;
- flower, decoded: its arithmetic alone, from numpy arrays that are there already. For parts of
  experts Flower has nothing: there all experts are sent, those not held as they were;
- copy and triad: one update's memory is copied, or read twice and written once, for each update.

All take turns in one process with one thread; times are medians of CPU time for all updates. Of
large updates there are only so many different ones as do not fit a cache together, taken in turns.
Peak memory is that of processes of their own, in which updates are made one at a time; they give
freed memory back, since a heap that keeps it has gaps of an update's size, here or there by chance.

Shape suffixes: N numbers of an update, E experts, K experts of one update.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from fedmoe.device import keep_freed_memory
from fedmoe.federated.average import average_by_expert, by_examples
from fedmoe.native import fold
from fedmoe.types import ActivationProfile, ClientUpdate, ExpertId, MoEState

DIFFERENT_BYTES = 600 * 10**6  # of updates that are kept at the same time
BUDGET_S = 8.0  # for one case
MOST_TURNS, LEAST_TURNS = 60, 3
MEMORY_NUMBERS = 10**7
MEMORY_UPDATES = (10, 100, 1000)
WEIGHT = "num-examples"
SLOW = "ours, no kernel"


@dataclass(frozen=True)
class Case:
    """`num` updates, each of `tensors` tensors of `numbers` in all, or of `held` experts of E."""

    name: str
    num: int
    numbers: int  # float32, of an update, or of one expert where there are experts
    tensors: int = 1
    experts: int = 0
    held: int = 0
    by_default: bool = True


CASES = (
    Case("50 x 40 MB", 50, 10**7),
    Case("50 x 4 MB", 50, 10**6),
    Case("20 x 40 MB in 400 tensors", 20, 10**7, 400),
    Case("50 x 4 of 16 experts of 0.5 MB", 50, 131_072, 2, 16, 4),
    Case("50 x 4 of 16 experts of 66 KB", 50, 16_384, 2, 16, 4),
    Case("200 x 2 of 8 experts of 1 MB", 200, 262_144, 2, 8, 2, by_default=False),
    Case("1000 x 4 MB", 1000, 10**6, by_default=False),
)

Way = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--full", action="store_true", help="all cases")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        print(peak_bytes(args.memory_of))
        return
    keep_freed_memory()
    print(told())
    rows = memory_rows()
    for row in rows:
        print(f"{row['case']}: {row['ours']} MB; of {row['peer']}: {row['theirs']} MB", flush=True)
    for case in CASES:
        if args.full or case.by_default:
            times_s = measure(case)
            rows += rows_of(case, times_s)
            print(line(case, times_s), flush=True)
    if args.json:
        report = {
            "bench": "aggregate",
            "machine": f"{platform.machine()} {platform.system()}, 1 thread",
            "versions": versions(),
            "rows": rows,
        }
        print(json.dumps(report))


def versions() -> dict[str, str]:
    names = ("torch", "numpy", "flwr")
    return {"python": platform.python_version(), **{n: version(n) for n in names}}


def told() -> str:
    kernel = "compiled kernel" if fold.available() else "no compiled kernel"
    parts = [f"{name} {number}" for name, number in versions().items()]
    return f"{', '.join(parts)}; {torch.get_num_threads()} thread, {kernel}"


def line(case: Case, times_s: dict[str, float]) -> str:
    flat = times_s["flat stream"]
    each = [f"{name} {t / flat:.2f}" for name, t in times_s.items() if name != "flat stream"]
    return f"{case.name}: flat stream {flat * 1e3 / case.num:.3f} ms each = 1; {', '.join(each)}"


def rows_of(case: Case, times_s: dict[str, float]) -> list[dict[str, object]]:
    ours = times_s["ours"]
    return [
        {
            "case": case.name,
            "peer": peer,
            "ours": round(ours * 1e3, 3),
            "theirs": round(t * 1e3, 3),
            "unit": "ms",
            "ratio": round(t / ours, 3),
            "over_flat": round(ours / times_s["flat stream"], 3),
        }
        for peer, t in times_s.items()
        if peer != "ours"
    ]


def measure(case: Case) -> dict[str, float]:
    """Median seconds of each way to average all updates of the case, taking turns."""
    ways = ways_of_parts(case) if case.experts else ways_of_whole(case)
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    started_s = time.thread_time()
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and time.thread_time() - started_s > BUDGET_S:
            break
        for name, way in ways.items():
            if name == SLOW and turn >= LEAST_TURNS:
                continue
            before_s = time.thread_time()
            way()
            times_s[name].append(time.thread_time() - before_s)
    return {name: statistics.median(t) for name, t in times_s.items()}


@contextmanager
def without_kernel() -> Iterator[None]:
    with patch.object(fold, "available", lambda: False):
        yield


def in_torch(way: Way) -> Way:
    def slowly() -> object:
        with without_kernel():
            return way()

    return slowly


def ways_of_whole(case: Case) -> dict[str, Way]:
    """Everybody has all parameters, as shared ones."""
    generator = torch.Generator().manual_seed(0)
    count = case.numbers // case.tensors
    different = min(case.num, DIFFERENT_BYTES // (4 * case.numbers))
    turns = [k % different for k in range(case.num)]
    flat_N = [torch.randn(count * case.tensors, generator=generator) for _ in range(different)]
    weights = [20 + k % 7 for k in range(case.num)]
    # Each tensor in memory of its own, as updates have them that were trained here or unpacked.
    states = [{f"p{i}": t.clone() for i, t in enumerate(torch.split(x_N, count))} for x_N in flat_N]
    model = MoEState({n: torch.zeros_like(t) for n, t in states[0].items()}, {})
    nothing = ActivationProfile.empty(0, 0)
    updates = [
        ClientUpdate(k, weights[k], MoEState(states[turn], {}), nothing, {})
        for k, turn in enumerate(turns)
    ]
    arrays = [ArrayRecord(state) for state in states]
    records = [
        RecordDict({"arrays": arrays[turn], "metrics": MetricRecord({WEIGHT: weights[k]})})
        for k, turn in enumerate(turns)
    ]

    def ours() -> object:
        return average_by_expert(model, updates)

    def flat() -> object:
        acc_N = torch.zeros(count * case.tensors)
        for weight, turn in zip(weights, turns, strict=True):
            acc_N.add_(flat_N[turn], alpha=weight)
        return acc_N.div_(sum(weights))

    def copy() -> object:
        to_N = torch.empty(count * case.tensors)
        for turn in turns:
            to_N.copy_(flat_N[turn])
        return to_N

    def triad() -> object:
        to_N, other_N = torch.empty(count * case.tensors), flat_N[0]
        for turn in turns:
            torch.add(flat_N[turn], other_N, alpha=3, out=to_N)
        return to_N

    ways = {
        "ours": ours,
        SLOW: in_torch(ours),
        "flat stream": flat,
        "flower": lambda: aggregate_arrayrecords(records, WEIGHT),
        "flower, decoded": lambda: flower_sum([states[turn] for turn in turns], weights),
        "copy": copy,
        "triad": triad,
    }
    return ways if fold.available() else {n: w for n, w in ways.items() if n != SLOW}


def flower_sum(states: Sequence[dict[str, Tensor]], weights: Sequence[int]) -> object:
    """The arithmetic of `aggregate_arrayrecords`."""
    sums: dict[str, npt.NDArray[np.floating]] = {}
    for state, weight in zip(states, weights, strict=True):
        factor = weight / sum(weights)
        for name, value in state.items():
            if name in sums:
                sums[name] += value.numpy() * factor
            else:
                sums[name] = value.numpy() * factor
    return sums


def ways_of_parts(case: Case) -> dict[str, Way]:
    """Each update has some of the experts."""
    generator = torch.Generator().manual_seed(0)
    held = [
        torch.randperm(case.experts, generator=generator)[: case.held].sort().values
        for _ in range(case.num)
    ]
    rows_KN = [torch.randn(case.held, case.numbers, generator=generator) for _ in range(case.num)]
    weights = [20 + k % 7 for k in range(case.num)]
    count = case.numbers // case.tensors

    def cut(x_N: Tensor) -> dict[str, Tensor]:
        return {f"p{i}": t.clone() for i, t in enumerate(torch.split(x_N, count))}

    experts = [ExpertId(0, e) for e in range(case.experts)]
    model = MoEState({}, {e: cut(torch.zeros(case.numbers)) for e in experts})
    updates, whole = [], []
    for k in range(case.num):
        part = {experts[e]: cut(x_N) for e, x_N in zip(held[k].tolist(), rows_KN[k], strict=True)}
        profile = ActivationProfile.empty(1, case.experts)
        profile.count_LE[0, held[k]] = weights[k]
        updates.append(ClientUpdate(k, weights[k], MoEState({}, part), profile, {}))
        padded = {**model.experts, **part}
        whole.append({f"{e.expert}.{n}": t for e in experts for n, t in padded[e].items()})
    records = [
        RecordDict(
            {
                "arrays": ArrayRecord(state),
                "metrics": MetricRecord({WEIGHT: weight}),
            }
        )
        for state, weight in zip(whole, weights, strict=True)
    ]

    def ours() -> object:
        return average_by_expert(model, updates, by_examples)

    def flat() -> object:
        acc_EN, total_E = torch.zeros(case.experts, case.numbers), torch.zeros(case.experts)
        for x_KN, held_K, weight in zip(rows_KN, held, weights, strict=True):
            acc_EN.index_add_(0, held_K, x_KN, alpha=weight)
            total_E[held_K] += weight
        return acc_EN.div_(total_E.clamp_min(1)[:, None])

    def copy() -> object:
        to_KN = torch.empty(case.held, case.numbers)
        for x_KN in rows_KN:
            to_KN.copy_(x_KN)
        return to_KN

    ways = {
        "ours": ours,
        SLOW: in_torch(ours),
        "flat stream": flat,
        "flower": lambda: aggregate_arrayrecords(records, WEIGHT),
        "flower, decoded": lambda: flower_sum(whole, weights),
        "copy": copy,
    }
    return ways if fold.available() else {n: w for n, w in ways.items() if n != SLOW}


def peak_bytes(num: int) -> int:
    """Of this process once it has averaged so many updates of 40 MB, each made and let go."""
    model = MoEState({"v": torch.zeros(MEMORY_NUMBERS)}, {})
    nothing = ActivationProfile.empty(0, 0)

    def updates() -> Iterator[ClientUpdate]:
        for k in range(num):
            state = {"v": torch.full((MEMORY_NUMBERS,), 0.1 * k)}
            yield ClientUpdate(k, 20 + k % 7, MoEState(state, {}), nothing, {})

    averaged = average_by_expert(model, updates())
    assert bool(averaged.shared["v"].isfinite().all())
    with open("/proc/self/status", encoding="ascii") as file:
        [high] = [row for row in file if row.startswith("VmHWM")]
    return int(high.split()[1]) * 1024


def memory_rows() -> list[dict[str, object]]:
    """Peak memory of more and more updates, against that of the fewest."""
    peaks = {}
    for num in MEMORY_UPDATES:
        command = [sys.executable, "-m", "simulations.bench_aggregate", "--memory-of", str(num)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[num] = int(done.stdout.split()[-1])
    fewest, *more = MEMORY_UPDATES
    return [
        {
            "case": f"peak memory of {num} x 40 MB",
            "peer": f"{fewest} updates",
            "ours": round(peaks[num] / 1e6, 1),
            "theirs": round(peaks[fewest] / 1e6, 1),
            "unit": "MB",
            "ratio": round(peaks[fewest] / peaks[num], 3),
        }
        for num in more
    ]


if __name__ == "__main__":
    main()
