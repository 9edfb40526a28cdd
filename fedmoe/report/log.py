"""The round log: what a run writes down as it goes, and the only thing reports read.

THE FORMAT, version 1. A run owns one directory, runs/EXPERIMENT/METHOD-seedS/, with two files.
Bytes are as serialised for the wire, accuracies are shares from 0 to 1, an expert is
[layer, expert] by its place in the global model, and an object keyed by clients has their
numbers as strings. Readers ignore fields that they do not know; every field below must be there.

`run.json`, one object, written once at the start:

    format            1
    experiment        name of the experiment
    method            name of the method, the same for all its seeds
    seed              whole number
    rounds            rounds of exploring and training that the run is to have
    num_experts_L     experts in each MoE layer, e.g. [16, 16]; [] for a model without experts
    num_classes       classes of the task, or null where there are none (language modelling)
    partition_hash    hash of who holds which example; runs with different ones do not compare
    versions          {"fedmoe": "0.1.0", "torch": ...}
    machine           {"cpu": ..., "cores": 2, ...}: any JSON
    model_parameters  parameters of the full model
    full_bytes        bytes of the full model, serialised
    clients           [{"id", "group" (its domain or task; or null), "memory_bytes" (its limit;
                      or null), "num_train", "num_validation", "num_test"}, ...]; where there are
                      more than 1,000, those whom the closing evaluation asks
    others            null where all clients are listed (or missing), else of those that are not:
                      {"count", "num_train" (of all of them), "least_memory_bytes" and
                      "most_memory_bytes" (of all clients; or null), "clients_hash"}

`rounds.jsonl`, one object on a line per round, in order, each flushed to disk before the next:

    format        1
    round         0, 1, ...; the closing evaluation has round == rounds
    phase         "explore" | "train" | "final" (the closing evaluation, no training)
    seconds       wall time of the round
    bytes_down    server to clients, all clients together
    bytes_up      clients to server
    bytes_once    the part of bytes_down that is a one-off cost, such as sending the full model
                  to be explored
    clients       [ids that took part]
    failed        [{"client", "reason"}, ...] were asked and did not deliver
    refused       [{"client", "reason"}, ...] sent an update that was not taken, e.g. not finite
    loss          mean training loss; null where nobody trained or it was not finite
    held          {"0": [[0, 2, 5], [1]], ...} client -> for each layer the experts it held
    count         {"0": [[90, 0, 31, ...], ...], ...} client -> for each layer the tokens that ran
                  each expert; a row may be longer than its layer if only zeros follow
    changes       [{"client", "action": "choose" | "add" | "drop" | "revert" | "freeze",
                  "experts": [[layer, expert], ...]}, ...]
    accuracy      null where nothing was evaluated, else {"0": {"received_validation",
                  "received_test", "trained_validation", "trained_test"}, ...}: of the model as
                  it arrived in this round, so after `round` rounds, and after local training on
                  it; any of the four may be missing
    global        accuracy on all clients' test parts together (or on those of the clients whom the
                  closing evaluation asks) of the merged model as this round began, so after
                  `round` rounds; null where not measured
    memory_bytes  {"0": peak bytes that the client needed, ...}; may be empty
    model_hash    hash of the merged model after the round
    unseen        {"30": {"served_test", "bytes_down", "bytes_up", ...}, ...}: in the closing
                  evaluation, clients that never trained, each served just in time; they are not in
                  run.json, nor are their bytes in those of the run; may be empty or missing

A kill can tear the last line. Readers leave a torn last line out and say so; damage anywhere
else is an error. A run resumes with `RunLog.open(directory).truncate_to(round)`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmoe.report.atomic import write_atomically
from fedmoe.report.fields import LogError, parse
from fedmoe.report.records import (
    ClientAccuracy,
    ClientEntry,
    Others,
    RoundRecord,
    RunInfo,
    check_record,
)

__all__ = [
    "ClientAccuracy",
    "ClientEntry",
    "LogError",
    "Others",
    "RoundRecord",
    "Run",
    "RunInfo",
    "RunLog",
    "read_run",
    "read_runs",
]


@dataclass(frozen=True)
class Run:
    """A run as read back."""

    info: RunInfo
    rounds: Sequence[RoundRecord]
    notes: Sequence[str] = ()  # what a reader must know of how the files were found


@dataclass(frozen=True)
class RunLog:
    """The open log of one run: writes, one process at a time."""

    directory: Path
    info: RunInfo

    @staticmethod
    def create(directory: Path, info: RunInfo) -> RunLog:
        """Start a log in a directory that has none yet.

        Raises:
            FileExistsError: the directory already holds a run.
            LogError: `info` is not what the format says.
        """
        directory = Path(directory)
        path = directory / "run.json"
        if path.exists():
            raise FileExistsError(
                f"{path} exists: a run was started here; resume it, or choose another directory"
            )
        text = json.dumps(info.to_json(), indent=1, allow_nan=False) + "\n"
        RunInfo.from_json(parse(text, "run.json"))
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "rounds.jsonl", "")
        write_atomically(path, text)  # last: a directory with run.json is a whole log
        return RunLog(directory, info)

    @staticmethod
    def open(directory: Path) -> RunLog:
        """Go on with the log in `directory`; call `truncate_to` before the next `append`."""
        return RunLog(Path(directory), _read_info(Path(directory)))

    @property
    def path(self) -> Path:
        return self.directory / "rounds.jsonl"

    def append(self, record: RoundRecord) -> None:
        """Write one round as one line, on disk when this returns.

        Raises:
            LogError: the record is not what the format says, or the file ends in a torn line.
        """
        line = json.dumps(record.to_json(), separators=(",", ":"), allow_nan=False)
        # The writer reads its own line, so that no reader can be the first to refuse it.
        where = f"{self.path}, round {record.round}"
        check_record(RoundRecord.from_json(parse(line, where)), self.info, where)
        with open(self.path, "ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    raise LogError(
                        f"{self.path}: the last line is torn; call truncate_to(round) first"
                    )
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def truncate_to(self, round: int) -> None:
        """Keep only the rounds before `round`, and drop a torn last line, atomically."""
        records, _ = _read_rounds(self.path, self.info)
        kept = [r.to_json() for r in records if r.round < round]
        lines = (json.dumps(r, separators=(",", ":"), allow_nan=False) + "\n" for r in kept)
        write_atomically(self.path, "".join(lines))


def read_run(directory: Path) -> Run:
    """Read one run's directory. A torn last line is left out, with a note.

    Raises:
        FileNotFoundError: there is no run.json.
        LogError: a file breaks the format; the message names file, line and field.
    """
    directory = Path(directory)
    info = _read_info(directory)
    records, notes = _read_rounds(directory / "rounds.jsonl", info)
    return Run(info, records, notes)


def read_runs(root: Path) -> list[Run]:
    """Read every run right under `root`, or `root` itself if it is one; by method, then seed.

    Raises:
        FileNotFoundError: `root` holds no run.
        LogError: see `read_run`.
    """
    root = Path(root)
    if (root / "run.json").exists():
        return [read_run(root)]
    runs = [read_run(path.parent) for path in sorted(root.glob("*/run.json"))]
    if not runs:
        raise FileNotFoundError(f"{root} holds no run: neither run.json nor */run.json is there")
    return sorted(runs, key=lambda run: (run.info.method, run.info.seed))


def _read_info(directory: Path) -> RunInfo:
    path = directory / "run.json"
    return RunInfo.from_json(parse(path.read_text(encoding="utf-8"), str(path)))


def _read_rounds(path: Path, info: RunInfo) -> tuple[list[RoundRecord], list[str]]:
    if not path.exists():
        return [], []
    # A torn line may end inside a character: let it decode, it will not parse.
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    if lines[-1] == "":
        lines.pop()
    records: list[RoundRecord] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            value = parse(line, where)
        except LogError:
            if number < len(lines):
                raise
            return records, [f"{where}: torn (the run was killed while writing it), left out"]
        record = RoundRecord.from_json(value)
        check_record(record, info, where)
        if records and record.round <= records[-1].round:
            raise LogError(
                f"{where}: field 'round' must come after {records[-1].round}, got {record.round}"
            )
        records.append(record)
    return records, []
