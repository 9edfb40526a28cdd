"""Save and load a server's state: atomically, checked by content hash, without pickle.

A checkpoint is a folder `round-000012` of two files, `state.safetensors` with every tensor and
`state.json` with all the rest and the SHA-256 of both. It is written beside its place, flushed to
disk and renamed, so a folder of that name is always whole; a hash tells if it was damaged later.
All registered clients, where they are a `Population`, stand once for all checkpoints of a folder,
in `clients-HASH.safetensors` beside them; what is remembered of each client, where it is a `Table`,
is two tensors.

Any frozen dataclass can be saved whose fields are numbers, text, booleans, tensors, the types of
`fedmoe.types`, and mappings, tuples and frozensets of them. The fields' type hints say how to read
them back, so nothing in a file can name a class to be made.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedmoe.population import ById, Population
from fedmoe.table import Form, Table
from fedmoe.types import ClientInfo, ExpertId

FORMAT = 1
KEEP = 3  # newest checkpoints that stay on disk
TABLE, POPULATION = "table", "population"  # in place of a client's number, which is a number
T = TypeVar("T")


class DamagedCheckpointError(ValueError):
    """A checkpoint whose content is not what was written; says which file, and what is wrong."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A state as it is written: for who needs its hash before it is saved."""

    tensors: bytes
    text: str
    digest: str
    populations: Sequence[Population]  # that it names by their hash


def snapshot(state: object) -> Snapshot:
    """The state as `save_checkpoint` writes it."""
    return _encode(state)


def save_checkpoint(folder: Path, round: int, state: object, keep: int = KEEP) -> str:
    """Write `state`, as it is before round `round`; returns its content hash, hexadecimal.

    Once the new one is in place, older checkpoints beyond `keep` go, and later ones, which a run
    that fell back has left behind. Writing one again is allowed.

    Args:
        state: the state itself, or its `Snapshot`.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
    shot = state if isinstance(state, Snapshot) else _encode(state)
    folder.mkdir(parents=True, exist_ok=True)
    for population in shot.populations:
        _save_population(folder, population)
    place = folder / _name(round)
    beside = folder / f".{place.name}.{os.getpid()}.part"
    aside = folder / f".{place.name}.{os.getpid()}.old.part"
    for leftover in (beside, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir()
    # As json.dumps writes it, but the state's own text is not read and written once more.
    head = json.dumps({"format": FORMAT, "round": round, "digest": shot.digest}, sort_keys=True)
    _write(beside / "state.safetensors", shot.tensors)
    _write(beside / "state.json", f'{head[:-1]}, "state": {shot.text}}}'.encode())
    _flush_folder(beside)
    if place.exists():
        place.rename(aside)
    beside.rename(place)
    _flush_folder(folder)
    kept = [r for r, _ in sorted(_all(folder)) if r <= round][-keep:]
    for number, other in list(_all(folder)):
        if number not in kept:
            shutil.rmtree(other, ignore_errors=True)
    for leftover in folder.glob(".round-*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    return shot.digest


def load_checkpoint(path: Path, kind: type[T]) -> tuple[int, T]:
    """Read one checkpoint: the round that comes next, and the state.

    Raises:
        DamagedCheckpointError: a file is missing, changed, or not of this format or `kind`.
    """
    try:
        head = json.loads((path / "state.json").read_bytes())
        raw = (path / "state.safetensors").read_bytes()
    except (OSError, ValueError) as why:
        raise DamagedCheckpointError(f"{path}: cannot be read: {why}") from why
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        found = head.get("format") if isinstance(head, dict) else None
        raise DamagedCheckpointError(f"{path / 'state.json'}: format must be {FORMAT}, got {found}")
    try:
        text = json.dumps(head["state"], sort_keys=True)
        if _digest(raw, text) != head["digest"]:
            raise DamagedCheckpointError(f"{path}: its content does not match its hash")
        round = int(head["round"])
        if path.name != _name(round):  # the hash is of the state alone
            raise DamagedCheckpointError(f"{path}: holds round {round}, as {_name(round)} would")
        written = _Written(load_tensors(raw), path.parent)
        return round, _decode(kind, head["state"], written)
    except DamagedCheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as why:
        raise DamagedCheckpointError(f"{path}: is not a {kind.__name__}: {why!r}") from why


def newest_checkpoint(
    folder: Path, kind: type[T], complain: typing.Callable[[str], None] = lambda line: None
) -> tuple[int, T] | None:
    """The newest checkpoint that is whole, or None; `complain` hears of every damaged one."""
    for _, path in sorted(_all(folder), reverse=True):
        try:
            return load_checkpoint(path, kind)
        except DamagedCheckpointError as why:
            complain(f"{why}; falling back to the checkpoint before it")
    return None


def content_hash(state: object) -> str:
    """The hash that `save_checkpoint` would give; equal states have equal hashes."""
    return _encode(state).digest


def read_value(kind: Any, value: Any, path: Path, tensors: Mapping[str, Tensor]) -> Any:
    """A part of a state as it stands in the checkpoint `path`, by the type that it is of.

    Raises:
        DamagedCheckpointError: it is not of that type.
    """
    try:
        return _decode(kind, value, _Written(tensors, path.parent))
    except (KeyError, TypeError, AttributeError, ValueError) as why:
        raise DamagedCheckpointError(f"{path}: holds no {kind}: {why!r}") from why


def _name(round: int) -> str:
    return f"round-{round:06d}"


def _all(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("round-*") if folder.is_dir() else ():
        number = path.name.removeprefix("round-")
        if path.is_dir() and number.isdecimal():
            yield int(number), path


@dataclass(frozen=True, eq=False)
class _Writing:
    """What a state's text names and does not hold, as it is met."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    populations: dict[str, Population] = field(default_factory=dict)

    def add(self, value: Tensor) -> str:
        name = f"t{len(self.tensors):06d}"
        self.tensors[name] = value
        return name


