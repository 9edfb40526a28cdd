"""What travels: bytes and accuracy by codec on *domains*, and how fast codecs are.

    python -m simulations.bench_wire --json [--full]

Traffic: the same clients, start and rounds as FedAvg with the full model in float32, as FedMoE
with a quarter of the experts, with a cache of experts on every client, and coded. All that passes
goes through real parcels (fedmoe/exchange/parcels.py), and bytes are those of the whole run, its
scouting and its last evaluation included, divided by its rounds. `--full` runs all 24 clients for
20 rounds with three seeds, with more codecs; the default is a part of that.

Speed: CPU time of encoding and decoding float32 numbers that are spread like an update's, in one
thread, in turns with what Flower does with an array (numpy's own format); medians.

Shape suffixes: N numbers.
"""

import argparse
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe.device import keep_freed_memory
from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.parcels import ParcelExchange
from fedmoe.exchange.personal import PersonalStore
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.fashion import domains
from fedmoe.experiments.methods import INT8_DOWN, INT8_UP
from fedmoe.federated.rounds import RoundReport, run_rounds
from fedmoe.state import split_state
from fedmoe.types import Exchange
from fedmoe.wire.cache import ExpertCache
from fedmoe.wire.codecs import BF16, Codec, Coded, Int8, Raw, TopK, decode, from_raw
from fedmoe.wire.packing import RAW, Codecs
from fedmoe.wire.parcel import Parcel, parcel_bytes, read_manifest

FEWER_CLIENTS, FEWER_ROUNDS = 8, 6  # of the default size
ROUNDS, SEEDS = 20, (0, 1, 2)
NUMBERS = 2**23  # of a tensor whose coding is timed: 32 MiB
TURNS = 5

DOWN, UP = INT8_DOWN.experts, INT8_UP.experts  # Int8(levels=47), Int8(levels=31)


@dataclass(frozen=True)
class Case:
    name: str
    method: str
    down: Codecs = RAW
    up: Codecs = RAW
    by_default: bool = True


REFERENCE = Case("FedAvg, all 16 experts, float32", "fedavg")
EXACT = Case("FedMoE", "fedmoe")
CACHED = "FedMoE + cache"  # told by the same run: what a cache saves changes no bit of it
CASES = (
    REFERENCE,
    EXACT,
    Case(f"{CACHED} + int8", "fedmoe", Codecs.of(Int8()), Codecs.of(Int8())),
    Case(
        f"{CACHED} + int8, experts in 47 levels down, 31 up",
        "fedmoe",
        INT8_DOWN,
        INT8_UP,
    ),
    Case(
        f"{CACHED} + bf16 down, int8 up",
        "fedmoe",
        Codecs.of(BF16()),
        Codecs.of(Int8()),
        by_default=False,
    ),
    Case(
        f"{CACHED} + 47 levels down, a tenth of the numbers up",
        "fedmoe",
        INT8_DOWN,
        Codecs(Int8(), TopK(0.1)),
        by_default=False,
    ),
)


@dataclass
class Traffic:
    """Bytes by way: of everything, and of experts alone with what the manifest says of them."""

    whole: dict[str, int] = field(default_factory=lambda: {"down": 0, "up": 0})
    experts: dict[str, int] = field(default_factory=lambda: {"down": 0, "up": 0})

    def watch(self, client: int, way: str, parcel: Parcel) -> None:
        self.whole[way] += parcel_bytes(parcel)
        for group in read_manifest(parcel).groups:
            if group.name.startswith("expert."):
                raws = parcel.groups.get(group.name, {})
                self.experts[way] += group.ByteSize() + sum(map(len, raws.values()))


