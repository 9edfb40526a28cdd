"""What a server says to its own SuperLink: which keys it knows, and which run it has.

As Flower's command line does it (`flwr supernode register`, `flwr run`, `flwr list`), without a
process for each word.
"""

import hashlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedmoe.deploy.address import Address
from fedmoe.deploy.door import PATH
from fedmoe.deploy.keys import load_public_key

GONE = "unregistered"
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class RunState:
    """How Flower says that a run stands."""

    status: str  # pending, starting, running, finished
    end: str = ""  # completed, failed, stopped; once it is finished
    details: str = ""


class Control:
    """Speaks with the SuperLink at an address of this machine; to be closed."""

    def __init__(self, address: Address, ca: Path | None) -> None:
        """`ca` is the authority that signed its certificate; None: it speaks without TLS."""
        self.address, self.ca = address, ca
        self.client = ControlHttpClient.from_server_address(
            server_address=str(address),
            insecure=ca is None,
            root_certificates=None if ca is None else ca.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def __enter__(self) -> "Control":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        why: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()

    def is_up(self) -> bool:
        """Whether a SuperLink answers, behind its door."""
        scheme = "http" if self.ca is None else "https"
        verify = True if self.ca is None else ssl.create_default_context(cafile=str(self.ca))
        try:
            answer = httpx.get(
                f"{scheme}://{self.address}{PATH}", verify=verify, timeout=TIMEOUT_S
            )
        except httpx.TransportError:
            return False
        return answer.status_code == httpx.codes.NO_CONTENT

    def register(self, keys: Mapping[int, Path]) -> dict[int, int]:
        """Make the known keys these, and only these; returns the client behind each node.

        A key that the SuperLink knew, and that is not among them, is no longer let in.
        """
        wanted = {
            public_key_to_bytes(load_public_key(path)): number for number, path in keys.items()
        }
        if len(wanted) < len(keys):
            raise ValueError("two clients have the same public key: every client needs its own")
        nodes: dict[int, int] = {}
        for node in self.client.ListNodes(ListNodesRequest()).nodes_info:
            if node.status == GONE:
                continue
            if node.public_key in wanted:
                nodes[node.node_id] = wanted.pop(node.public_key)
            else:
                self.client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
        for key, number in wanted.items():
            request = RegisterNodeRequest(public_key=key, name=f"client-{number}")
            nodes[self.client.RegisterNode(request).node_id] = number
        return nodes

    def online(self) -> int:
        """How many nodes are there now."""
        nodes = self.client.ListNodes(ListNodesRequest()).nodes_info
        return sum(node.status == "online" for node in nodes)

    def submit(self, bundle: Path) -> int:
        """Start a run of the app in a folder; returns its number."""
        content = build_fab_from_disk(bundle)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        answer = self.client.StartRun(StartRunRequest(fab=fab_to_proto(fab)))
        if not answer.HasField("run_id"):
            raise RuntimeError(f"the SuperLink did not start the run: {answer.note or 'no reason'}")
        return int(answer.run_id)

    def state(self, run: int) -> RunState:
        """How a run stands."""
        found = self.client.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status
        return RunState(found.status, found.sub_status, found.details)

    def stop_all(self) -> None:
        """Stop every run that has not ended: what a killed server left."""
        for number, run in self.client.ListRuns(ListRunsRequest()).run_dict.items():
            if run.status.status != "finished":
                self.client.StopRun(StopRunRequest(run_id=number))
