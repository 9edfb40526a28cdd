"""Run an experiment, with a log line and a checkpoint each round; go on with one that was killed.

A run owns one folder: `experiment.json` says how to make the experiment again, `run.json` and
`rounds.jsonl` are the log (fedmoe/report/log.py), `checkpoints/` the server's state, `personal/`
what clients keep and `owed/` what the codec of their updates left out. A round counts as done when
its checkpoint is in place. Its log line is written just before; a line whose checkpoint is missing
is cut off on resuming, and written again.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fedmoe import __version__
from fedmoe.checkpoint import content_hash, newest_checkpoint, save_checkpoint, snapshot
from fedmoe.exchange.actors import Actors
from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.parcels import ParcelExchange, ParcelTraffic
from fedmoe.exchange.personal import PersonalStore
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.memory import peak_bytes
from fedmoe.federated.cohort import Trainer
from fedmoe.federated.local import accuracy
from fedmoe.federated.rounds import RoundReport, Traffic, run_rounds
from fedmoe.federated.select import experts_that_fit
from fedmoe.population import Population, by_id, first_of_each_budget, together
from fedmoe.report.log import ClientAccuracy, ClientEntry, Others, RoundRecord, RunInfo, RunLog
from fedmoe.state import (
    layer_sizes,
    load_state,
    moe_layers,
    nothing,
    other_than,
    split_state,
    take_names,
)
from fedmoe.types import Assignment, Exchange, MoEState, SubMoE
from fedmoe.wire.messages import message_bytes, model_bytes, model_tensors

# Makes the exchange that carries a run, given what to call with each client that has answered.
MakeExchange = Callable[[Callable[[int], None]], Exchange]

PACKAGES = ("torch", "flwr", "flwr-datasets", "numpy")


@dataclass(frozen=True)
class Spec:
    """How to make an experiment again: what was named, and what was changed about it."""

    target: str  # of the table of experiments, or module:function
    method: str
    seed: int
    rounds: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trainer: Trainer = "one-by-one"  # of simulated clients; other trainers have other last bits

    def write(self, folder: Path) -> None:
        """Atomically, as experiment.json."""
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".experiment.json.{os.getpid()}"
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        beside.replace(folder / "experiment.json")

    @staticmethod
    def read(folder: Path) -> "Spec":
        """Raises ValueError where there is none, or it is not one."""
        path = folder / "experiment.json"
        try:
            return Spec(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as why:
            raise ValueError(f"{folder} holds no run: {path.name} is missing") from why
        except (TypeError, ValueError) as why:
            raise ValueError(f"{path} does not describe an experiment: {why}") from why


def run_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    on_client: Callable[[int], None] = lambda client: None,
    on_round: Callable[[RoundRecord], None] = lambda record: None,
    complain: Callable[[str], None] = lambda line: None,
    exchange: MakeExchange | None = None,
    actors: Actors | None = None,
    trainer: Trainer = "one-by-one",
    traffic: Traffic | None = None,
) -> str:
    """Run to the end; returns the content hash of the server's last state.

    Where the experiment's messages are coded, simulated clients are sent them as the parcels that
    would travel, and bytes are those of these parcels.

    Args:
        exchange: who carries assignments to clients, and codes them, who then keep what is their
            own and may be the only ones who have their data; None: they are simulated.
        actors: who does the work of simulated clients; None: this process does. The bits are the
            same, and a run that was begun in one way may go on in the other.
        trainer: how simulated clients train (`federated.cohort`); the same all through a run.
        traffic: the bytes that really went down and up since it was last called; None: those of
            parcels, or else a round's messages are measured as they would be in full.

    Raises:
        FileExistsError: the folder holds a run already, and `resume` is not asked for; or what
            is left of one, without its run.json.
        ValueError: `resume` is asked for, and the folder holds a run of another experiment.
    """
    model = split_state(experiment.factory())
    check_budgets(experiment, model)
    state = experiment.strategy.init(model, together(experiment.clients, experiment.unseen))
    data_here = exchange is None or _data_here(experiment)
    first = 0
    if resume and (folder / "run.json").exists():
        log = RunLog.open(folder)
        _check_same(experiment, log.info, folder)
        found = newest_checkpoint(folder / "checkpoints", type(state), complain)
        if found is not None:
            first, state = found
        log.truncate_to(first)
    else:
        _check_no_remains(folder)
        log = RunLog.create(folder, _run_info(experiment, model, data_here))
    personal = experiment.plan.personal
    memory = _Memory(experiment, device) if data_here else None

    def prepare(assignment: Assignment) -> Assignment:
        return without(assignment, personal)

    def after_round(report: RoundReport[Any]) -> None:
        final = report.phase == "final"
        shot = snapshot(report.state)
        merged = experiment.strategy.merged(report.state) if final else None
        shown = None
        if data_here and merged is not None and not _any(take_names(merged, personal)):
            shown = merged_accuracy(experiment, merged, device)
        _drop_strangers(report, experiment, complain)
        record = _record(report, layer_sizes_of(experiment), memory, shown, shot.digest)
        log.append(record)
        if not final:
            save_checkpoint(folder / "checkpoints", report.round + 1, shot)
        on_round(record)

    parcels = ParcelTraffic()
    if exchange is None and experiment.coded:
        traffic = parcels.take
    with (
        _simulated(experiment, folder, device, on_client, actors, trainer, parcels)
        if exchange is None
        else nullcontext(exchange(on_client))
    ) as carry:
        end = run_rounds(
            experiment.strategy,
            state,
            experiment.clients,
            carry,
            experiment.schedule,
            first=first,
            measure=message_bytes,
            prepare=prepare,
            after_round=after_round,
            unseen=experiment.unseen,
            traffic=traffic,
        )
    return content_hash(end)


@contextmanager
def _simulated(
    experiment: Experiment,
    folder: Path,
    device: torch.device | str,
    progress: Callable[[int], None],
    actors: Actors | None,
    trainer: Trainer,
    traffic: ParcelTraffic,
) -> Iterator[Exchange]:
    """Clients that are played here, by this process or by actors; `traffic` is told of parcels."""
    with _players(experiment, folder, device, progress, actors, trainer) as exchange:
        if not experiment.coded:
            yield exchange
            return
        yield ParcelExchange(
            exchange,
            run="simulated",
            seed=experiment.schedule.seed,
            down=experiment.down,
            up=experiment.up,
            feedback=PersonalStore(folder / "owed") if experiment.up.remembers else None,
            watch=traffic.watch,
        )


def _players(
    experiment: Experiment,
    folder: Path,
    device: torch.device | str,
    progress: Callable[[int], None],
    actors: Actors | None,
    trainer: Trainer,
) -> AbstractContextManager[Exchange]:
    of_clients = (
        experiment.factory,
        experiment.data.load,
        experiment.plan,
        experiment.schedule.seed,
    )
    store = PersonalStore(folder / "personal") if experiment.plan.stores else None
    if actors is None:
        return nullcontext(
            in_process(
                *of_clients, store=store, device=device, progress=progress, trainer=trainer
            )
        )
    from fedmoe.exchange.ray.exchange import in_actors  # takes a second, and not all have Ray

    place = "cuda" if actors.gpus else "cpu"
    return in_actors(
        *of_clients, actors, store=store, device=place, progress=progress, trainer=trainer
    )


def check_budgets(experiment: Experiment, model: MoEState) -> None:
    """Before anything is written: every client must be able to take part.

    Raises:
        ValueError: a client's memory holds no expert in some layer, or fewer than a gate's k.
    """
    with torch.device("meta"):
        layers = moe_layers(experiment.factory())
    k = max((getattr(moe.gate, "k", 1) for _, moe in layers), default=0)
    for c in first_of_each_budget(together(experiment.clients, experiment.unseen)):
        try:
            count = experts_that_fit(model, c.memory_bytes)
        except ValueError as why:
            raise ValueError(f"client {c.id}: {why}") from why
        if count < k:
            raise ValueError(
                f"client {c.id}: memory_bytes must hold the gate's k = {k} experts per MoE layer, "
                f"got {c.memory_bytes}, which hold {count}; give it more memory, or lower k"
            )


def without(assignment: Assignment, personal: Callable[[str], bool]) -> Assignment:
    """The assignment without the parameters that clients keep to themselves."""
    if personal is nothing:
        return assignment
    kept = other_than(personal)
    rows = take_names(MoEState({}, assignment.absent_rows), kept).experts
    return replace(assignment, model=take_names(assignment.model, kept), absent_rows=rows)


def merged_accuracy(
    experiment: Experiment, merged: MoEState, device: torch.device | str = "cpu"
) -> float:
    """Accuracy of the one full model over the test parts of all clients together, or of those
    whom the closing evaluation asks.
    """
    device = torch.device(device)
    model = experiment.factory()
    load_state(model, merged)
    model.to(device)
    right, total = 0.0, 0
    for c in experiment.schedule.evaluated(experiment.clients):
        data = experiment.data.load(c.id)
        if experiment.plan.prepare is not None:
            data = experiment.plan.prepare(c.id, model, data)
        test = data.test
        if len(test.y):
            right += accuracy(model, test, device) * len(test.y)
            total += len(test.y)
    return right / max(total, 1)


def _data_here(experiment: Experiment) -> bool:
    """Whether this process, too, has the data of clients that work elsewhere."""
    try:
        for c in experiment.listed:
            experiment.data.load(c.id)
    except (OSError, LookupError, ValueError):
        return False
    return True


def _any(state: MoEState) -> bool:
    return bool(state.shared or state.experts)


def _drop_strangers(
    report: RoundReport[Any], experiment: Experiment, complain: Callable[[str], None]
) -> None:
    """Answers of nobody's clients are complained of: a log has no place for them."""
    known = by_id(experiment.clients)
    for f in (*report.failed, *report.refused):
        if f.client not in known:
            complain(f"round {report.round}: {f.reason}")
    report.failed = [f for f in report.failed if f.client in known]
    report.refused = [f for f in report.refused if f.client in known]


