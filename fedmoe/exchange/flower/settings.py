"""What a run over Flower is to be, as its run configuration says it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmoe.exchange.flower.policy import PATIENT, RoundPolicy
from fedmoe.experiments.run import Spec
from fedmoe.experiments.table import default_rounds
from fedmoe.wire.codecs import BF16, Codec, Int8, Raw, TopK
from fedmoe.wire.packing import RAW, Codecs

Config = Mapping[str, bool | bytes | float | int | str]  # as Flower has it
KEYS = (
    "experiment",
    "method",
    "seed",
    "rounds",
    "arguments",
    "folder",
    "clients",
    "only-first",
    "wait-s",
    "deadline-s",
    "quorum",
    "enough",
    "retries",
    "codec-down",
    "codec-up",
    "device",
)


@dataclass(frozen=True)
class Settings:
    """A run over Flower: which experiment, where it is logged, for whom it waits.

    Codecs that are not raw are taken in place of the experiment's own.
    """

    spec: Spec
    folder: Path
    clients: int = 0  # that must be there before it begins; 0: all that train
    wait_s: float | None = None  # for them; None: without end
    only_first: int = 0  # of the experiment's clients that there are in this run; 0: all
    policy: RoundPolicy = PATIENT
    down: Codecs = RAW
    up: Codecs = RAW
    device: str = "cpu"

    @staticmethod
    def of(config: Config) -> "Settings":
        """From a run configuration; what it does not say is as in the class, and 0 is none.

        Raises:
            ValueError: a key is unknown, or a value is missing or makes no sense.
        """
        if strange := sorted(set(config) - set(KEYS)):
            raise ValueError(
                f"the run configuration must have no key {strange[0]!r}; there are "
                f"{', '.join(KEYS)}"
            )
        target, method = str(config.get("experiment", "demo")), str(config.get("method", "fedmoe"))
        seed, rounds = _whole(config, "seed", 0), _whole(config, "rounds", 0)
        quorum = _number(config, "quorum", 0.5)
        policy = RoundPolicy(
            deadline_s=_number(config, "deadline-s", 0.0) or None,
            quorum=quorum,
            enough=_number(config, "enough", 1.0),
            retries=_whole(config, "retries", 3),
        )
        folder = str(config.get("folder") or f"runs/flower/{method}-seed{seed}")
        return Settings(
            Spec(target, method, seed, rounds or default_rounds(target), _arguments(config)),
            Path(folder).absolute(),
            _whole(config, "clients", 0),
            _number(config, "wait-s", 0.0) or None,
            _whole(config, "only-first", 0),
            policy,
            codecs_named(str(config.get("codec-down", "raw"))),
            codecs_named(str(config.get("codec-up", "raw"))),
            str(config.get("device", "cpu")),
        )


def codecs_named(words: str) -> Codecs:
    """"raw", "bf16", "int8", "topk" or "topk:0.01"; or two of them, as in "bf16/int8": of the
    shared parameters and of the experts.

    Raises:
        ValueError: no codec is called so.
    """
    shared, _, experts = words.partition("/")
    return Codecs(_codec(shared), _codec(experts or shared))


def _codec(word: str) -> Codec:
    name, _, share = word.strip().partition(":")
    plain: dict[str, Codec] = {"raw": Raw(), "bf16": BF16(), "int8": Int8(), "topk": TopK()}
    if name == "topk" and share:
        try:
            return TopK(float(share))
        except ValueError as why:
            raise ValueError(f"codec {word!r}: the share must be a number: {why}") from why
    if name not in plain or share:
        raise ValueError(f"a codec is raw, bf16, int8, topk or topk:SHARE, got {word!r}")
    return plain[name]


def _whole(config: Config, key: str, default: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} must be a whole number of 0 or more, got {value!r}")
    return value


def _number(config: Config, key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} must be a number of 0 or more, got {value!r}")
    return float(value)


def _arguments(config: Config) -> dict[str, object]:
    text = str(config.get("arguments") or "{}")
    try:
        found = json.loads(text)
    except ValueError as why:
        raise ValueError(f"arguments must be a JSON object, got {text!r}: {why}") from why
    if not isinstance(found, dict):
        raise ValueError(f"arguments must be a JSON object, got {text!r}")
    return found
