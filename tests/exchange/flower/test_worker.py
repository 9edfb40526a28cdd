import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from fedmoe.exchange.flower import forward as forwarding
from fedmoe.exchange.flower import worker
from fedmoe.exchange.flower.client import Client, answer
from fedmoe.exchange.flower.forward import (
    Place,
    WorkerError,
    forward,
    start_worker,
    stop_worker,
    worker_command,
)
from fedmoe.exchange.flower.post import BROKEN, FAILED, HELLO, PARCEL, Post
from fedmoe.exchange.flower.worker import birth, parsed, serve, watch
from fedmoe.wire.parcel import pack_query
from tests.exchange.flower.fake import spec_of, terms_of

PATIENCE_S = 240.0  # for processes on a busy machine


def until(met, patience_s=PATIENCE_S):
    deadline = time.monotonic() + patience_s
    while not met():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "POLL_S", 0.02)
    return Place(1, tmp_path, tmp_path / "w" / "socket", tended=True)


@contextmanager
def serving(place, answer=lambda post: Post(PARCEL, post.text), **options):
    """A worker in a thread."""
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(place.socket, answer),
                              kwargs={"stop": stop, **options})
    thread.start()
    try:
        until(lambda: place.socket.exists() or not thread.is_alive())
        yield thread
    finally:
        stop.set()
        thread.join()