def _check_no_remains(folder: Path) -> None:
    for name in ("checkpoints", "personal", "owed"):
        if (folder / name).exists() and not (folder / "run.json").exists():
            raise FileExistsError(
                f"{folder / name} is left of a run whose run.json is missing: remove it, or "
                f"choose another folder"
            )


def _check_same(experiment: Experiment, info: RunInfo, folder: Path) -> None:
    """Raise ValueError where the run that was begun is not of this experiment."""
    schedule = experiment.schedule
    pairs: dict[str, tuple[object, object]] = {
        "experiment": (info.experiment, experiment.name),
        "method": (info.method, experiment.method),
        "seed": (info.seed, schedule.seed),
        "rounds": (info.rounds, schedule.rounds),
        "experts per layer": (tuple(info.num_experts_L), layer_sizes_of(experiment)),
        "partition": (info.partition_hash, experiment.data.partition_hash),
        "clients": ([c.id for c in info.clients], [c.id for c in experiment.listed]),
        "other clients": (info.others, _others(experiment)),
    }
    for what, (begun, asked) in pairs.items():
        if begun != asked:
            raise ValueError(
                f"{folder} holds a run with {what} {begun}, got {asked}: go on with the experiment "
                f"that was begun, or choose another folder"
            )


def layer_sizes_of(experiment: Experiment) -> tuple[int, ...]:
    with torch.device("meta"):
        return layer_sizes(experiment.factory())


