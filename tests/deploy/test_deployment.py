"""What a server is asked to do: checked when it is said, the same when it is read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedmoe.deploy.address import Address
from fedmoe.deploy.deployment import Deployment, check_security

PLAIN = Deployment("demo", "fedmoe", 0, 8, 3, "0.0.0.0", 8000, "/keys")


def test_a_deployment_is_read_as_it_was_written(tmp_path):
    wished = replace(PLAIN, deadline_s=60.0, quorum=0.5, codec_up="topk:0.05", keys=None)
    wished.write(tmp_path)
    assert Deployment.read(tmp_path) == wished


def test_what_a_later_version_adds_is_left_aside(tmp_path):
    PLAIN.write(tmp_path)
    path = tmp_path / "server.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "blue"}))
    assert Deployment.read(tmp_path) == PLAIN


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"target": "demo"}', "nonsense"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "server.json").write_text(text)
    with pytest.raises(ValueError, match=r"server\.json does not describe a server's run"):
        Deployment.read(tmp_path)


def test_a_folder_without_a_run_is_told_with_how_to_begin_one(tmp_path):
    with pytest.raises(ValueError, match=r"server\.json is missing; `flower-server --experiment"):
        Deployment.read(tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"clients": 0}, "--clients must be at least 1, got 0"),
        ({"quorum": 0.0}, "--quorum must be above 0 and at most 1, got 0.0"),
        ({"quorum": 1.5}, "--quorum must be above 0 and at most 1, got 1.5"),
        ({"deadline_s": -1.0}, "--deadline-s must be at least 0 seconds, got -1.0"),
        ({"wait_s": -1.0}, "--wait-s must be at least 0 seconds, got -1.0"),
        ({"codec_up": "zip"}, "--codec-up: a codec is raw, bf16, int8, topk or topk:SHARE, got"),
        ({"codec_up": "bf16/topk:x"}, "--codec-up: codec 'topk:x': the share must be a number"),
        ({"codec_down": "topk:0.1"}, "--codec-down cannot be topk:0.1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_option_and_the_value(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(PLAIN, **changes)


def test_the_run_lies_where_fedmoe_run_would_have_it():
    assert PLAIN.run_folder(Path("/srv")) == Path("/srv/fedmoe-seed0")
    assert PLAIN.run_config(Path("/srv"))["folder"] == "/srv/fedmoe-seed0"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_insecure_may_be_on_this_machine(host):
    check_security(Address(host, 8000), True, False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "moe.example"])
def test_insecure_on_a_network_must_be_asked_for_twice(host):
    with pytest.raises(ValueError, match="add --insecure-anywhere"):
        check_security(Address(host, 8000), True, False)
    check_security(Address(host, 8000), True, True)
    check_security(Address(host, 8000), False, False)


def test_the_second_flag_alone_means_nothing():
    with pytest.raises(ValueError, match="give both"):
        check_security(Address("10.0.0.1", 8000), False, True)
