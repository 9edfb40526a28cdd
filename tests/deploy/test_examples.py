"""The examples for systemd and compose are what these read, and call what there is."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import typer
import yaml

from fedmoe.deploy.app import client_app, server_app

ROOT = Path(__file__).parents[2]
UNITS = (ROOT / "server/flower-server.service", ROOT / "client/flower-client.service")
SERVICE_KEYS = {"build", "image", "init", "restart", "stop_grace_period", "command", "volumes"}
SERVICE_KEYS |= {"ports"}


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(path)
    return parser


def options_of(command: str) -> set[str]:
    """The options of a command line, once it is checked that its program has them."""
    program, *words = shlex.split(command)
    apps = {"flower-server": server_app, "flower-client": client_app}
    made = typer.main.get_command(apps[Path(program).name])
    assert isinstance(made, click.Command)
    known = {name for p in made.params for name in p.opts}
    given = {w for w in words if w.startswith("-")}
    assert given <= known, given - known
    return given


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_a_unit_has_its_sections_and_calls_what_there_is(path):
    found = unit(path)
    assert found.sections() == ["Unit", "Service", "Install"]
    assert "--log-json" in options_of(found["Service"]["ExecStart"])
    assert found["Service"]["User"] == "fedmoe"
    # A run that was stopped is no failure; what cannot be is not tried again.
    assert found["Service"]["SuccessExitStatus"] == "143"
    assert found["Service"]["RestartPreventExitStatus"] == "2"


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_systemd_takes_a_unit(path, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    text = path.read_text().replace("/opt/fedmoe/bin/flower-", "/bin/true ")
    (tmp_path / path.name).write_text(text)
    run = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / path.name], capture_output=True, text=True
    )
    about_it = [line for line in run.stderr.splitlines() if path.name in line]
    assert run.returncode == 0 and not about_it, run.stderr


def test_compose_has_a_server_and_three_clients_that_call_what_there_is():
    found = yaml.safe_load((ROOT / "server/compose.yaml").read_text())
    services = found["services"]
    assert set(services) == {"server", "client-0", "client-1", "client-2"}
    kept = set(found["volumes"])
    for name, service in services.items():
        assert set(service) <= SERVICE_KEYS, name
        options_of(service["command"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source.startswith(("/", "../")) or source in kept
    for i in range(3):
        assert f"--client-id {i} " in services[f"client-{i}"]["command"]
    port = re.search(r"--server server:(\d+)", services["client-0"]["command"])
    assert port is not None and f"{port[1]}:{port[1]}" in services["server"]["ports"]
