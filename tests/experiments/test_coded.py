"""Runs whose messages are coded: what is trained on, kept and counted."""

from dataclasses import replace

import pytest

from fedmoe.experiments import run as run_module
from fedmoe.experiments.experiment import Experiment, with_budgets
from fedmoe.experiments.run import run_experiment
from fedmoe.federated.cohort import TRAINERS
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import fedper
from fedmoe.federated.rounds import Schedule
from fedmoe.report.log import read_run
from fedmoe.state import split_state
from fedmoe.wire.codecs import BF16, Int8, TopK
from fedmoe.wire.packing import Codecs, pack_assignment
from fedmoe.wire.parcel import parcel_bytes
from tests.exchange.flower.runs import is_stem, wide
from tests.tiny import experiment, federated_data

INT8 = Codecs.of(Int8())


def fedavg(**changes):
    return replace(experiment(factory=wide), **changes)


def fedmoe(**changes):
    """On devices of two sizes, with a personal stem."""
    base = fedavg(method="fedmoe", strategy=FedMoE(smooth_over=1, patience=1))
    small = with_budgets(base.data, split_state(wide()), (0.25, 0.5))
    schedule = Schedule(3, seed=5, clients_per_round=3, evaluate_every=2)
    plan = fedper(is_stem, base.plan)
    return replace(base, clients=small, plan=plan, schedule=schedule, **changes)


def rounds_of(folder):
    return [replace(r, seconds=0.0) for r in read_run(folder).rounds]


def but_bytes(rounds):
    return [replace(r, bytes_down=0, bytes_up=0, bytes_once=0) for r in rounds]


def kept(folder):
    paths = sorted(p for name in ("personal", "owed") for p in (folder / name).rglob("*.safetens*"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("make", [fedavg, fedmoe])
def test_parcels_of_exact_numbers_give_the_bits_of_none(make, trainer, tmp_path, monkeypatch):
    plain = run_experiment(make(), tmp_path / "plain", trainer=trainer)
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "coded", True)
        assert run_experiment(make(), tmp_path / "parcels", trainer=trainer) == plain
    logs = [rounds_of(tmp_path / name) for name in ("plain", "parcels")]
    assert but_bytes(logs[0]) == but_bytes(logs[1])
    assert kept(tmp_path / "plain") == kept(tmp_path / "parcels")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_clients_train_on_what_they_decode(trainer, tmp_path):
    plain = run_experiment(fedavg(), tmp_path / "plain", trainer=trainer)
    for way in ("down", "up"):
        one, two = (
            run_experiment(fedavg(**{way: INT8}), tmp_path / f"{way}{i}", trainer=trainer)
            for i in range(2)
        )
        assert one == two != plain
        assert rounds_of(tmp_path / f"{way}0") == rounds_of(tmp_path / f"{way}1")


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("up", [INT8, Codecs.of(TopK(0.2))], ids=["int8", "top-k"])
@pytest.mark.parametrize("hook", ["on_client", "on_round"])
def test_a_coded_run_that_is_killed_ends_like_one_that_was_not(hook, up, tmp_path):
    made = fedmoe(down=INT8, up=up)
    calls = []
    wanted = run_experiment(made, tmp_path / "whole", **{hook: calls.append})
    owed = {name for name in kept(tmp_path / "whole") if name.startswith("owed")}
    assert bool(owed) == up.remembers
    for at in range(1, len(calls), 2):
        left, folder = iter(range(at)), tmp_path / str(at)

        def kill(_, left=left):
            if next(left, None) is None:
                raise Killed

        with pytest.raises(Killed):
            run_experiment(made, folder, **{hook: kill})
        assert run_experiment(made, folder, resume=True) == wanted
        assert rounds_of(folder) == rounds_of(tmp_path / "whole")
        assert kept(folder) == kept(tmp_path / "whole")


def bytes_sent_first(e):
    """By client, the parcels of the first round, where everybody is sent the whole model."""
    state = e.strategy.init(split_state(e.factory()), e.clients)
    given = e.strategy.assign(state, e.clients)
    codecs = {"codecs": e.down, "reply": e.up}
    return {
        c: parcel_bytes(
            pack_assignment(replace(a, evaluate=True), run="simulated", client=c, **codecs)
        )
        for c, a in given.items()
    }


def test_bytes_are_those_of_the_parcels(tmp_path, monkeypatch):
    seen = []

    class Seen(run_module.ParcelTraffic):
        def watch(self, client, way, parcel):
            seen.append((way, parcel_bytes(parcel)))
            super().watch(client, way, parcel)

    def cut(record):
        moved = tuple(sum(n for way, n in seen if way == w) for w in ("down", "up"))
        assert (record.bytes_down, record.bytes_up) == moved
        assert min(moved) > 0
        seen.clear()

    monkeypatch.setattr(run_module, "ParcelTraffic", Seen)
    e = fedavg(down=INT8, up=INT8)
    run_experiment(e, tmp_path / "coded", on_round=cut)
    run_experiment(fedavg(), tmp_path / "plain")
    coded, plain = (read_run(tmp_path / name).rounds for name in ("coded", "plain"))
    assert coded[0].bytes_down == sum(bytes_sent_first(e).values())
    # The four experts' 450 numbers each, of 4 bytes, are most of what travels.
    assert all(c.bytes_down < 0.6 * p.bytes_down for c, p in zip(coded, plain, strict=True))
    assert all(c.bytes_up < 0.6 * p.bytes_up for c, p in zip(coded[:3], plain[:3], strict=True))


def test_who_drops_out_was_sent_its_parcel(tmp_path):
    e = fedavg(down=INT8, up=INT8, schedule=Schedule(1, seed=3, drop_out=0.5))
    lost = e.schedule.drop_outs(0, e.clients)
    assert 0 < len(lost) < 4
    run_experiment(e, tmp_path)
    first = read_run(tmp_path).rounds[0]
    assert {f.client: f.reason for f in first.failed} == dict.fromkeys(lost, "dropped out")
    assert first.bytes_down == sum(bytes_sent_first(e).values())


def test_bytes_of_who_comes_after_the_run_are_its_own(tmp_path):
    six = federated_data(6)
    e = fedavg(down=INT8, up=INT8, data=six, clients=six.clients[:4])
    run_experiment(e, tmp_path / "alone")
    run_experiment(replace(e, unseen=six.clients[4:]), tmp_path / "guests")
    alone, guests = (read_run(tmp_path / name).rounds[-1] for name in ("alone", "guests"))
    assert (alone.bytes_down, alone.bytes_up) == (guests.bytes_down, guests.bytes_up)
    for m in guests.unseen.values():  # each was sent what one of the four was
        assert abs(m["bytes_down"] - alone.bytes_down / 4) < 10 and m["bytes_up"] > 0


@pytest.mark.parametrize("codecs", [Codecs.of(TopK()), Codecs(BF16(), TopK())], ids=str)
def test_what_goes_down_must_leave_nothing_out(codecs):
    with pytest.raises(ValueError, match="down must not leave anything out"):
        fedavg(down=codecs)
