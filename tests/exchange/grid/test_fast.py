"""The grid with nodes in this process: what Flower promises to apps, and a little more."""

import random
import sys
import time

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.serverapp import ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmoe.exchange.flower.server_app import lead
from fedmoe.exchange.flower.settings import Settings
from fedmoe.exchange.grid import fast
from fedmoe.exchange.grid.apps import open_grid, run_apps
from fedmoe.experiments.run import Spec, run_experiment
from fedmoe.experiments.table import make_experiment
from tests.exchange.flower.runs import TARGET
from tests.exchange.grid import apps


@pytest.fixture
def later(monkeypatch):
    """Makes it 100 seconds later than it is."""
    now = time.time
    return lambda: monkeypatch.setattr(time, "time", lambda: now() + 100)


def app_of(work, *, mods=None):
    app = ClientApp(mods=mods)
    app.train()(work)
    return app


def echo(message, context):
    return Message(message.content, reply_to=message)


def numbers(**values):
    return RecordDict({"m": MetricRecord(values)})


def ask(node=2, content=None, kind="train", **options):
    return Message(content or RecordDict(), node, kind, **options)


# Nodes


def test_nodes_are_numbered_from_two_and_know_their_partition():
    seen = []

    def note(message, context):
        seen.append((context.node_id, dict(context.node_config), dict(context.run_config)))
        return echo(message, context)

    with open_grid(
        app_of(note), 3, run_config={"lr": 0.5}, node_config=lambda p: {"role": f"r{p}"}
    ) as grid:
        assert list(grid.get_node_ids()) == [2, 3, 4]
        assert [n.node_id for n in grid.get_nodes()] == [2, 3, 4]
        assert {n.status for n in grid.get_nodes()} == {"online"}
        grid.send_and_receive([ask(n) for n in (4, 2, 3)])
    assert sorted(seen) == [
        (2 + p, {"partition-id": p, "num-partitions": 3, "role": f"r{p}"}, {"lr": 0.5})
        for p in range(3)
    ]


def test_a_node_finds_what_it_kept_and_no_other_does():
    def count(message, context):
        before = context.state["n"]["n"] if "n" in context.state else 0
        context.state["n"] = MetricRecord({"n": before + 1})
        return Message(RecordDict({"n": context.state["n"]}), reply_to=message)

    with open_grid(app_of(count), 2) as grid:
        counts = [
            [r.content["n"]["n"] for r in grid.send_and_receive([ask(n) for n in nodes])]
            for nodes in ([2, 3], [2], [2, 3], [3, 3])
        ]
    assert counts == [[1, 1], [2], [3, 2], [3, 4]]


def test_nothing_is_kept_of_nodes_that_keep_nothing():
    with open_grid(app_of(echo), 1_000_000) as grid:
        replies = grid.send_and_receive([ask(n) for n in range(2, 1_000_002, 10_000)])
        assert len(replies) == 100 and not any(r.has_error() for r in replies)
        assert not grid._engine._home.kept
        assert not grid._sent and not grid._ids and not grid._replies


def test_a_failure_undoes_what_the_client_did_to_its_context():
    def half(message, context):
        context.state["n"] = MetricRecord({"n": len(context.state)})
        context.node_config["odd"] = 1
        if "fail" in message.content:
            raise ValueError("boom")
        return Message(numbers(odd="odd" in dict(context.node_config) and 1), reply_to=message)

    def look(message, context):
        return Message(
            numbers(state=len(context.state), odd=int("odd" in context.node_config)),
            reply_to=message,
        )

    app = app_of(half)
    app.query()(look)
    with open_grid(app, 1) as grid:
        grid.send_and_receive([ask(content=RecordDict({"fail": ConfigRecord()}))])
        [first] = grid.send_and_receive([ask(kind="query")])
        grid.send_and_receive([ask()])
        [second] = grid.send_and_receive([ask(kind="query")])
    assert dict(first.content["m"]) == {"state": 0, "odd": 0}
    assert dict(second.content["m"]) == {"state": 1, "odd": 1}


# Messages