@dataclass(frozen=True, eq=False)
class _Written:
    """What the text of a checkpoint names: its tensors, and what stands beside it."""

    tensors: Mapping[str, Tensor]
    folder: Path


def _encode(state: object) -> Snapshot:
    found = _Writing()
    text = json.dumps(_plain(state, found), sort_keys=True)
    raw = save_tensors(dict(_apart(found.tensors)))
    return Snapshot(raw, text, _digest(raw, text), tuple(found.populations.values()))


def _apart(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, none of which shares memory with another; only such ones are copied."""
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != own.numel() * own.element_size():
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        yield name, own


def _digest(raw: bytes, text: str) -> str:
    return hashlib.sha256(hashlib.sha256(raw).digest() + text.encode()).hexdigest()


def _plain(value: Any, found: _Writing) -> Any:
    """As JSON can hold it; tensors and populations go to `found`, in their place are names."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return found.add(value)
    if isinstance(value, ExpertId):
        return _key(value)
    if isinstance(value, ById):
        found.populations[value.population.digest] = value.population
        return {POPULATION: value.population.digest}
    if isinstance(value, Table):
        return {TABLE: _plain_table(value, found)}
    if isinstance(value, Mapping):
        return {_key(k): _plain(value[k], found) for k in sorted(value)}
    if isinstance(value, frozenset):
        return [_plain(v, found) for v in sorted(value)]
    if isinstance(value, tuple):
        return [_plain(v, found) for v in value]
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: _plain(getattr(value, f.name), found) for f in fields}
    raise TypeError(f"a state may not hold a {type(value).__name__}: {value!r:.80}")


def _key(key: object) -> str:
    return f"{key.layer}.{key.expert}" if isinstance(key, ExpertId) else str(key)


def _plain_table(table: Table[Any], found: _Writing) -> dict[str, Any]:
    width = table.form.row.itemsize
    raw = np.ascontiguousarray(table.rows()).view(np.uint8).reshape(len(table), width)
    return {
        "ids": found.add(torch.from_numpy(table.id_K.astype(np.uint32))),
        "rows": found.add(torch.from_numpy(raw)),
        "experts": [_key(e) for e in table.form.experts],
        "dtype": table.form.dtype,
        "shape": list(table.form.shape),
    }


