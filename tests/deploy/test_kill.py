"""Whatever is killed, whenever that is, comes back, and the result has the same bits."""

from __future__ import annotations

import pytest

from tests.deploy.conftest import CLIENTS, Site, in_process
from tests.deploy.test_end_to_end import SAME

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deploy")]

METHOD = "private-router"  # whose clients keep something, too


def test_a_run_whose_server_and_clients_are_killed_ends_with_the_same_bits(site: Site, tmp_path):
    (tmp_path / "alone").mkdir()
    alone = in_process(tmp_path / "alone", METHOD)
    clients = [site.client(i, hold="work:1:1" if i == 1 else "") for i in range(CLIENTS)]
    server = site.begin(METHOD)
    site.kill_held(clients[1], "work:1:1")  # a client whose work of round 1 is done, not sent
    server.kill()  # a server that waits for that answer
    server.wait()
    clients[1] = site.client(1)
    server = site.resume(hold="log:1")
    site.kill_held(server, "log:1")  # when a round is logged, and its checkpoint not yet there
    clients[2].kill()
    clients[2].wait()
    clients[2] = site.client(2, hold="upload")
    server = site.resume(hold="checkpoint:3")
    site.kill_held(clients[2], "upload")  # a client in the middle of its answer
    clients[2] = site.client(2)
    site.kill_held(server, "checkpoint:3")  # in the middle of a checkpoint
    server = site.resume()
    assert site.ended(server) == 0, site.said()

    rounds = site.rounds(METHOD)
    assert [{k: r[k] for k in SAME} for r in rounds] == [{k: r[k] for k in SAME} for r in alone]
    assert all(not r["failed"] and not r["refused"] for r in rounds)
