"""What one run and one round consist of, as values and as JSON. The format: see log.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from fedmoe.report.fields import LogError, Value
from fedmoe.types import Change, ClientFailure, ExpertId

FORMAT = 1
PHASES = ("explore", "train", "final")
ACTIONS = ("choose", "add", "drop", "revert", "freeze")

Json = dict[str, object]


@dataclass(frozen=True)
class ClientEntry:
    """One client of a run, as known at the start."""

    id: int
    group: str | None  # its domain or task
    memory_bytes: int | None  # its limit; None: no limit
    num_train: int
    num_validation: int
    num_test: int

    def to_json(self) -> Json:
        return {
            "id": int(self.id),
            "group": self.group,
            "memory_bytes": None if self.memory_bytes is None else int(self.memory_bytes),
            "num_train": int(self.num_train),
            "num_validation": int(self.num_validation),
            "num_test": int(self.num_test),
        }

    @staticmethod
    def from_json(entry: Value) -> ClientEntry:
        group, memory_bytes = entry.get("group"), entry.get("memory_bytes")
        return ClientEntry(
            id=entry.get("id").count(),
            group=None if group.is_null() else group.text(),
            memory_bytes=None if memory_bytes.is_null() else memory_bytes.count(),
            num_train=entry.get("num_train").count(),
            num_validation=entry.get("num_validation").count(),
            num_test=entry.get("num_test").count(),
        )


@dataclass(frozen=True)
class Others:
    """What is told of the clients that a run does not list, where it has too many."""

    count: int
    num_train: int  # of all of them
    least_memory_bytes: int | None  # of all clients, listed ones too; None: nobody has a limit
    most_memory_bytes: int | None  # None: somebody has no limit
    clients_hash: str  # of all clients

    def to_json(self) -> Json:
        return asdict(self)

    @staticmethod
    def from_json(entry: Value) -> Others:
        least, most = entry.get("least_memory_bytes"), entry.get("most_memory_bytes")
        return Others(
            count=entry.get("count").count(least=1),
            num_train=entry.get("num_train").count(),
            least_memory_bytes=None if least.is_null() else least.count(),
            most_memory_bytes=None if most.is_null() else most.count(),
            clients_hash=entry.get("clients_hash").text(),
        )


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run when it starts: run.json."""

    experiment: str
    method: str
    seed: int
    rounds: int
    num_experts_L: Sequence[int]
    num_classes: int | None
    partition_hash: str
    versions: Mapping[str, str]
    machine: Mapping[str, object]
    model_parameters: int
    full_bytes: int
    clients: Sequence[ClientEntry]
    others: Others | None = None  # clients that are not listed; None: all are

    @property
    def num_clients(self) -> int:
        """All that are registered, listed or not."""
        return len(self.clients) + (0 if self.others is None else self.others.count)

    def to_json(self) -> Json:
        return {
            "format": FORMAT,
            "experiment": self.experiment,
            "method": self.method,
            "seed": int(self.seed),
            "rounds": int(self.rounds),
            "num_experts_L": [int(n) for n in self.num_experts_L],
            "num_classes": None if self.num_classes is None else int(self.num_classes),
            "partition_hash": self.partition_hash,
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "model_parameters": int(self.model_parameters),
            "full_bytes": int(self.full_bytes),
            "clients": [c.to_json() for c in self.clients],
            "others": None if self.others is None else self.others.to_json(),
        }

    @staticmethod
    def from_json(run: Value) -> RunInfo:
        """Raises LogError, naming file, line and field, where `run` breaks the format."""
        _check_format(run)
        num_classes = run.get("num_classes")
        clients = tuple(ClientEntry.from_json(c) for c in run.get("clients").list())
        if len({c.id for c in clients}) < len(clients):
            raise run.get("clients").wrong("clients with different ids")
        return RunInfo(
            experiment=run.get("experiment").text(),
            method=run.get("method").text(),
            seed=run.get("seed").whole(),
            rounds=run.get("rounds").count(),
            num_experts_L=tuple(n.count(least=1) for n in run.get("num_experts_L").list()),
            num_classes=None if num_classes.is_null() else num_classes.count(least=1),
            partition_hash=run.get("partition_hash").text(),
            versions={name: v.text() for name, v in run.get("versions").items()},
            machine={name: v.value for name, v in run.get("machine").items()},
            model_parameters=run.get("model_parameters").count(),
            full_bytes=run.get("full_bytes").count(),
            clients=clients,
            others=_others_from_json(run.find("others")),
        )


