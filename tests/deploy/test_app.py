"""What can be typed, what is refused, and with which exit code: before any process starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedmoe.cli.app import app
from fedmoe.deploy.app import client_app, server_app
from fedmoe.deploy.keys import Keys, make_keys
from tests.cli.conftest import make_lab

ROOT = Path(__file__).parents[2]
CLIENT = ("--server", "127.0.0.1:8000", "--client-id", "0")


@pytest.fixture
def inside(tmp_path, monkeypatch) -> Path:
    """A folder with an experiment `lab:tiny`, as current directory."""
    make_lab(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def server(*arguments: object) -> Result:
    return CliRunner().invoke(server_app, [str(a) for a in arguments])


def client(*arguments: object) -> Result:
    return CliRunner().invoke(client_app, [str(a) for a in arguments])


def keys(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["keys", *(str(a) for a in arguments)])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "name what to serve with --experiment"),
        (("--experiment", "nonsense"), "no experiment is called 'nonsense'"),
        (("--experiment", "lab:tiny", "--method", "x"), "has no method 'x'"),
        (("--experiment", "lab:tiny", "--clients", 5), "from 1 to the 4 of tiny, got 5"),
        (("--experiment", "lab:tiny"), "ca.crt is missing: `fedmoe keys"),
        (("--experiment", "lab:tiny", "--insecure", "--keys", "k"), "either --keys or --insecure"),
        (
            ("--experiment", "lab:tiny", "--insecure", "--host", "0.0.0.0"),
            "add --insecure-anywhere",
        ),
        (("--experiment", "lab:tiny", "--quorum", 2, "--insecure"), "above 0 and at most 1"),
        (("--resume", "nowhere"), "holds no server's run"),
        (("--resume", "nowhere", "--rounds", 3), "as it was begun: only --metrics-port"),
    ],
)
def test_a_server_that_cannot_be_is_refused(inside, arguments, words):
    result = server(*arguments)
    assert result.exit_code == 2, result.output
    assert f"flower-server: {result.stderr.partition(': ')[2]}" == result.stderr
    assert words in result.stderr.replace("\n", " ")
    assert not list(inside.glob("**/superlink.log"))  # nothing has been started


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--server", "nowhere", "--client-id", "0"), "HOST:PORT"),
        (CLIENT, "ca.crt is missing: bring ca.crt here"),
        ((*CLIENT, "--insecure", "--ca", "ca.crt"), "--insecure uses no keys"),
        (("--server", "10.0.0.1:8000", "--client-id", "0", "--insecure"), "--insecure-anywhere"),
        ((*CLIENT, "--insecure", "--data", "nowhere"), "--data must be a folder, got nowhere"),
    ],
)
def test_a_client_that_cannot_be_is_refused(inside, arguments, words):
    result = client(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("flower-client: ")
    assert words in result.stderr.replace("\n", " ")


def test_a_client_without_a_key_is_refused(inside):
    make_keys(Path("keys"), ["127.0.0.1"])
    result = client(*CLIENT)
    assert result.exit_code == 2 and "client-0 is missing" in result.stderr.replace("\n", " ")


def test_an_error_is_a_json_line_where_these_are_asked_for(inside):
    result = client(*CLIENT, "--log-json")
    line = json.loads(result.stderr)
    assert result.exit_code == 2
    assert (line["level"], line["event"]) == ("error", "ended") and "ca.crt" in line["message"]


def test_keys_tells_what_goes_where(inside):
    result = keys("--host", "10.0.0.1", "--clients", 2, "--client", 7)
    assert result.exit_code == 0, result.output
    assert sorted(Keys(Path("keys")).public_keys()) == [0, 1, 7]
    for words in ("10 files written", "ca.key", "nowhere: keep it", "clients/client-0.pub"):
        assert words in result.stdout
    again = keys("--clients", 1)
    assert again.exit_code == 0 and "2 files kept as found" in again.stdout


def test_keys_as_json_stands_alone(inside):
    found = json.loads(keys("--client", 3, "--json").stdout)
    assert found == {
        "folder": "keys",
        "written": ["keys/clients/client-3", "keys/clients/client-3.pub"],
        "kept": [],
    }


def test_keys_of_nothing_is_refused(inside):
    result = keys()
    assert result.exit_code == 2 and "name what to make" in result.stderr


@pytest.mark.parametrize("module", ["fedmoe.deploy.app", "fedmoe.cli.app"])
def test_help_does_not_wait_for_torch_or_flower(module):
    code = f"import {module}, sys; assert not {{'torch', 'flwr'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
