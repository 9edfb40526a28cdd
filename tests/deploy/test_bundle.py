"""The app that Flower carries: only shims, and settings that arrive as they were."""

from __future__ import annotations

import ast
import io
import tomllib
import zipfile

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from hypothesis import given
from hypothesis import strategies as st

from fedmoe import __version__
from fedmoe.deploy.bundle import write_bundle

CONFIG = {"experiment": "lab:tiny", "folder": '/a "b"\\c', "rounds": 3, "quorum": 0.5, "on": True}


@pytest.fixture
def bundle(tmp_path):
    write_bundle(tmp_path / "bundle", CONFIG)
    return tmp_path / "bundle"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flower_takes_it_and_packs_three_files_and_its_settings(bundle):
    load_and_validate(bundle / "pyproject.toml", check_module=False)
    packed = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(bundle)))
    code = {n for n in packed.namelist() if n.endswith(".py")}
    assert code == {f"fedmoe_bundle/{n}.py" for n in ("__init__", "server", "client")}
    project = tomllib.loads(packed.read("pyproject.toml").decode())
    assert project["tool"]["flwr"]["app"]["config"] == CONFIG
    assert project["project"]["version"] == __version__
    assert project["project"]["dependencies"] == []  # nothing is to be installed on the way


def test_its_code_is_imports_of_the_installed_fedmoe_alone(bundle):
    for name in ("server", "client"):
        text = (bundle / "fedmoe_bundle" / f"{name}.py").read_text()
        assert [ast.unparse(s) for s in ast.parse(text).body] == [
            f"from fedmoe.exchange.flower import {name}_app",
            f"app = {name}_app.app",
        ]


def test_nothing_of_an_earlier_bundle_is_left(bundle):
    (bundle / "fedmoe_bundle" / "old.py").write_text("")
    write_bundle(bundle, {"rounds": 1})
    assert not (bundle / "fedmoe_bundle" / "old.py").exists()


@given(st.text(st.characters(codec="utf-8")))
def test_every_text_arrives_as_it_was(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    write_bundle(folder, {"experiment": text})
    found = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    assert found["tool"]["flwr"]["app"]["config"]["experiment"] == text


def test_what_flower_does_not_carry_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"clients must be text, a number or a truth value"):
        write_bundle(tmp_path / "b", {"clients": [1]})  # type: ignore[dict-item]
    assert not (tmp_path / "b").exists()
