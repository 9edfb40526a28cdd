"""Run a Flower app that lies in a folder; see `project.py`."""

import argparse
import tomllib
from pathlib import Path

from flwr.app.user_config import UserConfigValue

from fedmoe.exchange.grid.apps import run_apps
from fedmoe.exchange.grid.project import load_project


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fedmoe.exchange.grid",
        description="Run a Flower app, as it is, on nodes of this process or on Ray's actors.",
    )
    parser.add_argument("folder", type=Path, help="with the app's pyproject.toml")
    parser.add_argument("--nodes", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--actors", type=int, default=0, help="processes; 0 (default): this one")
    parser.add_argument("--seed", type=int, help="of all global generators; default: none is set")
    parser.add_argument(
        "--set", action="append", default=[], type=setting, metavar="KEY=VALUE", dest="changes",
        help="one of the app's settings; VALUE as in TOML, or else a text",
    )
    args = parser.parse_args()
    try:
        project = load_project(args.folder, dict(args.changes))
    except ValueError as why:
        parser.error(str(why))
    run_apps(
        project.server_app,
        project.client_app,
        args.nodes,
        run_config=project.run_config,
        actors=args.actors,
        seed=args.seed,
    )


def setting(text: str) -> tuple[str, UserConfigValue]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    try:
        found: UserConfigValue = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        found = value
    return key.strip(), found


if __name__ == "__main__":
    main()
