"""Groups of tensors that a client has seen, on its disk under the hash of their content.

What is kept is what travelled, encoded as it was, so that the hash can be taken again on reading:
a damaged file counts as absent and goes.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from safetensors.numpy import load, save

from fedmoe.wire import manifest_pb2 as pb
from fedmoe.wire.groups import Sealed, check_sealed
from fedmoe.wire.parcel import HELD_LIMIT, ParcelError

SMALLEST = 1024  # bytes; a smaller group is sooner sent than looked for
LEFT_OVER_S = 3600.0  # after which a file that nobody finished is of a process that was killed

_META, _TENSOR = "group", "tensor/"


@dataclass(frozen=True)
class ExpertCache:
    """`folder/HASH.safetensors`; at most `limit_bytes` in all, least recently used goes first.

    Several processes may share the folder: files come into place whole, and whoever finds one
    gone has not got it.
    """

    folder: Path
    limit_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.limit_bytes < 0:
            raise ValueError(f"limit_bytes must be 0 or more, got {self.limit_bytes}")

    def get(self, hash: bytes) -> Sealed | None:
        """The group of this hash, or None."""
        path = self._path(hash)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        sealed = _read(raw)
        if sealed is None or sealed.hash != hash:
            path.unlink(missing_ok=True)
            return None
        self._touch(path)
        return sealed

    def put(self, sealed: Sealed) -> None:
        """Keep a group, unless it is tiny or larger than the whole cache; others may have to go.

        A disk that cannot be written is no error: the group will be sent again.
        """
        if not SMALLEST <= sealed.nbytes <= self.limit_bytes:
            return
        path = self._path(sealed.hash)
        if path.exists():
            self._touch(path)
            return
        raw = _written(sealed)
        if len(raw) > self.limit_bytes:
            return
        beside = path.with_suffix(f".{os.getpid()}-{time.time_ns()}.part")
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                beside.write_bytes(raw)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
            self._make_room()

    def held(self) -> tuple[bytes, ...]:
        """Hashes of what is kept, most recently used first; no more than can be reported."""
        return tuple(bytes.fromhex(path.stem) for _, _, path in self._files()[:HELD_LIMIT])

    def _path(self, hash: bytes) -> Path:
        return self.folder / f"{hash.hex()}.safetensors"

    def _touch(self, path: Path) -> None:
        with contextlib.suppress(OSError):  # it may have gone in the meantime
            os.utime(path)

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path), newest first."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            try:
                stat = path.stat()
                bytes.fromhex(path.stem)
            except (OSError, ValueError):
                continue
            found.append((stat.st_mtime_ns, stat.st_size, path))
        return sorted(found, reverse=True)

    def _make_room(self) -> None:
        total = 0
        for _, size, path in self._files():
            total += size
            if total > self.limit_bytes:
                path.unlink(missing_ok=True)
        for part in self.folder.glob("*.part"):
            try:
                if time.time() - part.stat().st_mtime > LEFT_OVER_S:
                    part.unlink(missing_ok=True)
            except OSError:
                continue


def _written(sealed: Sealed) -> bytes:
    blobs = {_META: sealed.meta.SerializeToString(deterministic=True)}
    blobs |= {_TENSOR + name: raw for name, raw in sealed.raws.items()}
    return save({name: np.frombuffer(raw, np.uint8) for name, raw in blobs.items()})


def _read(raw: bytes) -> Sealed | None:
    """The group in a file, or None where the file is damaged in any way."""
    try:
        blobs = {name: blob.tobytes() for name, blob in load(raw).items()}
    except Exception:  # safetensors has no common class for what damage raises
        return None
    meta = pb.Group()
    try:
        meta.ParseFromString(blobs[_META])
        raws = {
            name.removeprefix(_TENSOR): blob
            for name, blob in blobs.items()
            if name.startswith(_TENSOR)
        }
        check_sealed(meta, raws)
    except (KeyError, DecodeError, ParcelError):
        return None
    return Sealed(meta, raws)
