"""What a client must know of a run besides its assignments; travels with every message."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

LONGEST = 2**16  # characters of the text
KEY = re.compile(r"[0-9a-z]{1,64}")  # it names folders


@dataclass(frozen=True)
class Terms:
    """How both sides make the same experiment, and how they tell that they did."""

    key: str  # of the run, the same after a resume; what clients keep is kept under it
    run: str  # of the run as this process of the server leads it: any other is foreign
    target: str  # of the table of experiments, or module:function
    method: str
    seed: int
    rounds: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    definition: str = ""  # hash of the settings; empty where they cannot be told
    partition: str = ""  # hash of which example is whose

    @property
    def text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def read(text: str) -> "Terms":
        """Raises ValueError: not the terms of a run; says in what way."""
        if len(text) > LONGEST:
            raise ValueError(f"terms must be at most {LONGEST} characters, got {len(text)}")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as why:
            raise ValueError(f"terms must be JSON: {why}") from why
        if not isinstance(found, dict):
            raise ValueError(f"terms must be an object, got {type(found).__name__}")
        names = {f.name for f in fields(Terms)}
        if strange := sorted(found.keys() ^ names):
            raise ValueError(
                f"terms must hold {', '.join(sorted(names))}; {strange[0]!r} "
                f"{'is missing' if strange[0] in names else 'is none of them'}"
            )
        for name, value in found.items():
            kind = int if name in ("seed", "rounds") else dict if name == "arguments" else str
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"terms: {name} must be of type {kind.__name__}, got {value!r}")
        if not KEY.fullmatch(found["key"]):
            raise ValueError(
                f"terms: key must be 1 to 64 small letters and digits, got {found['key']!r}"
            )
        if not 0 <= found["seed"] < 2**32:
            raise ValueError(f"terms: seed must be 0 or more and below 2**32, got {found['seed']}")
        if found["rounds"] < 1:
            raise ValueError(f"terms: rounds must be at least 1, got {found['rounds']}")
        return Terms(**found)