@pytest.mark.parametrize(
    "kind", ["train", "evaluate", "query", "train.fast", "evaluate.on_test", "query.profile"]
)
def test_every_kind_of_message_reaches_its_function(kind):
    app = ClientApp()
    for category in ("train", "evaluate", "query"):
        for action in ("default", "fast", "on_test", "profile"):
            def work(message, context, name=f"{category}.{action}"):
                return Message(RecordDict({"c": ConfigRecord({"by": name})}), reply_to=message)

            getattr(app, category)(action)(work)
    with open_grid(app, 1) as grid:
        [reply] = grid.send_and_receive([ask(kind=kind)])
    assert reply.content["c"]["by"] == (kind if "." in kind else f"{kind}.default")
    assert reply.metadata.message_type == kind


def test_metadata_are_as_flower_sets_them():
    seen = []

    def note(message, context):
        seen.append(message.metadata)
        return echo(message, context)

    with open_grid(app_of(note), 3) as grid:
        message = ask(3, group_id="7", ttl=60.0)
        [reply] = grid.send_and_receive([message])
        [got], run = seen, grid.run
        assert isinstance(run, Run) and run.run_id == TaskIdentity.run_id
    for metadata in (message.metadata, got):
        assert metadata.message_id and not metadata.reply_to_message_id
        assert (metadata.src_node_id, metadata.dst_node_id) == (1, 3)
    assert got.delivered_at
    answer = reply.metadata
    assert (answer.src_node_id, answer.dst_node_id) == (3, 1)
    assert answer.reply_to_message_id == message.metadata.message_id == got.message_id
    assert answer.message_id not in ("", got.message_id)
    assert (answer.group_id, answer.message_type, answer.run_id) == ("7", "train", run.run_id)
    assert 0 < answer.ttl <= 60 and answer.delivered_at
    assert (answer.src_task_id, answer.dst_task_id) == (None, 1)


def test_replies_are_sorted_by_node():
    with open_grid(app_of(echo), 50) as grid:
        nodes = list(grid.get_node_ids())
        random.Random(1).shuffle(nodes)
        replies = grid.send_and_receive([ask(n, numbers(n=n)) for n in nodes])
    assert [r.metadata.src_node_id for r in replies] == sorted(nodes)
    assert [r.content["m"]["n"] for r in replies] == sorted(nodes)


def test_replies_are_there_once_and_only_for_who_asks():
    with open_grid(app_of(echo), 4) as grid:
        first, second = grid.push_messages([ask(2, numbers(n=1)), ask(3, numbers(n=2))])
        [reply] = grid.pull_messages([second])
        assert reply.content["m"]["n"] == 2
        [reply] = grid.pull_messages({first})
        assert reply.content["m"]["n"] == 1
        [gone] = grid.pull_messages([first])
        [never] = grid.pull_messages(["never"])
        assert gone.error.code == never.error.code == 3
        assert gone.metadata.reply_to_message_id == first
        assert grid.pull_messages([]) == []


def test_a_node_has_its_messages_in_the_order_in_which_they_were_pushed():
    seen = []

    def note(message, context):
        seen.append(message.content["m"]["n"])
        return echo(message, context)

    with open_grid(app_of(note), 2) as grid:
        ids = [grid.push_messages([ask(2, numbers(n=n))])[0] for n in range(3)]
        assert seen == []
        assert len(grid.pull_messages(ids[1:])) == 2
        assert seen == [0, 1, 2]
        assert len(grid.pull_messages(ids[:1])) == 1


@pytest.mark.parametrize(
    "message",
    [lambda: ask(1), lambda: ask(5), lambda: ask(ttl=60)],
    ids=["server", "beyond", "expired"],
)
def test_what_can_reach_nobody_is_left_out_and_said(message, caplog, monkeypatch, later):
    monkeypatch.setattr(fast.log, "propagate", True)
    with open_grid(app_of(echo), 3) as grid:
        bad = message()
        later()
        replies = grid.send_and_receive([ask(2), bad, ask(4)])
    assert [r.metadata.src_node_id for r in replies] == [2, 4]
    assert "is not sent" in caplog.text


def test_a_message_of_another_run_is_left_out():
    with open_grid(app_of(echo), 1) as grid:
        TaskIdentity.run_id += 1
        assert grid.push_messages([ask()]) == []


def test_an_answer_is_no_message_to_a_node():
    with open_grid(app_of(echo), 1) as grid:
        [reply] = grid.send_and_receive([ask()])
        with pytest.raises(ValueError, match="answer no other"):
            grid.push_messages([Message(RecordDict(), reply_to=reply)])


