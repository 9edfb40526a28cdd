"""What a SuperLink's port answers, and to whom."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fedmoe.deploy.door import PATH, Door, from_this_machine

HERE, THERE = ("127.0.0.1", 5000), ("10.0.0.9", 5000)
LISTENS = ("10.0.0.1", 8000)


def status(path: str, client: tuple[str, int] | None, kind: str = "http") -> int | str:
    """What an answer's status is; "app" where the question was let through."""
    sent: list[Any] = []

    async def app(scope, receive, send):
        sent.append("app")

    async def send(message):
        sent.append(message.get("status", message["type"]))

    async def receive():
        raise AssertionError("nothing is read before the door")

    scope = {"type": kind, "path": path, "client": client, "server": LISTENS}
    asyncio.run(Door(app)(scope, receive, send))
    return sent[0]


@pytest.mark.parametrize("client", [HERE, THERE])
def test_fleet_is_open_to_all(client):
    assert status("/v1/fleet/pull-messages", client) == "app"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
        "/v1/fleet",
        "/v1/fleetish/",
        "//v1/fleet/pull-messages",
        "/V1/FLEET/pull-messages",
        "/",
    ],
)
def test_everything_else_is_there_for_this_machine_alone(path):
    assert status(path, HERE) == "app"
    assert status(path, THERE) == 404
    assert status(path, None) == 404


def test_a_path_cannot_climb_out_of_what_is_open():
    # The app below matches whole paths, so this is none of its own.
    assert status("/v1/fleet/../control/start-run", THERE) == "app"


def test_the_door_says_that_it_is_there():
    assert status(PATH, THERE) == 204


def test_strangers_get_no_other_protocol_either():
    assert status("/v1/control/stream", THERE, "websocket") == "websocket.close"
    assert status("", None, "lifespan") == "app"


@pytest.mark.parametrize(
    "client, here",
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.1", True),  # the address that it listens on
        ("10.0.0.2", False),
        ("::ffff:10.0.0.2", False),
        ("localhost", False),  # addresses alone tell
        ("", False),
    ],
)
def test_this_machine_is_loopback_or_the_address_itself(client, here):
    assert from_this_machine({"client": (client, 1), "server": LISTENS}) is here
