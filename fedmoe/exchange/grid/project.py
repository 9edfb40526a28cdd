"""A Flower app in a folder, as `flwr run` takes it: its two apps and its settings.

    python -m fedmoe.exchange.grid FOLDER --nodes 1000 [--actors 2] [--seed 0] [--set lr=0.1]
"""

import importlib
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import UserConfig
from flwr.app.user_config import UserConfigValue
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp


class Project(NamedTuple):
    """What `run_apps` needs of a Flower app."""

    server_app: ServerApp
    client_app: ClientApp
    run_config: UserConfig


def load_project(
    folder: Path, changes: Mapping[str, UserConfigValue] | None = None
) -> Project:
    """Read its pyproject.toml and import its apps; the folder stays the first of sys.path.

    Args:
        changes: to `[tool.flwr.app.config]`, whose tables are joined with dots, as in Flower.

    Raises:
        ValueError: there is no Flower app, or `changes` has a key that the settings have not.
    """
    path = folder / "pyproject.toml"
    if not path.is_file():
        raise ValueError(f"folder must hold a Flower app, and there is no {path}")
    settings = tomllib.loads(path.read_text(encoding="utf-8"))
    app = settings.get("tool", {}).get("flwr", {}).get("app", {})
    config = _flat(app.get("config", {}))
    for key in changes or {}:
        if key not in config:
            raise ValueError(
                f"{key!r} must be among the settings of the app in {folder}: {sorted(config)}"
            )
    sys.path.insert(0, str(folder.absolute()))
    return Project(
        _load(app, "serverapp", ServerApp, path),
        _load(app, "clientapp", ClientApp, path),
        {**config, **(changes or {})},
    )


def _load(app: Mapping[str, Any], name: str, kind: type[Any], path: Path) -> Any:
    said = app.get("components", {}).get(name, "")
    module, _, attribute = str(said).partition(":")
    if not attribute:
        raise ValueError(
            f"{path} must have {name} = \"module:attribute\" in [tool.flwr.app.components], got "
            f"{said!r}"
        )
    found = getattr(importlib.import_module(module), attribute, None)
    if not isinstance(found, kind):
        raise ValueError(f"{said} of {path} must be a {kind.__name__}, got {type(found).__name__}")
    return found


def _flat(table: Mapping[str, Any], before: str = "") -> UserConfig:
    flat: UserConfig = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{before}{key}."))
        else:
            flat[f"{before}{key}"] = value
    return flat
