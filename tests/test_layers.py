"""Who may import whom, read from syntax trees, so that an import inside a function counts too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What a room of fedmoe may import of the others.
MAY_IMPORT = {
    "types": set(),
    "native": set(),
    "nn": {"types", "native"},
    "state": {"types", "nn"},
    "profile": {"types", "state"},
    "population": {"types"},
    "table": {"types"},
    "data": {"types", "population"},
    "device": {"types"},
    "rng": {"types"},
    "checkpoint": {"types", "population", "table"},
    "federated": {
        "types",
        "state",
        "profile",
        "rng",
        "population",
        "table",
        "device",
        "native",
        "data.examples",
        "nn.discriminant",
        "nn.losses",
        "nn.stages",
        "nn.stacked",
    },
    "wire": {"types", "__version__"},
    "exchange": {"types", "federated", "wire", "data", "state", "rng", "device"},
    "report": {"types", "wire"},
}
# These stand above all others, each above those before it.
ABOVE = ("experiments", "cli", "deploy")
FLOWER = "fedmoe.exchange.flower"  # leads whole experiments, so it stands between these two
ENGINES = {"flwr", "ray"}  # run clients
KNOW_ENGINES = ("exchange", "deploy")
KEYS = "fedmoe.deploy.keys"  # made by a command of fedmoe's
APPS = {"server", "client", "simulations"}  # stand on fedmoe, which never looks back
TECHNIQUES = ("fedmoe.nn.gates", "fedmoe.nn.experts")  # one file each, none needs another


def module_of(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of all that a file imports; of `from a import b` it is a.b."""
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *([node.module] if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*stem, alias.name])


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def offences(path: str, source: str) -> list[str]:
    module = module_of(path)
    top = module.split(".")[0]
    room = module.split(".")[1] if "." in module else ""
    allowed = MAY_IMPORT.get(room, set()) | {room}
    found = []
    for line, name in imported(path, source):
        other = name.split(".")[0]
        why = None
        if top == "fedmoe" and other in APPS:
            why = "fedmoe imports none of the top-level rooms"
        elif {top, other} == {"server", "client"}:
            why = "server and client do not know each other"
        elif top == "fedmoe" and other in ENGINES and room not in KNOW_ENGINES:
            why = f"only fedmoe.{' and fedmoe.'.join(KNOW_ENGINES)} know who runs the clients"
        elif top == "fedmoe" and room == "experiments" and within(name, "fedmoe.cli"):
            why = "an experiment knows nothing of the command line"
        elif top == "fedmoe" and room != "deploy" and within(name, "fedmoe.deploy"):
            if room != "cli" or not within(name, KEYS):
                why = "commands of daemons stand above all else; others may make their keys"
        elif module == KEYS and other == "fedmoe":
            why = "keys are made without the rest"
        elif within(module, FLOWER):
            if within(name, "fedmoe.cli") or within(name, "fedmoe.deploy"):
                why = "what is carried over Flower knows nothing of commands"
        elif top == "fedmoe" and within(name, FLOWER) and room not in ("deploy", "cli"):
            why = "only what stands above an experiment leads one over Flower"
        elif top == other == "fedmoe" and room not in ("", *ABOVE):
            if not any(within(name, f"fedmoe.{a}") for a in allowed):
                why = f"fedmoe.{room} may import {sorted(allowed)}"
            elif module.startswith(TECHNIQUES) and name.startswith(TECHNIQUES):
                why = None if within(name, module) else "a technique's file stands alone"
        if why:
            found.append(f"{path}:{line} imports {name}: {why}")
    return found


def files() -> list[Path]:
    rooms = ("fedmoe", *sorted(APPS))
    return [p for room in rooms for p in sorted((ROOT / room).rglob("*.py"))]


def test_every_file_imports_only_what_its_room_may():
    found = [o for p in files() for o in offences(p.relative_to(ROOT).as_posix(), p.read_text())]
    assert not found, "\n" + "\n".join(found)