def test_a_message_that_expires_unanswered_gives_an_error_and_no_work(later):
    seen = []

    def note(message, context):
        seen.append(message)
        return echo(message, context)

    with open_grid(app_of(note), 1) as grid:
        ids = grid.push_messages([ask(ttl=60)])
        later()
        [reply] = grid.pull_messages(ids)
        assert reply.error.code == 3 and reply.metadata.reply_to_message_id == ids[0]
    assert not seen


def test_a_reply_that_has_expired_is_an_error(later):
    def brief(message, context):
        return Message(RecordDict(), reply_to=message, ttl=60)

    with open_grid(app_of(brief), 2) as grid:
        ids = grid.push_messages([ask(2), ask(3)])
        grid.pull_messages(ids[1:])
        later()
        [reply] = grid.pull_messages(ids[:1])
    assert reply.error.code == 4 and reply.metadata.message_type == "train"


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so."""
    passed = [0.0]
    monkeypatch.setattr(fast.time, "monotonic", lambda: passed[0])
    return passed


def slow_app(clock, seconds):
    def slow(message, context):
        clock[0] += seconds
        return echo(message, context)

    return app_of(slow)


def test_a_reply_that_is_late_is_missing_and_can_still_be_pulled(clock):
    with open_grid(slow_app(clock, 2.0), 6) as grid:
        messages = [ask(n) for n in grid.get_node_ids()]
        replies = grid.send_and_receive(messages, timeout=5.0)
        assert [r.metadata.src_node_id for r in replies] == [2, 3]
        rest = [m.metadata.message_id for m in messages[2:]]
        found = []
        while len(found) < 4:
            found += grid.pull_messages(rest[len(found) :])
        assert [r.metadata.src_node_id for r in found] == [4, 5, 6, 7]
        assert not any(r.has_error() for r in found)
        assert grid.send_and_receive([ask()], timeout=0) == []


def test_what_came_too_late_is_done_before_what_is_sent_later(clock):
    with open_grid(slow_app(clock, 2.0), 2) as grid:
        assert len(grid.send_and_receive([ask(2), ask(3)], timeout=3.0)) == 1
        begun = clock[0]
        assert len(grid.send_and_receive([ask(2)])) == 1
        assert clock[0] - begun == 2.0  # node 3 was through when the time was over
        assert len(grid.send_and_receive([ask(2), ask(3), ask(2)], timeout=1.0)) == 0
        begun = clock[0]
        assert len(grid.send_and_receive([ask(2)])) == 1
        assert clock[0] - begun == 6.0  # two that were late, and its own


def test_one_who_polls_gets_replies_as_they_come(clock):
    with open_grid(slow_app(clock, 0.5), 20) as grid:
        ids, pulls = set(grid.push_messages([ask(n) for n in grid.get_node_ids()])), []
        for away_s in (0.0, 0.1, 4.0, 60.0):
            clock[0] += away_s
            replies = grid.pull_messages(ids)
            ids -= {r.metadata.reply_to_message_id for r in replies}
            pulls.append(len(replies))
    # A second's work, or as much as the time would have been enough for.
    assert pulls == [2, 2, 8, 8]


def test_messages_that_nobody_pulls_are_forgotten_when_they_have_expired(later):
    with open_grid(app_of(echo), 2) as grid:
        grid.push_messages([ask(ttl=60) for _ in range(1100)])
        grid.push_messages([ask()])
        assert len(grid._sent) == 1101
        later()
        grid.push_messages([ask() for _ in range(1100)])
        grid.push_messages([ask()])
        assert len(grid._sent) == len(grid._ids) == 1102


# What goes wrong on a client


def test_what_a_client_raises_is_its_reply(caplog, monkeypatch):
    monkeypatch.setattr(fast.log, "propagate", True)

    def broken(message, context):
        if context.node_config["partition-id"] == 1:
            raise ValueError("boom")
        return echo(message, context)

    with open_grid(app_of(broken), 3) as grid:
        replies = grid.send_and_receive([ask(n) for n in (2, 3, 4)])
        assert [r.has_error() for r in replies] == [False, True, False]
        error = replies[1].error
        assert (error.code, error.reason) == (2, "<class 'ValueError'>:<'boom'>")
        assert replies[1].metadata.src_node_id == 3
        assert caplog.text.count("Traceback") == 1
        grid.send_and_receive([ask(3)])
        assert caplog.text.count("Traceback") == 1  # the same is told in full once
        assert caplog.text.count("<'boom'>") == 1


def test_a_message_for_which_there_is_no_function_is_an_error():
    with open_grid(app_of(echo), 1) as grid:
        [reply] = grid.send_and_receive([ask(kind="query.nothing")])
    assert reply.error.code == 2 and "nothing" in reply.error.reason


def test_a_client_that_exits_takes_no_server_with_it():
    with open_grid(app_of(lambda message, context: sys.exit(3)), 1) as grid:
        [reply] = grid.send_and_receive([ask()])
    assert reply.error.code == 8


def own_error(message, context):
    return Message(Error(6, "unwilling"), reply_to=message)


def config_changed(message, context):
    context.run_config["lr"] = 1
    return echo(message, context)


@pytest.mark.parametrize(
    "work, code, said",
    [
        (own_error, 6, "unwilling"),
        (lambda message, context: None, 0, "must return a Message, got <class 'NoneType'>"),
        (lambda message, context: message, 0, "reply_to=message"),
        (config_changed, 0, "run_config"),
    ],
    ids=["own", "none", "itself", "config"],
)
def test_an_answer_that_is_none_is_an_error_and_not_waited_for(work, code, said):
    with open_grid(app_of(work), 1, run_config={"lr": 0}) as grid:
        [reply] = grid.send_and_receive([ask()])
        [other] = grid.send_and_receive([ask()])
    assert reply.error.code == code and said in reply.error.reason
    assert other.error.reason.split("(")[0] == reply.error.reason.split("(")[0]


# Neither side changes what the other has


def everything():
    return RecordDict(
        {
            "a": ArrayRecord({"w": Array(np.arange(3.0))}),
            "m": MetricRecord({"list": [1, 2], "one": 1}),
            "c": ConfigRecord({"list": ["x"], "one": b"1"}),
        }
    )


def spoil(content):
    content["a"]["w"].data = b""
    content["a"]["v"] = Array(np.zeros(1))
    content["m"]["list"].append(3)
    content["c"]["list"][0] = "y"
    content["c"]["one"] = b"2"
    content["new"] = ConfigRecord()


def test_a_client_that_changes_what_it_got_changes_nothing_else():
    seen = []

    def vandal(message, context):
        seen.append(message.content == everything())
        context.state["mine"] = message.content["m"]
        reply = Message(everything(), reply_to=message)
        spoil(message.content)
        message.metadata.dst_node_id = 99
        return reply

    with open_grid(app_of(vandal), 3) as grid:
        content = everything()
        replies = grid.send_and_receive([ask(n, content) for n in (2, 3, 4)])
    assert seen == [True] * 3 and content == everything()
    assert [r.content == everything() for r in replies] == [True] * 3


def test_a_server_that_changes_what_it_sent_or_got_changes_nothing_else():
    kept = everything()

    def keeper(message, context):
        first = "kept" not in context.state
        if first:
            context.state["kept"] = kept["m"]
        same = message.content == everything() and context.state["kept"] == everything()["m"]
        said = MetricRecord({"s": int(same)})
        return Message(RecordDict({"kept": context.state["kept"], "same": said}), reply_to=message)

    with open_grid(app_of(keeper), 1) as grid:
        content = everything()
        ids = grid.push_messages([ask(2, content)])
        spoil(content)
        [reply] = grid.pull_messages(ids)
        reply.content["kept"]["list"].append(4)
        [again] = grid.send_and_receive([ask(2, everything())])
    assert reply.content["same"]["s"] == again.content["same"]["s"] == 1
    assert kept == everything()


def test_what_a_client_draws_or_seeds_is_not_the_servers():
    def draw(message, context):
        random.seed(0)
        np.random.seed(0)
        return Message(numbers(x=random.random()), reply_to=message)

    random.seed(5)
    np.random.seed(5)
    wanted = [random.random(), np.random.rand()]
    random.seed(5)
    np.random.seed(5)
    with open_grid(app_of(draw), 1) as grid:
        grid.send_and_receive([ask()])
    assert [random.random(), np.random.rand()] == wanted


def draws(seed, nodes):
    def draw(message, context):
        return Message(numbers(x=random.random(), y=np.random.rand()), reply_to=message)

    found = {}
    server = ServerApp()

    @server.main()
    def main(grid, context):
        found["server"] = random.random()
        for turn in range(2):
            for reply in grid.send_and_receive([ask(n) for n in nodes]):
                metrics = reply.content["m"]
                found[reply.metadata.src_node_id, turn] = metrics["x"], metrics["y"]

    run_apps(server, app_of(draw), 5, seed=seed)
    return found


def test_with_a_seed_draws_depend_on_the_node_and_its_turn_alone():
    many, few = draws(3, [2, 3, 4]), draws(3, [4, 2])
    assert len(set(many.values())) == 7
    assert few.items() <= many.items()
    assert not set(draws(4, [2]).values()) & set(many.values())


# Whole apps


def test_mods_and_lifespans_of_both_apps_run():
    told = []

    def mod(message, context, call_next):
        told.append("before")
        reply = call_next(message, context)
        told.append("after")
        return reply

    def work(message, context):
        told.append("work")
        return echo(message, context)

    client = app_of(work, mods=[mod])

    @client.lifespan()
    def client_life(context):
        told.append("client begins")
        yield
        told.append("client ends")

    server = ServerApp()

    @server.lifespan()
    def server_life(context):
        told.append("server begins")
        yield
        told.append("server ends")

    @server.main()
    def main(grid, context):
        grid.send_and_receive([ask()])
        context.state["done"] = ConfigRecord()

    context = run_apps(server, client, 1, run_config={"lr": 0.1})
    assert told == [
        "server begins", "client begins", "before", "work", "after", "client ends", "server ends",
    ]
    assert isinstance(context, Context) and "done" in context.state
    assert context.run_config == {"lr": 0.1}


def test_flowers_strategy_runs_whole():
    ends = []
    run_apps(apps.server_of(ends, 4), apps.client, 4)
    [result] = ends
    losses = [m["loss"] for m in result.evaluate_metrics_clientapp.values()]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)


def test_apps_of_flowers_older_kind_run():
    from flwr.client import NumPyClient
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg

    seen, ends = [], []

    class Mine(NumPyClient):
        def __init__(self, partition):
            self.partition = partition

        def fit(self, parameters, config):
            seen.append(self.partition)
            return [parameters[0] + self.partition], 1, {}

    class Noted(FedAvg):
        def aggregate_fit(self, server_round, results, failures):
            assert not failures
            aggregated = super().aggregate_fit(server_round, results, failures)
            ends.append(parameters_to_ndarrays(aggregated[0]))
            return aggregated

    strategy = Noted(
        fraction_evaluate=0.0,
        initial_parameters=ndarrays_to_parameters([np.zeros(2, np.float32)]),
    )
    server = ServerApp(
        server_fn=lambda context: ServerAppComponents(
            strategy=strategy, config=ServerConfig(num_rounds=2)
        )
    )
    client = ClientApp(lambda context: Mine(context.node_config["partition-id"]).to_client())
    run_apps(server, client, 3)
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]
    assert [e[0].tolist() for e in ends] == [[1.0, 1.0], [2.0, 2.0]]  # the mean of 0, 1 and 2


def test_what_the_server_raises_is_raised_and_leaves_nothing_behind():
    server = ServerApp()

    @server.main()
    def main(grid, context):
        raise KeyError("mine")

    before = TaskIdentity._run_id
    with pytest.raises(KeyError, match="mine"):
        run_apps(server, app_of(echo), 1)
    assert TaskIdentity._run_id == before


@pytest.mark.parametrize("method", ["fedavg", "fedmoe"])
def test_fedmoes_own_apps_run_on_it_with_the_same_bits(tmp_path, monkeypatch, method):
    from fedmoe.exchange.flower.client_app import app

    monkeypatch.setenv("FEDMOE_STATE", str(tmp_path / "state"))
    config = {"experiment": TARGET, "method": method, "rounds": 2, "folder": str(tmp_path / "run")}
    with open_grid(app, 4) as grid:
        digest = lead(grid, grid.run.run_id, Settings.of(config))
    assert digest == run_experiment(make_experiment(Spec(TARGET, method, 0, 2)), tmp_path / "here")


def test_a_run_can_be_set_again_and_no_other():
    with open_grid(app_of(echo), 1) as grid:
        grid.set_run(grid.run)
        with pytest.raises(RuntimeError, match="for which this grid was made"):
            grid.set_run(Run.create_empty(1))
        with pytest.raises(TypeError, match="run must be a Run"):
            grid.set_run(1)
        message = grid.create_message(RecordDict(), "train", 2, "g")
        assert message.metadata.group_id == "g" and message.metadata.dst_node_id == 2


def test_there_must_be_a_node():
    with pytest.raises(ValueError, match="num_nodes must be 1 or more, got 0"):
        open_grid(app_of(echo), 0)