@dataclass(frozen=True)
class Outcome:
    accuracy: float  # mean over clients, of the model that each would choose by its validation
    traffic: dict[str, Traffic]  # by name of the row
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument(
        "--full", action="store_true", help="all clients, 20 rounds, three seeds, more codecs"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kept = keep_freed_memory()
    rows = speed_rows(NUMBERS, TURNS)
    for seed in SEEDS if options.full else SEEDS[:1]:
        runs = domains(seed, ROUNDS if options.full else FEWER_ROUNDS)
        if not options.full:
            runs = {m: fewer(e, FEWER_CLIENTS) for m, e in runs.items()}
        cases = [c for c in CASES if options.full or c.by_default]
        rows += traffic_rows(runs, cases, seed)
    if options.json:
        report = {
            "bench": "wire",
            "machine": f"{platform.machine()} {platform.system()}, 1 thread",
            "allocator": "keeps freed memory" if kept else "default",
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "numpy", "zstandard", "protobuf")},
            },
            "rows": rows,
        }
        print(json.dumps(report))


# Traffic and accuracy


def fewer(experiment: Experiment, count: int) -> Experiment:
    """The same for its first clients alone."""
    return replace(experiment, clients=experiment.clients[:count])


def traffic_rows(
    runs: Mapping[str, Experiment], cases: Sequence[Case], seed: int
) -> list[dict[str, object]]:
    outcomes = {}
    for case in cases:
        outcomes[case] = outcome = run(runs[case.method], case)
        print(
            f"seed {seed}: {case.name:45} accuracy {outcome.accuracy:.4f}, "
            f"{outcome.seconds:.0f} s",
            flush=True,
        )
    rounds = runs[REFERENCE.method].schedule.rounds
    [reference] = outcomes[REFERENCE].traffic.values()
    exact = outcomes[EXACT].accuracy
    rows = []
    for case in cases[1:]:
        for name, traffic in outcomes[case].traffic.items():
            for part in ("experts", "whole"):
                row = _traffic_row(name, part, traffic, reference, rounds)
                rows.append(row | {"seed": seed})
                print(
                    f"{name:55} {part:8} {row['ours']:>12,} bytes a round, "
                    f"{row['ratio']:6.2f} x less than FedAvg"
                )
        if case != EXACT:
            accuracy = outcomes[case].accuracy
            points = round(100 * (accuracy - exact), 3)
            rows.append(
                {
                    "case": case.name,
                    "peer": EXACT.name,
                    "ours": round(accuracy, 5),
                    "theirs": round(exact, 5),
                    "unit": "share right",
                    "ratio": round(accuracy / exact, 4),
                    "points": points,
                    "seed": seed,
                }
            )
            print(f"{case.name:55} {points:+} points against {EXACT.name} without codecs")
    return rows


def _traffic_row(
    name: str, part: str, ours: Traffic, theirs: Traffic, rounds: int
) -> dict[str, object]:
    mine, other = getattr(ours, part), getattr(theirs, part)
    total, reference = sum(mine.values()), sum(other.values())
    return {
        "case": name,
        "peer": REFERENCE.name,
        "ours": total // rounds,
        "theirs": reference // rounds,
        "unit": "bytes of experts a round" if part == "experts" else "bytes a round",
        "ratio": round(reference / total, 3),
        "down": mine["down"] // rounds,
        "up": mine["up"] // rounds,
    }


