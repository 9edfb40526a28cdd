"""doctor: what it finds missing, and what it says to do."""

from __future__ import annotations

import importlib.metadata
import json
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fedmoe.cli import doctor
from fedmoe.cli.doctor import State

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_every_dependency_is_read_as_pip_reads_it(line):
    name, bounds = doctor.parts_of(line)
    wanted = Requirement(line)
    assert name == wanted.name
    versions = ("0.1", "1", "1.41.5", "1.43", "2.0.1", "2.9", "2.14", "4.8.5", "6.33.6", "9", "15")
    for version in versions:
        assert doctor.within(version, bounds) == wanted.specifier.contains(version), version


def test_bounds_worked_by_hand():
    assert doctor.within("2.13.0+cpu", ">=2.9,<2.14")
    assert not doctor.within("2.14", ">=2.9,<2.14") and not doctor.within("2.8.9", ">=2.9,<2.14")
    assert doctor.within("3.11.7", ">=3.11,<3.14") and not doctor.within("3.14.0", ">=3.11,<3.14")
    assert doctor.within("1.81.1", "==1.81.1") and not doctor.within("1.81", "==1.81.1")
    assert doctor.within("1.0", "")


def test_the_requirements_are_the_project_s_own_without_its_tools():
    python, packages = doctor.requirements_of_fedmoe()
    assert doctor.within("3.11.0", python) and not doctor.within("3.10.9", python)
    names = {doctor.parts_of(p)[0] for p in packages}
    assert names == {Requirement(line).name for line in PROJECT["dependencies"]}


def test_a_missing_and_a_too_old_package_are_told_apart(monkeypatch):
    found = {"here": "1.5", "old": "0.9"}

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = list(doctor.package_checks(["here>=1,<2", "old>=1,<2", "gone[extra]>=3"]))
    assert [(c.name, c.state) for c in checks] == [
        ("old", State.MISSING),
        ("gone", State.MISSING),
        ("packages", State.GOOD),
    ]
    assert checks[0].found == "0.9, must be >=1,<2"
    assert checks[1].mend == "pip install 'gone[extra]>=3'"


def test_a_folder_without_the_data_is_missing_with_the_ways_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDMOE_FASHION_MNIST", str(tmp_path))
    check = doctor.data_check()
    assert check.state is State.MISSING and "train-images" in check.found
    assert check.mend is not None and "apt-get install" in check.mend


def test_without_a_network_data_that_is_nowhere_is_missing(monkeypatch):
    monkeypatch.setattr("fedmoe.data.fashion.find_folder", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.data_check().state is State.MISSING
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert doctor.data_check().state is State.LACKING


def test_data_of_a_few_protocols_are_lacking_and_never_missing(monkeypatch, tmp_path):
    for variable in ("FEDMOE_MNIST", "FEDMOE_HAPT", "FEDMOE_DATA"):
        monkeypatch.setenv(variable, str(tmp_path))
    checks = {c.name: c for c in doctor.more_data_checks()}
    assert list(checks) == ["MNIST", "HAPT", "vowels", "Shakespeare"]
    assert all(c.state is State.LACKING and c.mend for c in checks.values())
    assert "only the protocol motion wants it" in checks["HAPT"].found
    assert "FEDMOE_DATA" in checks["Shakespeare"].mend
    (tmp_path / "vowel-context.data").write_text("1,2,3\n")
    checks = {c.name: c for c in doctor.more_data_checks()}
    assert "wanted the file with SHA-256" in checks["vowels"].found


def test_data_that_are_here_are_told_with_their_place(monkeypatch, tmp_path):
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    for name in names:
        (tmp_path / f"{name}-ubyte").touch()
    monkeypatch.setenv("FEDMOE_MNIST", str(tmp_path))
    check = next(iter(doctor.more_data_checks()))
    assert (check.name, check.state, check.found) == ("MNIST", State.GOOD, str(tmp_path))


def test_a_folder_that_is_gone_cannot_be_written_to(tmp_path):
    checks = {c.name: c for c in doctor.place_checks(tmp_path)}
    assert checks["write access"].state is State.GOOD
    assert list(tmp_path.iterdir()) == []


def test_no_browser_is_no_need(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor.browser_check().state is State.LACKING


@pytest.mark.parametrize("missing, code", [(False, 0), (True, 1)])
def test_the_exit_code_is_1_exactly_if_something_needed_is_missing(
    fedmoe, monkeypatch, missing, code
):
    checks = [doctor.Check("a", State.GOOD, "fine"), doctor.Check("b", State.LACKING, "so", "do")]
    if missing:
        checks.append(doctor.Check("the third", State.MISSING, "gone", "mend it"))
    monkeypatch.setattr(doctor, "all_checks", lambda: iter(checks))
    result = fedmoe("doctor")
    assert result.exit_code == code
    assert ("mend it" in result.stdout) == missing == ("the third" in result.stderr)
    as_json = fedmoe("doctor", "--json")
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout)["healthy"] is not missing


def test_the_whole_examination_speaks_of_everything(fedmoe):
    seen = json.loads(fedmoe("doctor", "--json").stdout)
    names = {c["name"] for c in seen["checks"]}
    assert {"Python", "threads", "GPU", "Fashion-MNIST", "Ray", "Chromium", "disk"} <= names
    assert {"MNIST", "HAPT", "vowels", "Shakespeare"} <= names
    assert all(c["mend"] for c in seen["checks"] if c["state"] != "good")
