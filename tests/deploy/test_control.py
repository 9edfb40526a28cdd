"""What a SuperLink is told of keys, by one that only takes notes."""

from __future__ import annotations

import pytest
from flwr.proto.control_pb2 import (
    ListNodesResponse,
    RegisterNodeResponse,
    UnregisterNodeResponse,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedmoe.deploy.address import Address
from fedmoe.deploy.control import Control
from fedmoe.deploy.keys import Keys, load_public_key, make_keys
from fedmoe.deploy.processes import free_port


class Notes:
    """Keeps nodes as a SuperLink does."""

    def __init__(self) -> None:
        self.nodes: list[NodeInfo] = []

    def ListNodes(self, request):
        return ListNodesResponse(nodes_info=self.nodes)

    def RegisterNode(self, request):
        number = 100 + len(self.nodes)
        node = NodeInfo(
            node_id=number, public_key=request.public_key, name=request.name, status="registered"
        )
        self.nodes.append(node)
        return RegisterNodeResponse(node_id=number)

    def UnregisterNode(self, request):
        for node in self.nodes:
            if node.node_id == request.node_id:
                node.status = "unregistered"
        return UnregisterNodeResponse()

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder, clients=range(3))
    return Keys(folder)


@pytest.fixture
def control():
    with Control(Address("127.0.0.1", free_port()), None) as made:
        made.client.close()
        made.client = Notes()
        yield made


def known(control: Control) -> dict[str, bytes]:
    return {n.name: n.public_key for n in control.client.nodes if n.status != "unregistered"}


def test_every_key_is_registered_once_under_its_client_s_name(control, keys):
    files = keys.public_keys()
    first = control.register(files)
    assert control.register(files) == first == {100: 0, 101: 1, 102: 2}
    wanted = {f"client-{i}": public_key_to_bytes(load_public_key(p)) for i, p in files.items()}
    assert known(control) == wanted


def test_a_key_that_was_taken_away_is_let_in_no_longer_and_may_come_back(control, keys):
    files = keys.public_keys()
    control.register(files)
    assert control.register({i: files[i] for i in (0, 2)}) == {100: 0, 102: 2}
    assert set(known(control)) == {"client-0", "client-2"}
    assert control.register(files) == {100: 0, 102: 2, 103: 1}


def test_two_clients_cannot_share_a_key(control, keys):
    files = keys.public_keys()
    with pytest.raises(ValueError, match="every client needs its own"):
        control.register({0: files[0], 1: files[0]})


def test_a_superlink_that_is_not_there_is_not_up(control):
    assert not control.is_up()
