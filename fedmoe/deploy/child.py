"""Run one of Flower's daemons as a child that does not outlive its parent.

    python -m fedmoe.deploy.child PARENT superlink|supernode ARGUMENTS

PARENT is the number of the process that watches over it; the arguments are the daemon's own. A
SuperLink is put behind the door of door.py.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any

PR_SET_PDEATHSIG = 1
POLL_S = 0.5


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
        from flwr.supernode.cli import flower_supernode

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


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
