"""What the port of a SuperLink answers to other machines: what its clients need, and no more.

Flower serves three interfaces on one port: Fleet for SuperNodes, who must prove who they are;
Control, which starts runs and registers keys; and Runtime, which hands out the work of the server's
app. The latter two ask nobody who they are, so whoever reaches the port could run code on the
server and on every client. Behind this door they answer the server's own machine alone.
"""

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/v1/fleet/",)  # to everybody; Flower asks for a SuperNode's key there
PATH = "/fedmoe/door"  # answers 204, to anybody: a SuperLink without a door does not


class Door:
    """An ASGI app before another: strangers get 404 where only this machine may ask.

    Not 403, which a SuperNode takes for a run that has ended.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope.get("path") == PATH:
            await _answer(scope, send, 204)
        elif str(scope.get("path", "")).startswith(OPEN) or from_this_machine(scope):
            await self.app(scope, receive, send)
        else:
            await _answer(scope, send, 404)


def from_this_machine(scope: Scope) -> bool:
    """Whether a connection comes over loopback, or from the very address that it goes to."""
    client, server = scope.get("client"), scope.get("server")
    if not client:
        return False
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return bool((mapped or address).is_loopback or (server and client[0] == server[0]))


async def _answer(scope: Scope, send: Send, status: int) -> None:
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})
