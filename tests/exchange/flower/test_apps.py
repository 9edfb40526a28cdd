import ast
import json
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import ServerApp

import client.app
import server.app
from fedmoe.exchange.flower import client_app, server_app, worker
from fedmoe.exchange.flower.client import Client, answer
from fedmoe.exchange.flower.post import PARCEL, WORK, Post
from fedmoe.exchange.flower.records import content_of, post_of
from fedmoe.exchange.flower.roster import GatherError
from fedmoe.exchange.flower.server_app import lead
from fedmoe.exchange.flower.settings import Settings
from fedmoe.experiments.run import Spec, run_experiment
from fedmoe.experiments.table import make_experiment
from fedmoe.report.log import read_run
from tests.exchange.flower.fake import FakeGrid, World
from tests.exchange.flower.runs import TARGET
from tests.exchange.flower.test_worker import serving

ROOT = Path(__file__).parents[3]


def settings_of(folder, method="fedavg", **changes):
    config = {"experiment": TARGET, "method": method, "rounds": 2, "folder": str(folder)}
    return Settings.of(config | changes)


def in_process(folder, method="fedavg"):
    return run_experiment(make_experiment(Spec(TARGET, method, 0, 2)), folder)


# The apps of a checkout


@pytest.mark.parametrize("name", ["server", "client"])
def test_the_apps_of_a_checkout_hold_no_logic(name):
    tree = ast.parse((ROOT / name / "app.py").read_text())
    kinds = [type(node) for node in tree.body]
    assert kinds == [ast.Expr, ast.ImportFrom, ast.Assign]


def test_the_apps_of_a_checkout_are_fedmoes():
    assert server.app.app is server_app.app
    assert client.app.app is client_app.app


# The server's app


def test_clients_who_never_train_are_served_at_the_end_as_in_process(tmp_path):
    world = World(tmp_path, "guests")
    lead(world.grid, 1, settings_of(tmp_path / "run", "guests"))
    in_process(tmp_path / "here", "guests")
    there, here = (read_run(tmp_path / x).rounds[-1].unseen for x in ("run", "here"))
    assert there.keys() == {4, 5}
    assert {c: m["served_test"] for c, m in there.items()} == {
        c: m["served_test"] for c, m in here.items()
    }


