"""Ablations: each variant differs from its method in what it says, and all can be run."""

import json

import pytest

from fedmoe.experiments.definition import definition_of
from fedmoe.experiments.run import Spec, run_experiment
from fedmoe.experiments.table import default_rounds, find_experiment
from fedmoe.report.log import read_run
from fedmoe.report.rows import full_row
from simulations import ablate_methods, table_personal
from simulations.ablate_methods import BASE, JETS, SAYS, SETTINGS, TABLE, ablation_markdown
from simulations.tables import write_table

MAKERS = (ablate_methods.choices, ablate_methods.stages, ablate_methods.measures)
# What else follows from a variant's one change.
FOLLOWS = {
    "clients", "factory.hidden", "strategy.min_experts", "strategy.all_rows", "strategy.centred",
    "strategy.sharpness", "strategy.smooth_over", "plan.method",
}  # fmt: skip
# Variants that say so take another k besides.
SAY_K = {"8-experts", "32-experts", "k-2-averaged"}


def settings(e):
    made = definition_of(Spec("target", "method", 100, 20), e).settings
    return {name: value for name, value in made.items() if name != "method"}


@pytest.mark.parametrize("make", MAKERS)
def test_a_variant_differs_from_its_method_in_one_thing(fashion_mnist, make):
    runs = make(100, 20)
    assert next(iter(runs)) == "fedmoe" and all(e.method == m for m, e in runs.items())
    own = settings(runs["fedmoe"])
    seen = [own]
    for method, e in runs.items():
        if method == "fedmoe":
            continue
        other = settings(e)
        differs = {n for n in own.keys() | other.keys() if own.get(n) != other.get(n)}
        # A setting and the fields of its own value are one thing.
        own_fields = {n for n in differs if any(n.startswith(f"{m}.") for m in differs)}
        asked = {n for n in differs - own_fields - FOLLOWS if not n.startswith("plan.method.")}
        asked -= {"factory.k"} if method in SAY_K else set()
        assert len(asked or differs) == 1, (method, differs)
        assert other not in seen and "/" not in method  # names are names of folders
        seen.append(other)


def test_every_variant_is_told_in_words(fashion_mnist):
    for make, protocol in zip(MAKERS, SAYS, strict=True):
        assert make(100, 20).keys() == SAYS[protocol].keys()
    for s in SETTINGS:
        assert callable(find_experiment(s.target)) and (s.rounds or default_rounds(s.target))
    assert set(BASE) <= {s.protocol for s in SETTINGS} and set(BASE.values()) <= JETS.keys()


def rows(protocol, **validation):
    return [
        {
            "protocol": protocol, "method": m, "seed": 100, "rounds": 1, "num_clients": 2,
            "partition_hash": "abcd", "validation_mean": v, "personal_mean": v - 0.02,
            "clients_evaluated": 2,
            "experts_held_mean": 4.0, "bytes_total": 2**20, "num_experts_L": [16],
        }
        for m, v in validation.items()
    ]  # fmt: skip


def test_changes_are_in_points_of_validation_accuracy_and_from_the_method_as_it_is(tmp_path):
    names = {"kinship-0": 0.75, "fedmoe": 0.8}
    text = ablation_markdown(rows("domains", **names), "fedmoe")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[1] == "| fedmoe | as it is | 80.0 | - | 78.0 | 4 | 1.00 |"
    assert lines[2] == "| kinship-0 | one shared part for all | 75.0 | -5.0 | 73.0 | 4 | 1.00 |"
    write_table(TABLE, rows("domains", **names), {}, tmp_path)
    assert "`python -m simulations.ablate_methods`" in (tmp_path / "ablations.md").read_text()


def test_of_clients_who_come_later_the_served_accuracy_is_the_tests():
    served = {"unseen_mean": 0.6, "unseen_worst_tenth": 0.5, "unseen_by_client": {"9": 0.6}}
    own = [row | served for row in rows("heldout-weak", **{"k-1": 0.7, "k-4": 0.72})]
    lines = [x for x in ablation_markdown(own, "fedmoe").splitlines() if x.startswith("| k")]
    assert lines[0].startswith("| k-4 | four experts | 72.0 | - | 60.0 |")
    assert lines[1].startswith("| k-1 | one expert for a client | 70.0 | -2.0 | 60.0 |")


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, method",
    [
        (ablate_methods.choices, "gate-mass-full"),
        (ablate_methods.measures, "by-importance"),
    ],
)
def test_variants_run(fashion_mnist, tmp_path, make, method):
    rounds = 3 if method == "by-importance" else 2  # it explores for two
    small = table_personal._made_small(make(100, rounds)[method])
    run_experiment(small, tmp_path)
    row = full_row(read_run(tmp_path), "small")
    assert row["failures"] == row["refusals"] == 0 and row["closed"]
    assert 0 <= row["validation_mean"] <= 1
    assert json.dumps(row)
