"""inspect, on made-up runs."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from rich.console import Console

from fedmoe.checkpoint import save_checkpoint
from fedmoe.cli.inspect import ExpertView, ModelView, _expert_table
from fedmoe.federated.per_group import GroupStates
from fedmoe.state import state_hash
from fedmoe.types import ExpertId, MoEState
from tests.cli.conftest import small_model, write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path)


def test_a_run_shows_its_newest_checkpoint_expert_by_expert(fedmoe, run):
    result = fedmoe("inspect", run, "--json")
    assert result.exit_code == 0
    seen = json.loads(result.stdout)
    view = seen["checkpoint"]
    assert seen["damaged"] == [] and seen["run"]["finished"] is True
    assert view["round"] == 2 and view["matches_log"] is True
    [model] = view["models"]
    assert model["parameters"] == 5 + 3 * 8 and model["shared_bytes"] == 20
    experts = model["experts"]
    assert [(e["layer"], e["expert"], e["bytes"]) for e in experts] == [
        (0, e, 32) for e in range(3)
    ]
    assert [e["holders"] for e in experts] == [[0], [0, 1], []]
    assert [e["activations"] for e in experts] == [20, 24, 0]  # 2 rounds of (10, 5 + 7, 0)
    own = small_model(seed=1).experts[ExpertId(0, 2)]
    assert experts[2]["hash"] == state_hash(MoEState(own, {}))


def test_an_older_checkpoint_is_seen_with_what_was_known_then(fedmoe, run):
    result = fedmoe("inspect", run / "checkpoints" / "round-000001", "--json")
    view = json.loads(result.stdout)["checkpoint"]
    assert view["round"] == 1 and view["matches_log"] is True
    assert [e["activations"] for e in view["models"][0]["experts"]] == [10, 12, 0]


def test_a_bare_checkpoint_tells_what_its_own_files_hold(fedmoe, run, tmp_path):
    shutil.copytree(run / "checkpoints" / "round-000002", tmp_path / "bare" / "round-000002")
    result = fedmoe("inspect", tmp_path / "bare" / "round-000002", "--json")
    seen = json.loads(result.stdout)
    assert seen["run"] is None and seen["checkpoint"]["matches_log"] is None
    [model] = seen["checkpoint"]["models"]
    assert all(e["holders"] is None and e["activations"] is None for e in model["experts"])
    text = fedmoe("inspect", tmp_path / "bare" / "round-000002").stdout
    assert "content matches its hash" in text and "held by" not in text


def test_a_state_of_several_models_shows_each(fedmoe, tmp_path):
    models = {"left": small_model(0), "right": small_model(1)}
    save_checkpoint(tmp_path, 4, GroupStates(4, models))
    result = fedmoe("inspect", tmp_path / "round-000004", "--json")
    view = json.loads(result.stdout)["checkpoint"]
    assert [m["name"] for m in view["models"]] == ["models.left", "models.right"]
    assert "models.right" in fedmoe("inspect", tmp_path / "round-000004").stdout


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_shown(fedmoe, run, file):
    flip_a_bit(run / "checkpoints" / "round-000002" / file)
    result = fedmoe("inspect", run)
    assert result.exit_code == 0
    assert "damaged" in result.stdout and "round-000002" in result.stdout
    assert "after 1 of 2 rounds" in result.stdout


def test_nothing_but_damage_is_exit_code_2(fedmoe, run):
    for path in (run / "checkpoints").glob("*/state.safetensors"):
        flip_a_bit(path)
    for path in (run, run / "checkpoints" / "round-000002"):
        result = fedmoe("inspect", path, "--json")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "damaged" in result.stderr and "does not match its hash" in result.stderr


def test_a_checkpoint_that_another_run_wrote_does_not_match_the_log(fedmoe, run):
    save_checkpoint(run / "checkpoints", 2, GroupStates(2, {"x": small_model(9)}))
    result = fedmoe("inspect", run)
    assert result.exit_code == 0 and "the run's log has another" in result.stdout


def test_on_a_narrow_terminal_the_list_of_clients_alone_is_cut():
    holders = tuple(range(0, 400, 7))
    view = ModelView("model", 0, 0, 0, (ExpertView(0, 15, 8, 2**20, "9" * 64, holders, 10**6),))
    out = io.StringIO()
    Console(file=out, width=80).print(_expert_table(view))
    head, line = out.getvalue().splitlines()
    assert head.split()[-1] == "clients" and "…" not in head
    assert line.rstrip().endswith("…") and line.count("…") == 1
    assert line.split()[:6] == ["0", "15", "1.00", "MiB", "9" * 12, "1,000,000"]


def test_inspecting_changes_no_file(fedmoe, run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    fedmoe("inspect", run)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_folder_of_runs_names_those_that_can_be_looked_into(fedmoe, run):
    result = fedmoe("inspect", run.parent)
    assert result.exit_code == 2 and run.name in result.stderr
