"""Save and load a server's state: atomically, checked by content hash, without pickle.

A checkpoint is a folder `round-000012` of two files, `state.safetensors` with every tensor and
`state.json` with all the rest and the SHA-256 of both. It is written beside its place, flushed to
disk and renamed, so a folder of that name is always whole; a hash tells if it was damaged later.

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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedmoe.types import ExpertId

FORMAT = 1
KEEP = 3  # newest checkpoints that stay on disk
T = TypeVar("T")


class DamagedCheckpointError(ValueError):
    """A checkpoint whose content is not what was written; says which file, and what is wrong."""


def save_checkpoint(folder: Path, round: int, state: object, keep: int = KEEP) -> str:
    """Write `state`, as it is before round `round`; returns its content hash, hexadecimal.

    Once the new one is in place, older checkpoints beyond `keep` go, and later ones, which a run
    that fell back has left behind. Writing one again is allowed.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
    tensors, text, digest = _encode(state)
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / _name(round)
    beside = folder / f".{place.name}.{os.getpid()}.part"
    aside = folder / f".{place.name}.{os.getpid()}.old.part"
    for leftover in (beside, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir()
    head = {"format": FORMAT, "round": round, "digest": digest, "state": json.loads(text)}
    _write(beside / "state.safetensors", tensors)
    _write(beside / "state.json", json.dumps(head, sort_keys=True).encode())
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
    return digest


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
        return round, _decode(kind, head["state"], load_tensors(raw))
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
    return _encode(state)[2]


def _name(round: int) -> str:
    return f"round-{round:06d}"


def _all(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("round-*") if folder.is_dir() else ():
        number = path.name.removeprefix("round-")
        if path.is_dir() and number.isdecimal():
            yield int(number), path


def _encode(state: object) -> tuple[bytes, str, str]:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(state, tensors), sort_keys=True)
    raw = save_tensors({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()})
    return raw, text, _digest(raw, text)


def _digest(raw: bytes, text: str) -> str:
    return hashlib.sha256(hashlib.sha256(raw).digest() + text.encode()).hexdigest()


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """As JSON can hold it; tensors go to `tensors`, and their names stand in their place."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = f"t{len(tensors):06d}"
        tensors[name] = value
        return name
    if isinstance(value, ExpertId):
        return _key(value)
    if isinstance(value, Mapping):
        return {_key(k): _plain(value[k], tensors) for k in sorted(value)}
    if isinstance(value, frozenset):
        return [_plain(v, tensors) for v in sorted(value)]
    if isinstance(value, tuple):
        return [_plain(v, tensors) for v in value]
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: _plain(getattr(value, f.name), tensors) for f in fields}
    raise TypeError(f"a state may not hold a {type(value).__name__}: {value!r:.80}")


def _key(key: object) -> str:
    return f"{key.layer}.{key.expert}" if isinstance(key, ExpertId) else str(key)


def _decode(kind: Any, value: Any, tensors: Mapping[str, Tensor]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = [k for k in arguments if k is not types.NoneType]
        return None if value is None else _decode(inner[0], value, tensors)
    if kind is Tensor:
        return tensors[value]
    if kind is ExpertId:
        layer, expert = value.split(".")
        return ExpertId(int(layer), int(expert))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        of_key, of_value = arguments
        return {_read_key(of_key, k): _decode(of_value, v, tensors) for k, v in value.items()}
    if origin is frozenset:
        return frozenset(_decode(arguments[0], v, tensors) for v in value)
    if origin is tuple:
        alike = arguments[-1] is Ellipsis
        kinds = [arguments[0]] * len(value) if alike else arguments
        return tuple(_decode(k, v, tensors) for k, v in zip(kinds, value, strict=True))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = [f.name for f in dataclasses.fields(kind)]
        return typing.cast(Any, kind)(**{n: _decode(hints[n], value[n], tensors) for n in fields})
    if kind in (bool, int, float, str):
        return kind(value)
    raise TypeError(f"cannot read a {kind}")


def _read_key(kind: Any, key: str) -> Any:
    return _decode(ExpertId, key, {}) if kind is ExpertId else kind(key)


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
