from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PIN_LINES = [line for line in LINES if line and not line.startswith("#")]


def pins() -> dict[str, Version]:
    pairs = [line.split("==") for line in PIN_LINES]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("line", PIN_LINES)
def test_a_constraint_is_one_exact_version_from_any_index(line):
    assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)  # no URL, path or +local


def test_no_package_is_pinned_twice():
    assert len(pins()) == len(PIN_LINES)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_the_pinned_version_of_a_dependency_lies_within_its_bounds(requirement):
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_a_dependency_has_a_lower_and_an_upper_bound(requirement):
    operators = {s.operator for s in requirement.specifier}
    assert operators >= {">=", "<"} or operators == {"=="}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    run = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = out.iterdir()
    return zipfile.ZipFile(path)


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_puts_fedmoe_alone_into_site_packages(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"fedmoe", f"fedmoe-{PROJECT['version']}.dist-info"}


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_holds_every_file_of_the_library_and_its_licence(wheel):
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fedmoe").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = set(wheel.namelist())
    assert here <= packed
    assert "fedmoe/py.typed" in packed
    assert f"fedmoe-{PROJECT['version']}.dist-info/licenses/LICENSE" in packed


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_brings_the_commands_and_every_one_of_them_exists(wheel):
    text = wheel.read(f"fedmoe-{PROJECT['version']}.dist-info/entry_points.txt").decode()
    assert dict(re.findall(r"^(\S+) = (\S+)$", text, re.M)) == PROJECT["scripts"]
    for target in PROJECT["scripts"].values():
        module, function = target.split(":")
        code = f"import importlib; assert callable(importlib.import_module('{module}').{function})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