def raw(place, data):
    """What the worker does with these bytes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.fspath(place.socket))
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


# The socket


def test_a_post_is_handed_over_and_its_answer_brought_back(place):
    with serving(place):
        for text in ("one", "two"):
            assert forward(Post(HELLO, text), place).text == text


@pytest.mark.parametrize("data", [b"", b"x", b"GET / HTTP/1.1\r\n\r\n", b"fedmoe\x00\x01" * 9])
def test_a_worker_outlives_what_is_no_request(place, data):
    with serving(place):
        back = raw(place, data)
        assert back == b"" or b"PostError" in back
        assert forward(Post(HELLO, "still here"), place).text == "still here"


def test_a_worker_outlives_who_does_not_wait_for_the_answer(place):
    begun, go_on = threading.Event(), threading.Event()

    def slow(post):
        if post.text == "slow":
            begun.set()
            go_on.wait(PATIENCE_S)
        return Post(PARCEL, post.text, b"x" * 2**22)

    with serving(place, slow):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.fspath(place.socket))
            forwarding.send(connection, Post(HELLO, "slow"))
            begun.wait(PATIENCE_S)
        go_on.set()
        assert forward(Post(HELLO, "next"), place).text == "next"


def test_nobody_else_may_open_the_sockets_folder(place):
    with serving(place):
        assert place.socket.parent.stat().st_mode & 0o777 == 0o700
        assert place.socket.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o702])
def test_a_folder_that_others_may_open_is_refused_by_both_sides(place, mode):
    place.socket.parent.mkdir()
    place.socket.parent.chmod(mode)
    words = rf"must be open to this user alone \(chmod 700\), and has mode {mode:o}"
    with pytest.raises(WorkerError, match=words):
        serve(place.socket, lambda post: post, stop=threading.Event())
    with pytest.raises(WorkerError, match=words):
        forward(Post(HELLO), place)


def test_what_is_no_folder_is_refused(place):
    place.socket.parent.symlink_to("/tmp")
    with pytest.raises(WorkerError, match="must be a folder of this user's own"):
        forward(Post(HELLO), place)


def test_a_request_of_another_user_is_refused(place, monkeypatch):
    with serving(place):
        monkeypatch.setattr(worker.os, "getuid", lambda: 4242)
        monkeypatch.setattr(forwarding, "check_folder", lambda folder: None)
        assert "has no business here" in forward(Post(HELLO), place).text


def test_there_is_one_worker_at_a_socket(place):
    with serving(place), pytest.raises(BlockingIOError):
        serve(place.socket, lambda post: post, stop=threading.Event())


def test_a_socket_that_a_dead_worker_left_behind_is_no_hindrance(place):
    place.socket.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(os.fspath(place.socket))
    with serving(place):
        until(lambda: forwarding._connect(place.socket) is not None)
        assert forward(Post(HELLO, "new"), place).text == "new"


def test_a_request_that_is_refused_before_its_end_is_told_why(place):
    with serving(place, limit=10):
        answer = forward(Post(HELLO, "", b"x" * 2**24), place)
        assert answer.kind == FAILED
        assert answer.text == "PostError: a frame's body must be at most 10 bytes, got 16777216"


def test_a_worker_that_nobody_asks_ends(place):
    with serving(place, idle_s=0.05) as thread:
        thread.join(PATIENCE_S)
        assert not thread.is_alive() and not place.socket.exists()


def test_a_worker_that_somebody_else_tends_is_waited_for_but_not_started(place):
    with pytest.raises(WorkerError, match="no worker of client 1 listens at"):
        forward(Post(HELLO), place, patience_s=0.1)
    assert not (place.state / "worker.log").exists()


# Places


def test_a_node_is_placed_by_its_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMOE_STATE", "/srv/fedmoe")
    state = forwarding.Path("/srv/fedmoe/client-000003")
    assert Place.of({"client-id": 3}) == Place(3, state, state / "worker" / "socket")
    tended = Place.of({"client-id": 3, "socket": "/run/f/s"})
    assert tended == Place(3, state, forwarding.Path("/run/f/s"), tended=True)
    assert Place.of({"client-id": 3, "socket": "/run/f/s", "state": "/x", "cache-mb": 0}) == Place(
        3, forwarding.Path("/x"), forwarding.Path("/run/f/s"), 0
    )


@pytest.mark.parametrize(
    "config, words",
    [
        ({}, "must give its client's number, such as client-id=3, got None"),
        ({"client-id": "3"}, "must give its client's number, such as client-id=3, got '3'"),
        ({"client-id": -1}, "must give its client's number, such as client-id=3, got -1"),
        ({"client-id": True}, "must give its client's number"),
        ({"client-id": 1, "cache-mb": -1}, "cache-mb must be 0 or more, got -1"),
        ({"client-id": 1, "socket": "/" + "x" * 120}, "socket must be a path of at most 100 bytes"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused_by_name(config, words):
    with pytest.raises(ValueError, match=words):
        Place.of(config)


def test_a_workers_command_says_its_place(tmp_path):
    place = Place(4, tmp_path, tmp_path / "s", 12, "cuda", "demo")
    options = parsed([*worker_command(place, parent=77, idle_s=5.0, threads=2)][3:])
    assert vars(options) == {
        "socket": place.socket,
        "client": 4,
        "state": tmp_path,
        "cache_mb": 12,
        "device": "cuda",
        "only": "demo",
        "threads": 2,
        "parent": 77,
        "idle_s": 5.0,
    }


def test_a_process_is_told_from_a_later_one_of_its_number():
    assert birth(os.getpid()) == birth(os.getpid()) is not None
    child = subprocess.Popen([sys.executable, "-c", ""])
    until(lambda: birth(child.pid) is None)  # also while nobody has asked how it ended
    child.wait()
    assert birth(child.pid) is None


def test_who_watches_hears_of_the_end(monkeypatch):
    monkeypatch.setattr(worker, "POLL_S", 0.01)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ended = threading.Event()
    watch(child.pid, ended.set)
    assert not ended.wait(0.05)
    child.communicate(b"\n")
    assert ended.wait(PATIENCE_S)


# Processes


@pytest.mark.slow
def test_a_worker_is_started_when_it_is_needed_and_anew_after_it_died(tmp_path, monkeypatch):
    place = Place(1, tmp_path, tmp_path / "w" / "s")
    terms = terms_of(spec_of("fedavg"))
    ask = Post(HELLO, terms.text, pack_query(run="abc.1").manifest)
    started = []

    def start(*arguments, **options):
        started.append(start_worker(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(forwarding, "start_worker", start)
    try:
        wanted = answer(ask, Client.at(place))
        for _ in range(2):
            assert forward(ask, place, patience_s=PATIENCE_S).manifest == wanted.manifest
        [process] = started
        assert os.getsid(process.pid) == process.pid  # in a session of its own

        # It dies in the middle of a request, and says so; the next request starts another.
        process.send_signal(signal.SIGSTOP)
        answers = []
        asking = threading.Thread(target=lambda: answers.append(forward(ask, place)))
        asking.start()
        until(lambda: forwarding._connect(place.socket) is not None)
        time.sleep(0.2)
        process.kill()
        asking.join(PATIENCE_S)
        assert answers[0].kind == BROKEN and "worker of client 1" in answers[0].text
        process.wait()
        assert forward(ask, place, patience_s=PATIENCE_S).manifest == wanted.manifest
        assert len(started) == 2
    finally:
        for process in started:
            stop_worker(process)
    assert started[1].returncode == 0


@pytest.mark.slow
def test_a_worker_ends_with_the_process_that_it_belongs_to(tmp_path):
    place = Place(1, tmp_path, tmp_path / "w" / "s", tended=True)
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = start_worker(place, parent=parent.pid)
    try:
        assert forward(Post(PARCEL), place, patience_s=PATIENCE_S).kind == FAILED
        parent.kill()
        parent.wait()
        process.wait(PATIENCE_S)
    finally:
        parent.kill()
        stop_worker(process)


@pytest.mark.slow
def test_a_worker_that_cannot_start_says_why(tmp_path):
    place = replace(Place(1, tmp_path, tmp_path / "w" / "s"), device="no such device")
    place.socket.parent.mkdir()
    place.socket.parent.chmod(0o700)
    place.socket.mkdir()  # so that it cannot bind
    with pytest.raises(WorkerError, match="(?s)does not listen.*worker.log ends:"):
        forward(Post(HELLO), place, patience_s=PATIENCE_S)
