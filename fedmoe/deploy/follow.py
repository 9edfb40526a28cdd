"""A run's log as it grows, read by whoever watches the run from another process."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedmoe.report.fields import LogError, parse
from fedmoe.report.log import RoundRecord, RunInfo


class Follower:
    """The rounds that `folder` has logged so far.

    A run that is resumed rewrites its log; then all of it is read again, and what is logged anew
    is new again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info: RunInfo | None = None
        self.records: list[RoundRecord] = []
        self._file = 0  # its inode: a rewritten log is another file
        self._offset = 0

    def look(self) -> list[RoundRecord]:
        """The rounds that came since the last look; none where the log is not there yet."""
        if self.info is None:
            self.info = self._read_info()
        try:
            with (self.folder / "rounds.jsonl").open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._file or stat.st_size < self._offset:
                    self._file, self._offset, before = stat.st_ino, 0, self.records
                    self.records = []
                else:
                    before = []
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]  # the rest is still being written, or torn
        self._offset += len(whole)
        found = []
        for line in whole.splitlines():
            where = f"{self.folder / 'rounds.jsonl'}, round {len(self.records)}"
            found.append(RoundRecord.from_json(parse(line.decode("utf-8"), where)))
        self.records += found
        known = {(r.round, r.model_hash) for r in before}
        return [r for r in found if (r.round, r.model_hash) not in known]

    def _read_info(self) -> RunInfo | None:
        path = self.folder / "run.json"
        try:
            return RunInfo.from_json(parse(path.read_text(encoding="utf-8"), str(path)))
        except (FileNotFoundError, LogError):
            return None

    @property
    def is_finished(self) -> bool:
        """Whether the closing evaluation is logged."""
        return bool(self.records) and self.records[-1].phase == "final"

    @property
    def bytes_moved(self) -> int:
        return sum(r.bytes_down + r.bytes_up for r in self.records)

    @property
    def accuracy(self) -> float | None:
        """Mean test accuracy of models as received, where last measured."""
        for record in reversed(self.records):
            if (mean := mean_accuracy(record)) is not None:
                return mean
        return None


class Tail:
    """The JSON objects that are appended to a file from now on, a line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def look(self) -> Iterator[dict[str, Any]]:
        """Those that came since the last look; a line that is not one is left out."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


def mean_accuracy(record: RoundRecord) -> float | None:
    """Over the clients that measured the model that they received."""
    known = [a.received_test for a in (record.accuracy or {}).values()]
    values = [a for a in known if a is not None]
    return sum(values) / len(values) if values else None
