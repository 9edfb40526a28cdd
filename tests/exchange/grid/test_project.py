import sys

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedmoe.exchange.grid import __main__ as command
from fedmoe.exchange.grid.project import load_project

PROJECT = """\
[tool.flwr.app.components]
serverapp = "{name}.apps:server"
clientapp = "{name}.apps:client"

[tool.flwr.app.config]
rounds = 2
lr = 0.5
model = {{ name = "small", wide = true }}
"""
APPS = """\
from pathlib import Path

from flwr.app import Message, RecordDict, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server, client, other = ServerApp(), ClientApp(), 3


@client.train()
def train(message, context):
    said = MetricRecord({"lr": context.run_config["lr"]})
    return Message(RecordDict({"m": said}), reply_to=message)


@server.main()
def main(grid, context):
    replies = grid.send_and_receive(
        [Message(RecordDict(), n, "train") for n in grid.get_node_ids()]
    )
    found = [r.content["m"]["lr"] for r in replies]
    Path(context.run_config["model.name"]).write_text(repr(found))
"""


@pytest.fixture
def folder(tmp_path, request, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    name = f"app_{abs(hash(request.node.name))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "apps.py").write_text(APPS)
    (tmp_path / "pyproject.toml").write_text(PROJECT.format(name=name))
    return tmp_path


def test_a_folder_has_two_apps_and_settings(folder):
    found = load_project(folder, {"lr": 0.25})
    assert isinstance(found.server_app, ServerApp) and isinstance(found.client_app, ClientApp)
    assert found.run_config == {"rounds": 2, "lr": 0.25, "model.name": "small", "model.wide": True}


def test_a_setting_that_the_app_has_not_is_named(folder):
    with pytest.raises(ValueError, match=r"'rate' must be among .*'lr', 'model.name'"):
        load_project(folder, {"rate": 1})


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("apps:client", "apps:other", "must be a ClientApp, got int"),
        ("apps:client", "apps:gone", "must be a ClientApp, got NoneType"),
        ("apps:server", "apps", "must have serverapp"),
        ("clientapp", "other", "must have clientapp"),
    ],
)
def test_what_is_no_app_is_named(folder, old, new, said):
    path = folder / "pyproject.toml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=said):
        load_project(folder)


def test_a_folder_without_an_app_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no .*pyproject.toml"):
        load_project(tmp_path)


@pytest.mark.parametrize(
    "text, wanted",
    [("lr=0.1", 0.1), ("n=3", 3), ("b=true", True), ('s="x y"', "x y"), ("s=plain", "plain")],
)
def test_a_setting_is_typed_as_in_toml(text, wanted):
    assert command.setting(text)[1] == wanted


def test_the_command_runs_it(folder, monkeypatch):
    out = folder / "out"
    line = ["grid", str(folder), "--nodes", "3", "--set", "lr=2.0", "--set", f"model.name={out}"]
    monkeypatch.setattr(sys, "argv", line)
    command.main()
    assert out.read_text() == "[2.0, 2.0, 2.0]"


def test_the_command_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grid", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "must hold a Flower app" in capsys.readouterr().err
