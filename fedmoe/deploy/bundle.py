"""The app bundle that Flower carries to every node: lines that import the installed fedmoe.

Flower packs an app's own code and unpacks it on every machine. This one holds none, so what runs is
the fedmoe that is installed there, and its version is checked by the messages themselves.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from fedmoe import __version__

Setting = str | int | float | bool
PACKAGE = "fedmoe_bundle"

PROJECT = """\
[project]
name = "fedmoe"
version = "{version}"
description = "Federated personal mixtures of experts; the code is the installed fedmoe's."
dependencies = []

[tool.flwr.app]
publisher = "fedmoe"

[tool.flwr.app.components]
serverapp = "{package}.server:app"
clientapp = "{package}.client:app"

[tool.flwr.app.config]
{config}
"""

SHIM = """\
from fedmoe.exchange.flower import {module}

app = {module}.app
"""
FILES = {
    "__init__.py": '"""Finds the installed fedmoe."""\n',
    "server.py": SHIM.format(module="server_app"),
    "client.py": SHIM.format(module="client_app"),
}


def write_bundle(folder: Path, config: Mapping[str, Setting]) -> None:
    """Write the app of a run into `folder`, anew.

    Raises:
        ValueError: a setting is of a kind that Flower does not carry.
    """
    lines = [f"{name} = {_toml(name, value)}" for name, value in config.items()]
    if folder.exists():
        shutil.rmtree(folder)
    package = folder / PACKAGE
    package.mkdir(parents=True)
    for name, text in FILES.items():
        (package / name).write_text(text, encoding="utf-8")
    project = PROJECT.format(version=__version__, package=PACKAGE, config="\n".join(lines))
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")


def _toml(name: str, value: Setting) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        # A JSON string is a TOML string too, but for the one character that TOML forbids.
        return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
    raise ValueError(f"{name} must be text, a number or a truth value, got {value!r}")