def test_every_room_of_fedmoe_has_a_rule():
    paths = [p.relative_to(ROOT / "fedmoe") for p in sorted((ROOT / "fedmoe").rglob("*.py"))]
    rooms = {p.parts[0].removesuffix(".py") for p in paths} - {"__init__"}
    assert rooms <= {*MAY_IMPORT, *ABOVE}


@pytest.mark.parametrize(
    "path, source",
    [
        ("fedmoe/types.py", "import fedmoe.rng"),
        ("fedmoe/rng.py", "from fedmoe import experiments"),
        ("fedmoe/nn/moe.py", "from fedmoe.state import split_state"),
        ("fedmoe/nn/moe.py", "from fedmoe import state"),
        ("fedmoe/nn/moe.py", "from ..state import split_state"),
        ("fedmoe/nn/moe.py", "def f():\n    import fedmoe.profile"),
        ("fedmoe/federated/local.py", "from fedmoe.data.fashion import load"),
        ("fedmoe/federated/local.py", "from fedmoe.nn.moe import MoE"),
        ("fedmoe/federated/rounds.py", "import ray"),
        ("fedmoe/federated/rounds.py", "from flwr.app import Message"),
        ("fedmoe/wire/messages.py", "from fedmoe.state import state_hash"),
        ("fedmoe/report/page.py", "from fedmoe.experiments import run"),
        ("fedmoe/experiments/run.py", "from fedmoe.cli.live import view"),
        ("fedmoe/experiments/run.py", "from fedmoe.exchange.flower import server"),
        ("fedmoe/exchange/inprocess.py", "from fedmoe.exchange.flower.terms import Terms"),
        ("fedmoe/exchange/flower/server.py", "from fedmoe.cli import app"),
        ("fedmoe/experiments/run.py", "from fedmoe.deploy.keys import Keys"),
        ("fedmoe/cli/run.py", "from fedmoe.deploy import serve"),
        ("fedmoe/cli/doctor.py", "import flwr"),
        ("fedmoe/deploy/keys.py", "from fedmoe.types import State"),
        ("fedmoe/deploy/serve.py", "import server.app"),
        ("fedmoe/cli/app.py", "import server.app"),
        ("fedmoe/__init__.py", "import simulations"),
        ("server/app.py", "from client.app import app"),
        ("client/app.py", "import server"),
        ("fedmoe/nn/gates/threshold.py", "from fedmoe.nn.gates.topk import keep_top_k"),
        ("fedmoe/nn/gates/threshold.py", "from .topk import keep_top_k"),
        ("fedmoe/nn/experts/lora.py", "from fedmoe.nn.gates.topk import TopKGate"),
    ],
)
def test_an_import_across_the_rules_is_named(path, source):
    [offence] = offences(path, source)
    assert offence.startswith(f"{path}:")


@pytest.mark.parametrize(
    "path, source",
    [
        ("fedmoe/state.py", "from fedmoe.nn.moe import MoE\nfrom fedmoe.types import ExpertId"),
        ("fedmoe/federated/local.py", "from fedmoe.data.examples import Examples\nimport torch"),
        ("fedmoe/federated/rounds.py", "from .check import check_update"),
        ("fedmoe/exchange/flower.py", "import flwr"),
        ("fedmoe/exchange/flower/client.py", "from fedmoe.experiments.run import Spec"),
        ("fedmoe/data/fashion.py", "import flwr_datasets\nimport raylib"),
        ("fedmoe/nn/gates/topk.py", "from fedmoe.types import Routing"),
        ("fedmoe/cli/app.py", "from fedmoe.experiments import run"),
        ("fedmoe/cli/keys.py", "from fedmoe.deploy.keys import make_keys"),
        ("fedmoe/deploy/serve.py", "import flwr\nfrom fedmoe.cli.trouble import CommandError"),
        ("server/app.py", "import flwr\nfrom fedmoe.federated import rounds"),
    ],
)
def test_an_import_within_the_rules_is_none(path, source):
    assert offences(path, source) == []
