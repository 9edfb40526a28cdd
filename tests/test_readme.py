"""The README shows the house as it is, and its example runs."""

import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

from fedmoe.report.rows import read_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_file_of_the_library_has_its_place_in_the_tree():
    files = [p for p in (ROOT / "fedmoe").rglob("*.py") if p.name != "__init__.py"]
    files += [p for p in (ROOT / "simulations").glob("*.py") if p.name != "__init__.py"]
    assert len(files) > 20
    assert [str(p.relative_to(ROOT)) for p in files if p.name not in README] == []


def test_every_python_file_that_the_tree_names_exists():
    tree = README.split("## The house")[1].split("```")[1]
    names = re.findall(r"[\w/]+\.py\b", tree)
    folders = ("fedmoe", "server", "client", "simulations")
    known = {str(p) for folder in folders for p in (ROOT / folder).rglob("*.py")}
    assert len(names) > 20
    assert [n for n in names if not any(k.endswith(f"/{n}") for k in known)] == []


def test_the_lines_for_anybodys_own_flower_apps_are_those_that_a_test_runs():
    tested = (ROOT / "tests/exchange/flower/test_own_apps.py").read_text(encoding="utf-8")
    run = {line.strip().replace("tmp_path / ", "") for line in tested.splitlines()}
    shown = re.findall(r"```py\n(.*?)```", README, flags=re.DOTALL)
    assert len(shown) == 2
    lines = [line.strip() for block in shown for line in block.splitlines()]
    assert [line for line in lines if line not in run] == []
    assert all(len([line for line in block.splitlines() if line]) <= 15 for block in shown)


def test_the_accuracies_are_those_of_the_results():
    own = {"fedmoe", "fedmoe-int8", "fedmoe-mean", "fedmoe-norm"}
    found = defaultdict(lambda: defaultdict(list))
    for row in read_rows(ROOT / "simulations/results/personal.json"):
        if not (row.get("published") or row["control"]):
            found[row["protocol"]][row["method"]].append(100 * row["personal_mean"])
    table = README.split("| protocol |")[1].split("\n\n")[0].splitlines()
    columns = re.findall(r"`([\w-]+)`", table[0])
    protocols = {line.split("*")[1]: line for line in table[2:]}
    assert protocols.keys() == {p for p, m in found.items() if len(m["fedmoe"]) == 3}
    for protocol, line in protocols.items():
        means = {m: fmean(v) for m, v in found[protocol].items() if len(v) == 3}
        others = max((m for m in means if m not in own), key=means.__getitem__)
        shown = re.findall(r"\d+\.\d", line)
        assert shown == [f"{means[m]:.1f}" for m in (*columns, others)], protocol
        assert line.endswith(f"| `{others}` {shown[-1]} |")


@pytest.mark.slow
def test_the_example_runs_and_gives_every_client_a_sub_moe(capsys):
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    held = eval(capsys.readouterr().out)
    assert sorted(held) == list(range(6))
    assert all(1 <= len(experts) < 16 for experts in held.values())