class _Memory:
    """Peak memory of a client by the number of experts that it holds, measured once each."""

    def __init__(self, experiment: Experiment, device: torch.device | str) -> None:
        self.experiment, self.device = experiment, device
        self.known: dict[tuple[int, ...], int] = {}

    def of(self, sub_moe: SubMoE, num_layers: int) -> int:
        counts = tuple(sum(e.layer == i for e in sub_moe) for i in range(num_layers))
        if counts not in self.known:
            self.known[counts] = peak_bytes(self.experiment, sub_moe, self.device)
        return self.known[counts]


def _record(
    report: RoundReport[Any],
    sizes: tuple[int, ...],
    memory: _Memory | None,
    merged: float | None,
    digest: str,
) -> RoundRecord:
    held = {
        c: [sorted(e.expert for e in s if e.layer == i) for i in range(len(sizes))]
        for c, s in sorted(report.held.items())
    }
    losses = [m["loss"] for m in report.metrics.values() if "loss" in m]
    accuracies = {
        c: ClientAccuracy(
            m.get("received_validation"),
            m.get("received_test"),
            m.get("trained_validation"),
            m.get("trained_test"),
        )
        for c, m in sorted(report.metrics.items())
        if "received_test" in m
    }
    trained = sorted(c for c, m in report.metrics.items() if "loss" in m)
    return RoundRecord(
        round=report.round,
        phase=report.phase,
        seconds=report.seconds,
        bytes_down=report.bytes_down,
        bytes_up=report.bytes_up,
        bytes_once=report.bytes_down if report.phase == "explore" else report.bytes_once,
        clients=sorted(report.held),
        failed=sorted(report.failed, key=lambda f: f.client),
        refused=sorted(report.refused, key=lambda f: f.client),
        # Summed in order of client, so that a log does not depend on who answered first.
        loss=sum(sorted(losses)) / len(losses) if losses else None,
        held=held,
        count={c: p.count_LE.tolist() for c, p in sorted(report.profiles.items())},
        changes=report.changes,
        accuracy=accuracies or None,
        global_accuracy=merged,
        memory_bytes={}
        if memory is None
        else {c: memory.of(report.held[c], len(sizes)) for c in trained},
        model_hash=digest,
        unseen=dict(sorted(report.unseen.items())),
    )


