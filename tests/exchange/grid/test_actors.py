"""Everything that needs Ray, which is started once. The rest of the grid is tested without it."""

import importlib
import logging
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedmoe.exchange.grid.apps import open_grid, run_apps
from tests.exchange.grid import apps

ROOT = Path(__file__).parents[3]
NODES = 6

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray-grid")]


@pytest.fixture(scope="module")
def cluster():
    """Ray for all tests of this file; Flower's engine takes what is there."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # of the actors of Flower's engine
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, logging_level=logging.WARNING
        )
        yield ray
        ray.shutdown()


def to_all(content=None):
    return [Message(content or RecordDict(), n, "train") for n in range(2, NODES + 2)]


def test_deaths_of_actors_lose_nothing_and_count_nothing_twice(cluster, tmp_path):
    states = tmp_path / "states"
    with open_grid(
        apps.counter, NODES, run_config={"folder": str(tmp_path)}, actors=2, states=states
    ) as grid:
        rounds = [grid.send_and_receive(to_all())]
        (tmp_path / "once-2").touch()
        rounds.append(grid.send_and_receive(to_all()))
        (tmp_path / "always-3").touch()
        rounds.append(grid.send_and_receive(to_all()))
        (tmp_path / "always-3").unlink()
        rounds.append(grid.send_and_receive(to_all()))
        assert not (tmp_path / "once-2").exists()
        assert len(list(states.rglob("*.context"))) >= NODES
    assert not list(states.iterdir())
    for number, replies in enumerate(rounds, 1):
        assert [r.metadata.src_node_id for r in replies] == list(range(2, NODES + 2))
        good = [r for r in replies if r.has_content()]
        assert {r.content["metrics"]["partition"] for r in good} == (
            {0, 1, 2, 4, 5} if number == 3 else set(range(NODES))
        )
        for reply in good:
            # What a client did before its process died is undone.
            after = number == 4 and reply.content["metrics"]["partition"] == 3
            assert reply.content["metrics"]["seen"] == (3 if after else number)
            assert reply.content["metrics"]["threads"] == 1
    [failed] = [r for r in rounds[2] if r.has_error()]
    assert failed.error.code == 8 and failed.metadata.src_node_id == 5
    last = {r.content["metrics"]["partition"]: r.content["metrics"]["process"] for r in rounds[3]}
    assert sorted(Counter(last.values()).values()) == [3, 3]
    assert last[0] == last[2] == last[4] and last[1] == last[3] == last[5]


def test_what_cannot_be_pickled_is_named_before_anything_starts():
    lock = threading.Lock()
    app = ClientApp()

    @app.train()
    def train(message, context):
        with lock:
            return Message(RecordDict(), reply_to=message)

    with pytest.raises(ValueError, match="client_app must be picklable to go to actors"):
        open_grid(app, 2, actors=1)


FAR = """\
from flwr.app import Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
"""


def test_what_is_pushed_is_worked_on_at_once_and_large_values_travel_once(
    cluster, tmp_path, monkeypatch
):
    (tmp_path / "far_app.py").write_text(FAR)  # only this process has it on its path
    monkeypatch.syspath_prepend(tmp_path)
    app = importlib.import_module("far_app").app

    class Spy:
        count = 0

    with open_grid(app, NODES, actors=1) as grid:
        store = grid._engine._store
        inner, spy = store.put, Spy()

        def put(data):
            spy.count += 1
            return inner(data)

        store.put = put
        large = np.arange(20_000.0)
        content = RecordDict({"arrays": ArrayRecord({"a": Array(large)})})
        first = grid.push_messages(to_all(content))
        # Nobody asks for replies: they are there all the same, some time.
        refs = list(grid._engine._calls)
        assert len(cluster.wait(refs, num_returns=len(refs), timeout=120)[0]) == len(refs)
        content["arrays"]["a"] = Array(large + 1)  # too late for those
        replies = grid.pull_messages(first)
        assert len(replies) == NODES and spy.count == 1
        for reply in replies:
            np.testing.assert_array_equal(reply.content["arrays"]["a"].numpy(), large)
        again = RecordDict({"arrays": ArrayRecord({"a": Array(large)})})  # equal, and another
        assert len(grid.send_and_receive(to_all(again))) == NODES
        assert spy.count == 1
        assert len(grid.send_and_receive(to_all(content))) == NODES
        assert spy.count == 2


def test_flowers_engine_one_process_and_actors_end_with_the_same_bits(cluster):
    from flwr.simulation import run_simulation

    ends = []
    server = apps.server_of(ends, NODES)
    run_apps(server, apps.client, NODES)
    run_apps(server, apps.client, NODES, actors=2)
    # The last of this file, as it stops Ray at its end.
    run_simulation(
        server,
        apps.client,
        num_supernodes=NODES,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2},
        },
    )
    inline, actors, flowers = ends
    assert inline.arrays["w"].numpy().any()
    assert inline.arrays["w"].data == actors.arrays["w"].data == flowers.arrays["w"].data
    assert inline.train_metrics_clientapp == actors.train_metrics_clientapp
    for there in (actors, flowers):
        losses = [m["loss"] for m in there.evaluate_metrics_clientapp.values()]
        ours = [m["loss"] for m in inline.evaluate_metrics_clientapp.values()]
        assert losses == pytest.approx(ours) and ours == sorted(ours, reverse=True)
