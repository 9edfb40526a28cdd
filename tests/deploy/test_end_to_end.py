"""Real processes on loopback, with TLS and keys: the same result, and nobody else let in."""

from __future__ import annotations

import signal
import urllib.request

import pytest

from fedmoe.deploy.keys import Keys, make_keys
from fedmoe.deploy.processes import daemon, environment, free_port, stop
from tests.deploy.conftest import CLIENTS, ROUNDS, Site, in_process

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deploy")]

# What of a round does not depend on where it ran.
SAME = ("round", "phase", "held", "count", "changes", "accuracy", "global", "loss", "model_hash")


def test_three_clients_with_tls_and_keys_give_the_bits_of_one_process(site: Site, tmp_path):
    (tmp_path / "alone").mkdir()
    alone = in_process(tmp_path / "alone", "fedmoe")
    metrics = free_port()
    server = site.begin("fedmoe", "--metrics-port", str(metrics), "--json")
    clients = [site.client(i) for i in range(CLIENTS)]

    # Who is not to be let in comes while the run is on.
    site.wait(lambda: "listens at" in site.said(), "the server is not ready")
    keys = Keys(site.folder / "keys")
    make_keys(site.folder / "others", ["127.0.0.1"], [0])
    others = Keys(site.folder / "others")
    wrong_ca = site.start(
        "flower-client",
        *("--server", f"127.0.0.1:{site.port}", "--client-id", "0", "--state", "wrong-ca"),
        *("--ca", str(others.ca), "--key", str(keys.client(0))),
    )
    unknown_key = site.start(
        "flower-client",
        *("--server", f"127.0.0.1:{site.port}", "--client-id", "0", "--state", "unknown-key"),
        *("--ca", str(keys.ca), "--key", str(others.client(0)), "--give-up-s", "1"),
    )
    home = site.folder / "no-key" / "flower"
    (home).mkdir(parents=True)
    no_key = daemon(
        "supernode",
        [
            *("--root-certificates", str(keys.ca), "--superlink", f"127.0.0.1:{site.port}"),
            *("--host", "127.0.0.1", "--port", str(free_port())),
        ],
        environment(home),
        home / "log",
    )
    try:
        assert site.ended(wrong_ca) == 1
        assert site.ended(unknown_key) == 1
        site.wait(lambda: no_key.ended is not None, "a SuperNode without a key is let in")
    finally:
        stop(no_key, home)
    said = site.said("flower-client")
    assert "is not the server that" in said  # the wrong authority
    assert "does not let client 0 in" in said and "does not know the public key of" in said
    assert "SuperNode ID" not in no_key.text()

    site.wait(lambda: len(site.rounds("fedmoe")) > 0, "no round is done")
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics") as answer:
        assert "fedmoe_rounds_planned 3.0" in answer.read().decode()
    assert site.ended(server) == 0, site.said()
    rounds = site.rounds("fedmoe")
    assert [{k: r[k] for k in SAME} for r in rounds] == [{k: r[k] for k in SAME} for r in alone]
    assert len(rounds) == ROUNDS + 1
    assert all(not r["failed"] and not r["refused"] for r in rounds)

    # The clients stay for the next run. One that fails is told by its reason and the exit code.
    failing = site.begin("broken", "--json")
    assert site.ended(failing) == 1
    assert "the run failed: ServerApp failed with exception: the aggregate fell over" in site.said()
    for client in clients:
        assert client.poll() is None
        client.send_signal(signal.SIGTERM)
    assert [site.ended(c) for c in clients] == [143] * CLIENTS
    assert site.left() == []
