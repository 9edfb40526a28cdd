"""Clients who come when the training is over: every method serves them, none sees their labels."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmoe.data.examples import Examples
from fedmoe.data.protocols import heldout as heldout_data
from fedmoe.experiments import unseen
from fedmoe.experiments.encoder import Recipe, common_expert, small_cnn, train_common_expert
from fedmoe.experiments.run import run_experiment
from fedmoe.experiments.unseen import Setup, specialisation
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.encoder import of_encoder
from fedmoe.report.log import read_run
from fedmoe.report.rows import full_row
from fedmoe.state import split_state, state_hash, take_names

HELDOUT = {
    "fedjets", "fedjets-from-encoder", "fedjets-found", "fedjets-fitted", "fedjets-fitted-found",
    "fedavg", "fedavg-from-encoder", "fedprox", "fedprox-from-encoder", "linear-head", "prototypes",
    "discriminant-head", "fedmix", "fedmoe", "fedjets-random-gate", "discriminant-chosen",
}  # fmt: skip
LIKE_FEDJETS = {"fedjets-from-encoder", "fedjets-found", "fedjets-random-gate"}
ON_ENCODER = {"linear-head", "prototypes", "discriminant-head", "discriminant-chosen"}
CONTROLS = {"fedjets-random-gate", "discriminant-chosen"}


def pictures(num: int = 1_200) -> Examples:
    """Grey pictures whose brightness in a place of its own tells the label."""
    g = torch.Generator().manual_seed(0)
    label = torch.arange(num) % 10
    image = torch.randint(0, 60, (num, 28, 28), generator=g, dtype=torch.uint8)
    for i, y in enumerate(label.tolist()):
        image[i, 2 * y : 2 * y + 4] += 150
    return Examples(image, label)


SOURCE = pictures()
SIZES = {"num_clients": 14, "unseen": 2, "train": 20, "validation": 4, "test": 12, "anchors": 5}


def small_setup(seed: int = 0, rounds: int = 1, experts: int = 5, k: int = 2) -> Setup:
    data = heldout_data(seed, **SIZES, source=SOURCE)
    some = data.load(data.unseen[0].id).test
    schedule = Schedule(rounds, seed, clients_per_round=6, evaluate_every=10)
    common = dict(small_cnn(1).state_dict())
    return Setup("small", seed, data, common, some, schedule, experts, k)


@pytest.fixture
def small(monkeypatch):
    """The experiments of the protocol, on a few clients with a few pictures each."""
    monkeypatch.setattr(unseen, "_setup", lambda *_: small_setup())
    monkeypatch.setattr(unseen, "ACTIVE", 6)


def test_all_that_fedjets_must_beat_is_there(small):
    runs = unseen.heldout()
    assert runs.keys() == HELDOUT
    assert {m for m, e in runs.items() if e.control} == CONTROLS
    for m, e in runs.items():
        assert e.method == m and len(e.unseen) == 2 and e.data.partition_hash
        assert not {c.id for c in e.unseen} & {c.id for c in e.clients}
        assert e.plan.method.full_test is not None  # each says how it does on every label


def test_methods_with_an_encoder_have_the_same_and_never_move_it(small):
    runs = unseen.heldout()
    encoders = {
        state_hash(take_names(split_state(e.factory()), of_encoder))
        for m, e in runs.items()
        if m in ON_ENCODER or m.startswith("fedjets")
    }
    assert len(encoders) == 1
    for m, e in runs.items():
        has_one = m in ON_ENCODER or m.startswith("fedjets")
        assert (e.plan.frozen is of_encoder) == (e.plan.prepare is not None) == has_one
    start = {m: state_hash(split_state(e.factory())) for m, e in runs.items()}
    assert start["fedavg"] == start["fedprox"] != start["fedavg-from-encoder"]
    assert start["fedavg-from-encoder"] == start["fedprox-from-encoder"]


def test_ablations_change_one_thing_each(small):
    runs = unseen.ablations(experts=5, k=2)
    assert [m for m in runs if m.startswith("k-")] == ["k-1", "k-2", "k-3", "k-5"]
    anchors = {m: len(e.strategy.anchors) for m, e in runs.items()}
    assert anchors.pop("no-anchors") == 0 and set(anchors.values()) == {5}
    assert runs["server-chooses"].strategy.chooses == "server"
    quotas = {m: [count for _, count in e.schedule.quotas] for m, e in runs.items()}
    assert quotas["anchors-only"] == [5, 1] and quotas["anchors-30-percent"] == [3, 3]
    assert quotas["no-anchors"] == [0, 6]  # there are five anchors, and six clients a round
    heads = sum(t.numel() for t in split_state(runs["experts-are-heads"].factory()).shared.values())
    whole = split_state(runs["k-2"].factory())
    assert heads == sum(t.numel() for t in whole.shared.values())  # gate and encoder
    from_encoder = split_state(runs["experts-from-encoder"].factory())
    some, other = (from_encoder.experts[e] for e in sorted(from_encoder.experts)[:2])
    assert all(torch.equal(some[n], other[n]) for n in some)  # all begin as the common expert


def test_k_above_m_and_an_encoder_of_another_width_are_told_by_their_numbers():
    setup = small_setup()
    e = unseen.fedjets(setup, "fedjets", k=6)
    with pytest.raises(ValueError, match="k must be at most the 5 experts, got 6"):
        e.strategy.init(split_state(e.factory()), e.clients)
    narrow = {n: t[:64] if t.shape[:1] == (128,) else t for n, t in setup.common.items()}
    with pytest.raises(ValueError, match=r"start must be of a CNN with 128 features: .* got \(64"):
        unseen.linear_head(replace(setup, common=narrow)).factory()


def test_an_anchor_without_labels_is_told_how_to_be_found():
    setup = small_setup()
    groups = {**setup.data.groups, 3: ""}
    nameless = replace(setup, data=replace(setup.data, groups=groups))
    with pytest.raises(ValueError, match="got none of client 3; find anchors by_means"):
        unseen.fedjets(nameless, "fedjets")
    assert len(unseen.fedjets(nameless, "fedjets-found", anchoring="means").strategy.anchors) == 5


def test_an_experiment_without_images_of_every_label_cannot_tell_experts_apart(small):
    e = unseen.heldout()["fedjets"]
    blind = replace(e, plan=replace(e.plan, method=replace(e.plan.method, full_test=None)))
    with pytest.raises(ValueError, match="full_test to tell experts by, got None"):
        specialisation(blind, split_state(e.factory()))


def test_experts_are_told_apart_by_label(small):
    e = unseen.heldout()["fedjets"]
    ours = specialisation(e, split_state(e.factory()))
    assert len(ours.accuracy_EC) == 5 and all(len(row) == 10 for row in ours.accuracy_EC)
    known = [row for row in ours.chosen_CE if row[0] == row[0]]  # nan: a label without images
    assert all(sum(row) == pytest.approx(1.0) for row in known) and 0 <= ours.gate_hit <= 1


def test_the_common_expert_is_trained_once_and_read_afterwards(tmp_path: Path, monkeypatch):
    images = Examples(SOURCE.x[:40, None].float() / 255, SOURCE.y[:40])
    monkeypatch.setattr("fedmoe.experiments.encoder.RECIPES", {"weak": Recipe(40, 1)})
    made = common_expert(3, "weak", folder=tmp_path, images=images)
    [file] = tmp_path.glob("*.safetensors")
    monkeypatch.setattr("fedmoe.experiments.encoder.train_common_expert", None)  # not again
    again = common_expert(3, "weak", folder=tmp_path, images=images)
    assert all(torch.equal(made[n], again[n]) for n in made) and file.exists()
    alone = train_common_expert(images, Recipe(40, 1), 3)
    assert all(torch.equal(made[n], alone[n]) for n in made)
    with pytest.raises(ValueError, match="quality must be among weak, got 'good'"):
        common_expert(3, "good", folder=tmp_path, images=images)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(HELDOUT - LIKE_FEDJETS))
def test_every_method_trains_and_serves_who_comes_later(small, tmp_path, method):
    e = unseen.heldout()[method]
    run_experiment(e, tmp_path)
    run = read_run(tmp_path)
    assert run.rounds[-1].unseen.keys() == {c.id for c in e.unseen}
    assert not run.rounds[-1].failed and not any(r.refused for r in run.rounds)
    row = full_row(run, "small")
    assert 0 <= row["unseen_mean"] <= 1 and 0 <= row["unseen_full_mean"] <= 1
    assert row["unseen_bytes_mean"] > 0
    if method == "fedmoe":  # just in time: what its unlabelled data activate, as far as it holds
        served = run.rounds[-1].unseen
        whole = sum(t.numel() * 4 for t in e.factory().state_dict().values())
        assert all(m["bytes_down"] < whole for m in served.values())
