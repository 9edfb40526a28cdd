"""Run one of Flower's daemons as a child that does not outlive its parent.

    python -m fedmoe.deploy.child PARENT superlink|supernode ARGUMENTS

PARENT is the number of the process that watches over it; the arguments are the daemon's own. A
SuperLink is put behind the door of door.py. A SuperNode whose last life ended without a farewell
takes its leave first: for a minute Flower would take it for alive, and not let it in again.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
LAST = "FEDMOE_LAST_NODE"  # the node that this SuperNode was before, in its environment
POLL_S = 0.5
MOST_DELAY_S = 5  # between two tries to reach a server that does not answer


def main() -> None:
    parent, name = int(sys.argv[1]), sys.argv[2]
    end_with(parent)
    sys.argv = [f"flower-{name}", *sys.argv[3:]]
    if name == "superlink":
        import uvicorn
        from flwr.superlink.cli import flower_superlink

        from fedmoe.deploy.door import Door

        serve = uvicorn.run

        def serve_behind_door(app: Any, **settings: Any) -> None:
            # A request a poll and node would fill the log; a header must not open the door.
            settings |= {"access_log": False, "proxy_headers": False}
            serve(Door(app), **settings)

        uvicorn.run = serve_behind_door
        flower_superlink()
    elif name == "supernode":
        from flwr.supercore.retry import http_retry
        from flwr.supernode.cli import flower_supernode

        # It would be 20, and a server that was away for a moment without clients for as long.
        http_retry.MAX_RETRY_DELAY = MOST_DELAY_S  # type: ignore[attr-defined]
        if last := os.environ.get(LAST):
            take_leave(int(last), sys.argv[1:])
        flower_supernode()
    else:
        raise SystemExit(f"the daemon must be superlink or supernode, got {name!r}")


def end_with(parent: int) -> None:
    """Get a SIGTERM when the parent is gone, however it ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it went before that was said
            raise SystemExit(128 + signal.SIGTERM)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def take_leave(node: int, arguments: list[str]) -> None:
    """Tell the SuperLink that a node is gone; it hears that only from who has the node's key."""
    import httpx
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    parser = ArgumentParser()
    for name in ("--superlink", "--root-certificates", "--auth-supernode-private-key"):
        parser.add_argument(name)
    known, _ = parser.parse_known_args(arguments)
    if known.auth_supernode_private_key is None or known.root_certificates is None:
        return  # without a key of its own it is another node each time
    key = load_ssh_private_key(Path(known.auth_supernode_private_key).read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    client = FleetHttpClient.from_server_address(
        known.superlink,
        False,
        Path(known.root_certificates).read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    )
    try:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    except httpx.HTTPError as why:  # it was gone, or is unknown to a new server
        print(f"node {node} took no leave: {why}", flush=True)
    finally:
        client.close()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
