"""What a client settles before any process starts."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

from fedmoe.deploy.address import Address
from fedmoe.deploy.join import (
    Membership,
    data_variables,
    find_key,
    listens,
    node_config,
    place_of,
    reach,
)
from fedmoe.deploy.keys import Keys, make_keys
from fedmoe.deploy.processes import free_port
from fedmoe.exchange.flower.forward import PATH_LIMIT, Place

SERVER = Address("127.0.0.1", 8000)


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder, ["127.0.0.1"], [0])
    return Keys(folder)


def test_a_key_is_found_where_keys_are_made_and_where_it_was_brought(keys, tmp_path):
    assert find_key(keys.folder, 0) == keys.client(0)
    (tmp_path / "client-0").write_text("")
    assert find_key(tmp_path, 0) == tmp_path / "client-0"
    assert find_key(tmp_path, 1) == tmp_path / "clients" / "client-1"


def test_a_node_is_told_what_flower_hands_on_to_the_worker_s_messages():
    place = Place(3, Path("/a b/worker"), Path("/run/x/socket"), 64, "cpu", "lab:tiny")
    found = Place.of(parse_config_args([node_config(place)]))
    assert (found.client, found.socket, found.tended) == (3, place.socket, True)


def test_a_worker_listens_in_a_folder_of_its_user_alone(tmp_path):
    m = Membership(SERVER, 2, tmp_path)
    place = place_of(m, tmp_path)
    assert place.socket == tmp_path / "worker" / "socket"
    assert place.socket.parent.stat().st_mode & 0o077 == 0


def test_a_deep_folder_gets_a_short_socket(tmp_path):
    deep = tmp_path / ("x" * 100)
    first, again = (place_of(Membership(SERVER, 2, deep), deep) for _ in range(2))
    assert first == again and len(str(first.socket)) <= PATH_LIMIT
    assert first.state == deep / "worker"
    assert first.socket.parent.stat().st_mode & 0o077 == 0
    shutil.rmtree(first.socket.parent)


def test_data_are_found_in_a_folder_and_in_its_folders(tmp_path):
    assert data_variables(None) == {}
    assert data_variables(tmp_path) == {"FEDMOE_DATA": str(tmp_path)}
    (tmp_path / "fashion-mnist").mkdir()
    assert data_variables(tmp_path)["FEDMOE_FASHION_MNIST"] == str(tmp_path / "fashion-mnist")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"client": -1}, "--client-id must be a number from 0, got -1"),
        ({"cache_mb": -1}, "--cache-mb must be at least 0 MiB, got -1"),
        ({"data": Path("/nowhere")}, "--data must be a folder, got /nowhere"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        Membership(**{"server": SERVER, "client": 0, "state": tmp_path, **changes})


def test_nobody_listens_at_a_socket_that_is_not_there(tmp_path):
    assert not listens(tmp_path / "socket")
    (tmp_path / "socket").write_text("")
    assert not listens(tmp_path / "socket")


def answer_tls(keys: Keys) -> Address:
    """A server that shakes hands twice."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys.server, keys.server_key)
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with server:
            for _ in range(2):
                plain, _ = server.accept()
                try:
                    context.wrap_socket(plain, server_side=True).close()
                except OSError:
                    plain.close()

    threading.Thread(target=serve, daemon=True).start()
    return Address("127.0.0.1", server.getsockname()[1])


def test_a_server_is_known_by_its_authority(keys, tmp_path):
    make_keys(tmp_path, ["127.0.0.1"])
    address = answer_tls(keys)
    reach(address, keys.ca)
    with pytest.raises(ssl.SSLCertVerificationError):
        reach(address, Keys(tmp_path).ca)


def test_a_server_that_is_away_is_no_false_one(keys):
    with pytest.raises(ConnectionRefusedError):
        reach(Address("127.0.0.1", free_port()), keys.ca)