@pytest.mark.parametrize("method", ["fedavg", "fedper"])
def test_the_server_leads_a_run_to_its_end(tmp_path, method):
    world = World(tmp_path, method)
    folder = tmp_path / "run"
    digest = lead(world.grid, 1, settings_of(folder, method))
    assert digest == in_process(tmp_path / "here", method)
    assert Spec.read(folder) == Spec(TARGET, method, 0, 2)
    log = read_run(folder)
    assert [r.phase for r in log.rounds] == ["train", "train", "final"]
    lines = (folder / "flower" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert sum(e["kind"] == "hello" for e in events) == 4
    for record in log.rounds:
        for kind, wanted in (("sent", record.bytes_down), ("replied", record.bytes_up)):
            sizes = [e["nbytes"] for e in events
                     if e["kind"] == kind and e["round"] == record.round]
            assert sum(sizes) == wanted > 0


def test_messages_are_coded_as_the_experiment_says_unless_the_operator_says_otherwise(tmp_path):
    plain, coded = in_process(tmp_path / "plain", "wide"), in_process(tmp_path / "here", "coded")
    assert plain != coded
    there = lead(World(tmp_path / "1", "coded").grid, 1, settings_of(tmp_path / "run", "coded"))
    assert there == coded
    other = settings_of(tmp_path / "other", "coded", **{"codec-up": "topk"})
    assert lead(World(tmp_path / "2", "coded").grid, 1, other) not in (plain, coded)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("method", ["fedavg", "fedper", "fedmoe"])
@pytest.mark.parametrize("kind, count", [("sent", 2), ("replied", 1), ("replied", 4)])
def test_a_server_that_was_killed_goes_on_with_the_same_bits(tmp_path, method, kind, count):
    world = World(tmp_path, method)
    left = [count]

    def kill(event):
        if event.kind == kind and event.round == 1:
            left[0] -= 1
            if not left[0]:
                raise KilledError

    with pytest.raises(KilledError):
        lead(world.grid, 1, settings_of(tmp_path / "run", method), kill)
    digest = lead(world.grid, 2, settings_of(tmp_path / "run", method))
    assert digest == in_process(tmp_path / "here", method)
    assert [r.round for r in read_run(tmp_path / "run").rounds] == [0, 1, 2]


def test_a_run_that_is_led_again_has_the_same_key_and_another_run(tmp_path):
    world = World(tmp_path)
    for number in (1, 2):
        lead(world.grid, number, settings_of(tmp_path / "run"))
    terms = [json.loads(post_of(m.content).text) for m in (world.grid.sent[0], world.grid.sent[-1])]
    assert terms[0]["key"] == terms[1]["key"]
    assert [t["run"] for t in terms] == [f"{terms[0]['key']}.{n}" for n in (1, 2)]


def test_a_run_to_which_too_few_come_fails(tmp_path):
    world = World(tmp_path)
    del world.grid.nodes[100]
    with pytest.raises(GatherError, match="4 clients were to come within 0.2 s, and 3 did"):
        lead(world.grid, 1, settings_of(tmp_path / "run", **{"wait-s": 0.2}))


def test_the_server_app_reads_the_run_configuration(tmp_path):
    world = World(tmp_path)
    config = {"experiment": TARGET, "method": "fedavg", "rounds": 2, "folder": str(tmp_path / "r")}
    context = Context(5, 1, {}, RecordDict(), config)
    server_app.app(world.grid, context)
    assert len(read_run(tmp_path / "r").rounds) == 3


# The client's app


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(worker, "POLL_S", 0.02)


def message_of(post, kind):
    message = Message(content_of(post), dst_node_id=7, message_type=kind)
    message.metadata.__dict__["_message_id"] = "m0"
    return message


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "query.hello"])
def test_the_client_app_hands_every_kind_of_message_to_the_worker(tmp_path, quick, kind):
    FakeGrid({})
    got = []

    def take(post):
        got.append(post)
        return Post(PARCEL, "well")

    at = tmp_path / "w" / "socket"
    config = {"client-id": 3, "socket": str(at)}
    post = Post(WORK, "terms", b"manifest", {"shared": {"w": b"12"}})
    with serving(client_app.Place.of(config), take):
        context = Context(5, 1, config, RecordDict(), {})
        reply = client_app.app(message_of(post, kind), context)
    assert vars(got[0]) == vars(post)
    assert post_of(reply.content).text == "well"


def test_in_a_simulation_the_work_is_done_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMOE_STATE", str(tmp_path))
    world = World(tmp_path)
    context = Context(5, 1, {"partition-id": 2, "num-partitions": 4}, RecordDict(), {})
    query = post_of(_query(world).content)
    reply = client_app.app(message_of(query, "query.hello"), context)
    wanted = answer(query, Client(2, tmp_path / "simulated" / "client-000002", cache_bytes=0))
    assert vars(post_of(reply.content)) == vars(wanted) and wanted.kind == PARCEL


def _query(world):
    world.roster.look()
    return world.grid.sent[0]


@pytest.mark.slow
def test_flowers_simulation_gives_the_same_bits(tmp_path, monkeypatch):
    from flwr.simulation import run_simulation

    monkeypatch.setenv("FEDMOE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of Ray's actors, for the experiment's module
    settings = settings_of(tmp_path / "run", "fedper", **{"wait-s": 240})
    app, digests = ServerApp(), []

    @app.main()
    def main(grid, context):
        digests.append(lead(grid, context.run_id, settings))

    run_simulation(
        app,
        client.app.app,
        num_supernodes=4,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2},
        },
    )
    assert digests == [in_process(tmp_path / "here", "fedper")]