@dataclass(frozen=True)
class ClientAccuracy:
    """One client's accuracies in one round, 0 to 1; None where not measured."""

    received_validation: float | None = None  # of the model as it arrived
    received_test: float | None = None
    trained_validation: float | None = None  # of the same model after local training
    trained_test: float | None = None

    def to_json(self) -> Json:
        values = {
            "received_validation": self.received_validation,
            "received_test": self.received_test,
            "trained_validation": self.trained_validation,
            "trained_test": self.trained_test,
        }
        return {name: float(v) for name, v in values.items() if v is not None}

    @staticmethod
    def from_json(entry: Value) -> ClientAccuracy:
        def share(name: str) -> float | None:
            value = entry.find(name)
            return None if value is None or value.is_null() else value.share()

        return ClientAccuracy(
            share("received_validation"),
            share("received_test"),
            share("trained_validation"),
            share("trained_test"),
        )


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round: one line of rounds.jsonl. See the module for each field."""

    round: int
    phase: str
    seconds: float
    bytes_down: int
    bytes_up: int
    bytes_once: int = 0
    clients: Sequence[int] = ()
    failed: Sequence[ClientFailure] = ()
    refused: Sequence[ClientFailure] = ()
    loss: float | None = None
    held: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)
    count: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)
    changes: Sequence[Change] = ()
    accuracy: Mapping[int, ClientAccuracy] | None = None
    global_accuracy: float | None = None  # "global" in the file, a reserved word here
    memory_bytes: Mapping[int, int] = field(default_factory=dict)
    model_hash: str = ""
    unseen: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> Json:
        finite_loss = self.loss is not None and math.isfinite(self.loss)
        return {
            "format": FORMAT,
            "round": int(self.round),
            "phase": self.phase,
            "seconds": float(self.seconds),
            "bytes_down": int(self.bytes_down),
            "bytes_up": int(self.bytes_up),
            "bytes_once": int(self.bytes_once),
            "clients": [int(c) for c in self.clients],
            "failed": _failures_to_json(self.failed),
            "refused": _failures_to_json(self.refused),
            # JSON has no NaN, and a run that diverged still has to be written down.
            "loss": float(self.loss) if finite_loss and self.loss is not None else None,
            "held": _layers_to_json(self.held),
            "count": _layers_to_json(self.count),
            "changes": [
                {
                    "client": int(c.client),
                    "action": c.action,
                    "experts": [[int(e.layer), int(e.expert)] for e in c.experts],
                }
                for c in self.changes
            ],
            "accuracy": None
            if self.accuracy is None
            else {str(client): a.to_json() for client, a in self.accuracy.items()},
            "global": None if self.global_accuracy is None else float(self.global_accuracy),
            "memory_bytes": {str(c): int(n) for c, n in self.memory_bytes.items()},
            "model_hash": self.model_hash,
            "unseen": {
                str(c): {name: float(v) for name, v in metrics.items()}
                for c, metrics in self.unseen.items()
            },
        }

    @staticmethod
    def from_json(record: Value) -> RoundRecord:
        """Raises LogError, naming file, line and field, where `record` breaks the format."""
        _check_format(record)
        loss, accuracy, merged = (record.get(n) for n in ("loss", "accuracy", "global"))
        result = RoundRecord(
            round=record.get("round").count(),
            phase=record.get("phase").one_of(PHASES),
            seconds=record.get("seconds").number(),
            bytes_down=record.get("bytes_down").count(),
            bytes_up=record.get("bytes_up").count(),
            bytes_once=record.get("bytes_once").count(),
            clients=record.get("clients").counts(),
            failed=_failures_from_json(record.get("failed")),
            refused=_failures_from_json(record.get("refused")),
            loss=None if loss.is_null() else loss.number(),
            held=_layers_from_json(record.get("held")),
            count=_layers_from_json(record.get("count")),
            changes=tuple(_change_from_json(c) for c in record.get("changes").list()),
            accuracy=None
            if accuracy.is_null()
            else {c: ClientAccuracy.from_json(a) for c, a in accuracy.client_items()},
            global_accuracy=None if merged.is_null() else merged.share(),
            memory_bytes={c: n.count() for c, n in record.get("memory_bytes").client_items()},
            model_hash=record.get("model_hash").text(),
            unseen=_unseen_from_json(record.find("unseen")),
        )
        if result.bytes_once > result.bytes_down:
            raise record.get("bytes_once").wrong(f"at most bytes_down, {result.bytes_down}")
        return result


def check_record(record: RoundRecord, info: RunInfo, where: str) -> None:
    """Raise LogError where a record speaks of what its run does not have."""
    known = {c.id for c in info.clients}
    named: Iterable[tuple[str, Iterable[int]]] = (
        ("clients", record.clients),
        ("failed", (f.client for f in record.failed)),
        ("refused", (f.client for f in record.refused)),
        ("held", record.held),
        ("count", record.count),
        ("changes", (c.client for c in record.changes)),
        ("accuracy", record.accuracy or ()),
        ("memory_bytes", record.memory_bytes),
    )
    for name, clients in named:
        for client in clients:
            if client not in known and info.others is None:
                raise LogError(f"{where}: field '{name}' names client {client}, not in run.json")
    if (record.phase == "final") != (record.round == info.rounds) or record.round > info.rounds:
        raise LogError(
            f"{where}: field 'round' must be below {info.rounds}, or equal to it in phase "
            f"'final', got round {record.round} in phase '{record.phase}'"
        )
    num_L = info.num_experts_L
    for client, layers in record.held.items():
        if len(layers) != len(num_L) or any(
            e >= n for experts, n in zip(layers, num_L, strict=False) for e in experts
        ):
            raise LogError(
                f"{where}: field 'held.{client}' must name experts of {len(num_L)} layers "
                f"with {list(num_L)} experts, got {_few(layers)}"
            )
    for client, layers in record.count.items():
        if len(layers) != len(num_L) or any(
            len(row) < n or any(row[n:]) for row, n in zip(layers, num_L, strict=False)
        ):
            raise LogError(
                f"{where}: field 'count.{client}' must have {len(num_L)} rows "
                f"for {list(num_L)} experts, got {_few(layers)}"
            )
    for change in record.changes:
        for layer, expert in change.experts:
            if layer >= len(num_L) or expert >= num_L[layer]:
                raise LogError(
                    f"{where}: field 'changes' names expert [{layer}, {expert}], but the layers "
                    f"have {list(num_L)} experts"
                )


def _few(layers: Sequence[Sequence[int]]) -> str:
    text = str([list(row) for row in layers])
    return text if len(text) <= 80 else text[:77] + "..."


def _check_format(value: Value) -> None:
    version = value.get("format")
    if version.value != FORMAT:
        raise LogError(
            f"{version.where}: field 'format' is {version.value!r}, and this fedmoe reads "
            f"format {FORMAT} only; read it with the version that wrote it"
        )


def _failures_to_json(failures: Iterable[ClientFailure]) -> list[Json]:
    return [{"client": int(f.client), "reason": f.reason} for f in failures]


def _failures_from_json(value: Value) -> tuple[ClientFailure, ...]:
    return tuple(
        ClientFailure(f.get("client").count(), f.get("reason").text()) for f in value.list()
    )


def _layers_to_json(per_client: Mapping[int, Sequence[Sequence[int]]]) -> Json:
    return {str(c): [[int(n) for n in row] for row in rows] for c, rows in per_client.items()}


def _layers_from_json(value: Value) -> dict[int, tuple[tuple[int, ...], ...]]:
    return {c: tuple(row.counts() for row in rows.list()) for c, rows in value.client_items()}


def _others_from_json(value: Value | None) -> Others | None:
    """Older logs have no such field."""
    return None if value is None or value.is_null() else Others.from_json(value)


def _unseen_from_json(value: Value | None) -> dict[int, dict[str, float]]:
    """Older logs have no such field."""
    if value is None:
        return {}
    return {c: {n: v.number() for n, v in m.items()} for c, m in value.client_items()}


def _change_from_json(value: Value) -> Change:
    experts = []
    for entry in value.get("experts").list():
        pair = entry.counts()
        if len(pair) != 2:
            raise entry.wrong("[layer, expert]")
        experts.append(ExpertId(*pair))
    return Change(
        client=value.get("client").count(),
        action=value.get("action").one_of(ACTIONS),
        experts=tuple(experts),
    )