def _read_table(kind: Any, value: Mapping[str, Any], written: _Written) -> Table[Any]:
    experts = tuple(_read_key(ExpertId, e) for e in value["experts"])
    dtype, shape = np.dtype(value["dtype"]), tuple(map(int, value["shape"]))
    if dtype.kind not in "biuf":  # of the others some are addresses
        raise ValueError(f"a table's tensors must hold numbers, got {dtype}")
    form = Form(kind, experts, dtype.name, shape)
    raw = written.tensors[value["rows"]].numpy()
    if raw.dtype != np.uint8 or raw.shape[1:] != (form.row.itemsize,):
        raise ValueError(f"a table's rows must have {form.row.itemsize} bytes, got {raw.shape}")
    rows = np.ascontiguousarray(raw).reshape(-1).view(form.row)
    id_K = written.tensors[value["ids"]].numpy().astype(np.int64)
    return Table.from_rows(form, id_K, rows)


def _decode(kind: Any, value: Any, written: _Written) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = [k for k in arguments if k is not types.NoneType]
        return None if value is None else _decode(inner[0], value, written)
    if kind is Tensor:
        return written.tensors[value]
    if kind is ExpertId:
        return _read_key(ExpertId, value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        of_key, of_value = arguments
        if of_value is ClientInfo and value.keys() == {POPULATION}:
            return _load_population(written.folder, value[POPULATION]).by_id
        if of_key is int and value.keys() == {TABLE}:
            return _read_table(of_value, value[TABLE], written)
        return {_read_key(of_key, k): _decode(of_value, v, written) for k, v in value.items()}
    if origin is frozenset:
        return frozenset(_decode(arguments[0], v, written) for v in value)
    if origin is tuple:
        alike = arguments[-1] is Ellipsis
        kinds = [arguments[0]] * len(value) if alike else arguments
        return tuple(_decode(k, v, written) for k, v in zip(kinds, value, strict=True))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = [f.name for f in dataclasses.fields(kind)]
        return typing.cast(Any, kind)(**{n: _decode(hints[n], value[n], written) for n in fields})
    if kind in (bool, int, float, str):
        return kind(value)
    raise TypeError(f"cannot read a {kind}")


def _read_key(kind: Any, key: str) -> Any:
    if kind is not ExpertId:
        return kind(key)
    layer, expert = key.split(".")
    return ExpertId(int(layer), int(expert))


COLUMNS = ("num_examples_C", "memory_C", "task_C", "id_C")


def _population_path(folder: Path, digest: str) -> Path:
    return folder / f"clients-{digest[:32]}.safetensors"


def _save_population(folder: Path, population: Population) -> None:
    """Beside the checkpoints, if it is not there yet."""
    path = _population_path(folder, population.digest)
    if path.exists():
        return
    columns = {n: getattr(population, n) for n in COLUMNS}
    tensors = {
        n: torch.from_numpy(np.ascontiguousarray(c, np.int64))
        for n, c in columns.items()
        if c is not None
    }
    beside = folder / f".{path.name}.{os.getpid()}.part"
    _write(beside, save_tensors(tensors, {"tasks": json.dumps(population.tasks)}))
    beside.rename(path)
    _flush_folder(folder)


def _load_population(folder: Path, digest: str) -> Population:
    """Raises DamagedCheckpointError: it is missing, or is not what the checkpoint names."""
    path = _population_path(folder, digest)
    try:
        raw = path.read_bytes()
        columns = {n: t.numpy() for n, t in load_tensors(raw).items()}
        size = int.from_bytes(raw[:8], "little")
        tasks = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["tasks"])
        population = Population(**columns, tasks=tuple(tasks))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as why:
        raise DamagedCheckpointError(f"{path}: cannot be read: {why}") from why
    if population.digest != digest:
        raise DamagedCheckpointError(f"{path}: its content does not match its hash")
    return population


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