def run(experiment: Experiment, case: Case) -> Outcome:
    """One training run whose every message is a parcel."""
    started = time.perf_counter()
    traffic: dict[str, Traffic] = {}
    last: list[RoundReport[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        clients = in_process(
            experiment.factory,
            experiment.data.load,
            experiment.plan,
            experiment.schedule.seed,
            store=PersonalStore(Path(folder, "personal")) if experiment.plan.stores else None,
        )
        exchange = counted(clients, experiment, case, Path(folder), traffic)
        run_rounds(
            experiment.strategy,
            experiment.strategy.init(split_state(experiment.factory()), experiment.clients),
            experiment.clients,
            exchange,
            experiment.schedule,
            after_round=last.append,
        )
    for report in last:
        for failure in (*report.failed, *report.refused):
            raise RuntimeError(f"{case.name}, round {report.round}: {failure}")
    accuracy = statistics.fmean(map(chosen_accuracy, last[-1].metrics.values()))
    return Outcome(accuracy, traffic, time.perf_counter() - started)


def counted(
    clients: Exchange,
    experiment: Experiment,
    case: Case,
    folder: Path,
    traffic: dict[str, Traffic],
) -> Exchange:
    """The clients behind parcels, which are counted; each with a cache, except FedAvg's."""
    wire = partial(ParcelExchange, run=case.name, seed=experiment.schedule.seed)
    traffic[case.name] = Traffic()
    if case == REFERENCE:
        return wire(clients, watch=traffic[case.name].watch)
    cached = partial(wire, caches=lambda client: ExpertCache(folder / f"cache-{client}"))
    if case == EXACT:  # within parcels without a cache, so that one run tells of both
        traffic[CACHED] = Traffic()
        return wire(cached(clients, watch=traffic[CACHED].watch), watch=traffic[case.name].watch)
    return cached(
        clients,
        down=case.down,
        up=case.up,
        feedback=PersonalStore(folder / "feedback"),
        watch=traffic[case.name].watch,
    )


def chosen_accuracy(metrics: Mapping[str, float]) -> float:
    """On the client's test part: the model as received, or as trained where validation says so."""
    trained = metrics["trained_validation"] > metrics["received_validation"]
    return metrics["trained_test" if trained else "received_test"]


# Speed


def speed_rows(numel: int, turns: int) -> list[dict[str, object]]:
    x_N = like_an_update(numel)
    codecs: tuple[Codec, ...] = (
        Raw(),
        BF16(),
        Int8(zstd=False),
        Int8(),
        DOWN,
        UP,
        TopK(0.1),
        TopK(0.01),
    )
    generator = torch.Generator().manual_seed(0)
    encoded = {codec: codec.encode(x_N, generator) for codec in codecs}
    as_file = saved(x_N)
    times_s = timed(
        {
            **{("encode", c): partial(c.encode, x_N, generator) for c in codecs},
            **{("decode", c): partial(decoded, coded, numel) for c, coded in encoded.items()},
            ("encode", None): partial(saved, x_N),
            ("decode", None): partial(loaded, as_file),
        },
        turns,
    )
    rows = []
    for way in ("encode", "decode"):
        theirs = 4e-9 * numel / times_s[way, None]
        for codec, coded in encoded.items():
            ours = 4e-9 * numel / times_s[way, codec]
            rows.append(
                {
                    "case": f"{way} {codec}",
                    "peer": "numpy's format, as Flower's arrays",
                    "ours": round(ours, 3),
                    "theirs": round(theirs, 3),
                    "unit": "GB/s of float32",
                    "ratio": round(ours / theirs, 3),
                    "smaller": round(4 * numel / len(coded.raw), 2),
                    "error": round(relative_error(x_N, coded), 5),
                }
            )
            print(
                f"{rows[-1]['case']:55} {ours:6.2f} GB/s, {rows[-1]['smaller']:6} x smaller, "
                f"error {rows[-1]['error']}"
            )
    return rows


def like_an_update(numel: int) -> Tensor:
    """Numbers of very different size, and a tenth of them zero."""
    draw = torch.Generator().manual_seed(0)
    size_N = torch.rand(numel, generator=draw) ** 3
    moved_N = torch.rand(numel, generator=draw) >= 0.1
    return 0.01 * torch.randn(numel, generator=draw) * size_N * moved_N


def timed(
    steps: Mapping[Any, Callable[[], object]], turns: int
) -> dict[Any, float]:
    """Median seconds of CPU time of each step, taking turns."""
    times_s: dict[Any, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            before_s = time.thread_time()
            step()
            if turn:  # the first only warms up
                times_s[name].append(time.thread_time() - before_s)
    return {name: statistics.median(t) for name, t in times_s.items()}


def decoded(coded: Coded, numel: int) -> Tensor:
    if coded.encoding == Raw().encode(torch.empty(0)).encoding:
        return from_raw(coded.raw, torch.float32)
    return decode(coded, numel)


def relative_error(x_N: Tensor, coded: Coded) -> float:
    return float((decoded(coded, len(x_N)) - x_N).norm() / x_N.norm())


def saved(x_N: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, x_N.numpy(), allow_pickle=False)
    return file.getvalue()


def loaded(raw: bytes) -> np.ndarray:
    return np.asarray(np.load(io.BytesIO(raw), allow_pickle=False))


if __name__ == "__main__":
    main()
