"""A client's own parameters on its own disk, one file per round, so that a run can resume.

A server that was killed in a round starts it again, and then every client must begin with the
parameters that it had before that round, not with those that it may have saved in it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from fedmoe.types import ExpertId, MoEState
from fedmoe.wire.messages import model_tensors

KEEP = 4  # newest rounds per client; more than checkpoints of the server


@dataclass(frozen=True)
class PersonalStore:
    """`folder/client-000003/round-000012.safetensors`: client 3's parameters after round 12."""

    folder: Path

    def load(self, client: int, before: int) -> MoEState | None:
        """What the client had when round `before` began; None if it had not trained yet.

        Raises:
            ValueError: the file is damaged.
        """
        rounds = [r for r in self._rounds(client) if r < before]
        if not rounds:
            return None
        path = self._path(client, max(rounds))
        try:
            tensors = load(path.read_bytes())
        except Exception as why:  # safetensors has no common class for what damage raises
            raise ValueError(f"client {client}: {path} is damaged: {why}") from why
        shared: dict[str, Tensor] = {}
        experts: dict[ExpertId, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, _, rest = name.partition("/")
            if part == "shared":
                shared[rest] = value
            else:
                place, _, inner = rest.partition("/")
                layer, number = place.split(".")
                experts.setdefault(ExpertId(int(layer), int(number)), {})[inner] = value
        return MoEState(shared, experts)

    def save(self, client: int, round: int, state: MoEState) -> None:
        """Atomically; later rounds, left by a server that was killed, and old ones go."""
        path = self._path(client, round)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.part")
        with beside.open("wb") as file:
            file.write(save({n: t.contiguous() for n, t in model_tensors(state).items()}))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        known = sorted(self._rounds(client))
        for old in [r for r in known if r > round] + [r for r in known if r <= round][:-KEEP]:
            self._path(client, old).unlink(missing_ok=True)
        for leftover in path.parent.glob("*.part"):  # of a process that was killed
            leftover.unlink(missing_ok=True)

    def _path(self, client: int, round: int) -> Path:
        return self.folder / f"client-{client:06d}" / f"round-{round:06d}.safetensors"

    def _rounds(self, client: int) -> list[int]:
        folder = self._path(client, 0).parent
        return [int(p.stem.removeprefix("round-")) for p in folder.glob("round-*.safetensors")]
