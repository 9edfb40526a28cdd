"""The README shows the house as it is, and its example runs."""

import re
from pathlib import Path

import pytest

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
    known = {str(p) for folder in ("fedmoe", "simulations") for p in (ROOT / folder).rglob("*.py")}
    assert len(names) > 20
    assert [n for n in names if not any(k.endswith(f"/{n}") for k in known)] == []


@pytest.mark.slow
def test_the_example_runs_and_gives_every_client_a_sub_moe(capsys):
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    held = eval(capsys.readouterr().out)
    assert sorted(held) == list(range(6))
    assert all(1 <= len(experts) < 16 for experts in held.values())
