"""The benchmark's own parts, without any process."""

from __future__ import annotations

import ast
import json
import tomllib

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.task_identity import TaskIdentity

from simulations import bench_deploy


@pytest.fixture
def message():
    # As an app process of Flower does before it makes messages.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    arrays = ArrayRecord(bench_deploy.experiment()["fedavg"].factory().state_dict())
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({})})
    return Message(content, dst_node_id=1, message_type="train")


def test_both_sides_send_the_same_parameters_and_train_on_the_same_examples(message):
    context = Context(1, 1, {"client-id": 1}, RecordDict(), {})
    reply = bench_deploy.trained(message, context).content
    sent, back = message.content.array_records["arrays"], reply.array_records["arrays"]
    assert {n: (a.shape, a.dtype) for n, a in sent.items()} == {
        n: (a.shape, a.dtype) for n, a in back.items()
    }
    assert any(sent[n].data != back[n].data for n in sent)  # it was trained
    data = bench_deploy.experiment()["fedavg"].data.load(1)
    assert reply.metric_records["metrics"]["num-examples"] == len(data.train.y)


def test_no_round_but_the_last_evaluates():
    run = bench_deploy.experiment(rounds=3)["fedavg"]
    # Round 0, which is left out of what is compared, evaluates as the closing one does.
    assert [r % run.schedule.evaluate_every == 0 for r in (1, 2)] == [False, False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flower_takes_the_peer_s_app(tmp_path):
    project = bench_deploy.PEER_PROJECT.format(rounds=3, out=tmp_path / "seconds.json")
    assert tomllib.loads(project)["tool"]["flwr"]["app"]["config"]["rounds"] == 3
    package = tmp_path / "app" / "peer"
    package.mkdir(parents=True)
    for name, text in (("server", bench_deploy.PEER_SERVER), ("client", bench_deploy.PEER_CLIENT)):
        ast.parse(text)
        (package / f"{name}.py").write_text(text)
    (package.parent / "pyproject.toml").write_text(project)
    assert build_fab_from_disk(package.parent)


def test_a_row_says_what_scripts_read(monkeypatch, capsys):
    monkeypatch.setattr(bench_deploy, "start_daemons", lambda folder, stack: None)
    monkeypatch.setattr(bench_deploy, "our_rounds", lambda control, folder, rounds: [1.0, 3.0, 2.0])
    monkeypatch.setattr(bench_deploy, "their_rounds", lambda control, folder, rounds: [4.0])
    row = json.loads(json.dumps(bench_deploy.row_of_rounds(1, 4)))
    assert (row["ours"], row["theirs"], row["ratio"], row["share"]) == (2.0, 4.0, 2.0, 0.5)
    assert {"case", "peer", "unit"} <= set(row)
