"""The benchmark of what travels: what it counts, and the format of what it says."""

import json
from dataclasses import replace

import pytest
import torch

from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.rounds import Schedule
from fedmoe.types import Assignment, ExpertId
from fedmoe.wire.packing import pack_assignment
from fedmoe.wire.parcel import parcel_bytes, read_manifest
from simulations import bench_wire
from simulations.bench_wire import (
    CACHED,
    CASES,
    EXACT,
    REFERENCE,
    Traffic,
    chosen_accuracy,
    fewer,
    like_an_update,
    main,
    speed_rows,
    timed,
    traffic_rows,
)
from tests.tiny import experiment, one_layer

KEYS = {"case", "peer", "ours", "theirs", "unit", "ratio"}


def runs(seed=0, rounds=2):
    whole = experiment(schedule=Schedule(rounds, seed))
    return {
        "fedavg": whole,
        "fedmoe": replace(whole, method="fedmoe", strategy=FedMoE(min_experts=1)),
    }


def test_bytes_of_experts_are_their_numbers_and_what_the_manifest_says_of_them():
    a = Assignment(0, one_layer(1.0, 2.0, 3.0), frozenset({ExpertId(0, 0), ExpertId(0, 1)}))
    parcel = pack_assignment(a, run="r", client=1)
    traffic = Traffic()
    traffic.watch(1, "down", parcel)
    groups = [g for g in read_manifest(parcel).groups if g.name != "shared"]
    assert traffic.experts == {"down": 2 * 4 + sum(g.ByteSize() for g in groups), "up": 0}
    assert traffic.whole == {"down": parcel_bytes(parcel), "up": 0}


def test_a_client_uses_the_model_that_its_validation_part_prefers():
    metrics = {"received_validation": 0.5, "trained_validation": 0.5,
               "received_test": 0.1, "trained_test": 0.2}  # fmt: skip
    assert chosen_accuracy(metrics) == 0.1
    assert chosen_accuracy(metrics | {"trained_validation": 0.6}) == 0.2


def test_fewer_clients_are_the_first_ones():
    assert [c.id for c in fewer(runs()["fedavg"], 2).clients] == [0, 1]


@pytest.mark.slow
def test_every_case_is_compared_with_fedavg_and_every_codec_with_exact_numbers():
    rows = traffic_rows(runs(), CASES, seed=0)
    assert all(set(row) >= KEYS | {"seed"} for row in rows)
    by_unit = {}
    for row in rows:
        by_unit.setdefault(row["unit"], []).append(row["case"])
    names = [EXACT.name, CACHED, *(c.name for c in CASES[2:])]
    assert by_unit == {
        "bytes of experts a round": names,
        "bytes a round": names,
        "share right": [c.name for c in CASES[2:]],
    }
    for row in rows:
        if row["unit"] != "share right":
            assert row["peer"] == REFERENCE.name
            assert row["down"] > 0 and abs(row["down"] + row["up"] - row["ours"]) <= 2
            assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"], rel=1e-2)


def test_the_speed_of_every_codec_is_told_both_ways():
    rows = speed_rows(5000, turns=1)
    assert all(set(row) >= KEYS and row["ours"] > 0 for row in rows)
    assert {row["case"].split()[0] for row in rows} == {"encode", "decode"}
    assert len({row["case"] for row in rows}) == len(rows)
    by_case = {row["case"]: row for row in rows}
    assert by_case["encode BF16()"]["smaller"] == 2 and by_case["encode Raw()"]["error"] == 0
    assert 0 < by_case["encode BF16()"]["error"] < 2.0**-8


def test_a_tenth_of_the_numbers_that_are_coded_are_zero():
    x_N = like_an_update(10_000)
    assert 0.08 < float((x_N == 0).float().mean()) < 0.12
    assert torch.equal(x_N, like_an_update(10_000))


def test_steps_take_turns():
    order = []
    times = timed({name: lambda n=name: order.append(n) for name in "ab"}, turns=2)
    assert "".join(order) == "ab" * 3 and set(times) == {"a", "b"}


@pytest.mark.slow
def test_the_last_line_is_one_json_object(monkeypatch, capsys):
    monkeypatch.setattr(bench_wire, "domains", runs)
    monkeypatch.setattr(bench_wire, "NUMBERS", 5000)
    monkeypatch.setattr(bench_wire, "CASES", CASES[:3])
    main(["--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["bench"] == "wire"
    assert set(report) == {"bench", "machine", "allocator", "versions", "rows"}
    assert all(set(row) >= KEYS for row in report["rows"])