def _run_info(experiment: Experiment, model: MoEState, data_here: bool) -> RunInfo:
    entries = []
    for c in experiment.listed:
        sizes = (c.num_examples, 0, 0)  # as far as it can be told without the data
        if data_here:
            data = experiment.data.load(c.id)
            sizes = (len(data.train.y), len(data.validation.y), len(data.test.y))
        train, validation, test = sizes
        entries.append(
            ClientEntry(
                id=c.id,
                group=experiment.data.groups.get(c.id),
                memory_bytes=c.memory_bytes,
                num_train=train,
                num_validation=validation,
                num_test=test,
            )
        )
    tensors = model_tensors(model)
    return RunInfo(
        experiment=experiment.name,
        method=experiment.method,
        seed=experiment.schedule.seed,
        rounds=experiment.schedule.rounds,
        num_experts_L=layer_sizes_of(experiment),
        num_classes=experiment.data.num_classes,
        partition_hash=experiment.data.partition_hash,
        versions=versions(),
        machine={"machine": platform.machine(), "cores": os.cpu_count() or 1},
        model_parameters=sum(t.numel() for t in tensors.values()),
        full_bytes=model_bytes(tensors),
        clients=entries,
        others=_others(experiment),
    )


def _others(experiment: Experiment) -> Others | None:
    """What is told of clients that are not told one by one."""
    listed, clients = experiment.listed, experiment.clients
    if len(listed) == len(clients):
        return None
    if not isinstance(clients, Population):
        clients = Population.of(clients)
    limits = [c.memory_bytes for c in first_of_each_budget(clients)]
    known = [limit for limit in limits if limit is not None]
    return Others(
        count=len(clients) - len(listed),
        num_train=int(clients.num_examples_C.sum()) - sum(c.num_examples for c in listed),
        least_memory_bytes=min(known, default=None),
        most_memory_bytes=max(known, default=None) if len(known) == len(limits) else None,
        clients_hash=clients.digest[:16],
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version(), "fedmoe": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
