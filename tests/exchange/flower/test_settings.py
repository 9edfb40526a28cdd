from pathlib import Path

import pytest

from fedmoe.exchange.flower.policy import RoundPolicy
from fedmoe.exchange.flower.settings import Settings, codecs_named
from fedmoe.experiments.run import Spec
from fedmoe.wire.codecs import BF16, Int8, Raw, TopK
from fedmoe.wire.packing import Codecs


def test_a_configuration_that_says_nothing_is_the_demo():
    settings = Settings.of({})
    assert settings.spec.target == "demo" and settings.spec.rounds >= 1
    assert settings.folder == Path("runs/flower/fedmoe-seed0").absolute()
    assert settings.policy == RoundPolicy() and settings.wait_s is None


def test_a_configuration_says_what_a_run_is_to_be():
    config = {
        "experiment": "domains",
        "method": "fedavg",
        "seed": 4,
        "rounds": 9,
        "arguments": '{"train": 50}',
        "folder": "/srv/run",
        "clients": 3,
        "wait-s": 60.5,
        "deadline-s": 30,
        "quorum": 1,
        "enough": 1.0,
        "retries": 0,
        "codec-down": "bf16",
        "codec-up": "raw/topk:0.01",
    }
    assert Settings.of(config) == Settings(
        Spec("domains", "fedavg", 4, 9, {"train": 50}),
        Path("/srv/run"),
        clients=3,
        wait_s=60.5,
        policy=RoundPolicy(30.0, 1.0, 1.0, 0),
        down=Codecs.of(BF16()),
        up=Codecs(Raw(), TopK(0.01)),
    )


@pytest.mark.parametrize(
    "config, words",
    [
        ({"deadline": 3}, "must have no key 'deadline'; there are experiment, method"),
        ({"seed": -1}, "seed must be a whole number of 0 or more, got -1"),
        ({"clients": "3"}, "clients must be a whole number of 0 or more, got '3'"),
        ({"rounds": True}, "rounds must be a whole number of 0 or more, got True"),
        ({"wait-s": "long"}, "wait-s must be a number of 0 or more, got 'long'"),
        ({"quorum": 2.0}, "quorum must be between 0 and 1, got 2.0"),
        ({"arguments": "{"}, "arguments must be a JSON object, got '{'"),
        ({"arguments": "[1]"}, "arguments must be a JSON object, got '.1.'"),
        ({"experiment": "dema"}, "no experiment is called 'dema'; did you mean 'demo'?"),
        ({"codec-up": "gzip"}, "a codec is raw, bf16, int8, topk or topk:SHARE, got 'gzip'"),
        ({"codec-up": "int8:3"}, "a codec is raw, bf16, int8, topk or topk:SHARE, got 'int8:3'"),
        ({"codec-up": "topk:much"}, "codec 'topk:much': the share must be a number"),
        ({"codec-up": "topk:3"}, "codec 'topk:3': the share must be a number: share must be above"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(config, words):
    with pytest.raises(ValueError, match=words):
        Settings.of(config)


def test_shared_parameters_and_experts_may_have_codecs_of_their_own():
    assert codecs_named("bf16 / int8") == Codecs(BF16(), Int8())
    assert codecs_named("topk") == Codecs.of(TopK())
