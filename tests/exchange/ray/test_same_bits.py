"""Runs over actors beside the same runs in process. One Ray and three actors serve them all."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedmoe.exchange.actors import Actors
from fedmoe.exchange.parcels import ParcelExchange, ParcelTraffic
from fedmoe.exchange.personal import PersonalStore
from fedmoe.exchange.ray.exchange import ActorExchange, in_actors
from fedmoe.experiments.run import run_experiment
from fedmoe.federated.folding import folds
from fedmoe.report.log import read_run
from fedmoe.wire.codecs import Int8
from fedmoe.wire.packing import Codecs
from tests.exchange.ray.runs import BROKEN, folded, personal, whole

pytestmark = pytest.mark.slow

BUILDS = [folded, whole]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Runs in process, by name, and the folder with orders to die."""
    root = tmp_path_factory.mktemp("there")
    (root / "orders").mkdir()
    for build in BUILDS:
        run_experiment(personal(build(root / "orders")), root / build.__name__)
    return root


@pytest.fixture(scope="module")
def crew(there):
    """Three actors, for clients that keep what is theirs in `there / "own"`."""
    e = personal(folded(there / "orders"))
    store = PersonalStore(there / "own")
    with in_actors(
        e.factory, e.data.load, e.plan, e.schedule.seed, Actors(3), store=store, data_bytes=0
    ) as exchange:
        yield exchange.crew


@pytest.fixture
def own(there):
    yield there / "own"
    for folder in (there / "own").glob("client-*"):  # the next run begins anew
        shutil.rmtree(folder)


def log(folder):
    """All that a run's log says, but how long it took."""
    return [replace(r, seconds=0.0) for r in read_run(folder).rounds]


def own_files(folder):
    paths = sorted(folder.rglob("*.safetensors"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_only_one_of_these_strategies_folds():
    assert [folds(build(Path()).strategy) for build in BUILDS] == [True, False]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_actors_gives_the_bits_of_one_process(
    count, build, there, crew, own, tmp_path, monkeypatch
):
    monkeypatch.setattr(crew, "seats", crew.seats[:count])
    monkeypatch.setattr(crew, "moved", {})
    told = []
    exchange = ActorExchange(crew, told.append)
    e = personal(build(there / "orders"))
    run_experiment(e, tmp_path, exchange=lambda on_client: exchange)
    assert log(tmp_path) == log(there / build.__name__)
    assert own_files(own) == own_files(there / build.__name__ / "personal")
    assert {c.id for c in e.clients} == set(told)


def test_a_run_that_was_begun_in_process_goes_on_over_actors_with_the_same_bits(
    there, crew, own, tmp_path
):
    def stop(record):
        if record.round == 1:
            raise KeyboardInterrupt

    e = personal(folded(there / "orders"))
    with pytest.raises(KeyboardInterrupt):
        run_experiment(e, tmp_path, on_round=stop)
    for of_client in (tmp_path / "personal").iterdir():
        shutil.copytree(of_client, own / of_client.name)
    exchange = ActorExchange(crew, lambda client: None)
    run_experiment(e, tmp_path, resume=True, exchange=lambda on_client: exchange)
    assert log(tmp_path) == log(there / "folded")


def test_parcels_give_over_actors_the_bits_of_one_process(there, crew, own, tmp_path):
    codecs = {"down": Codecs.of(Int8()), "up": Codecs.of(Int8())}
    e = replace(personal(folded(there / "orders")), **codecs)
    wanted, traffic = run_experiment(e, tmp_path / "here"), ParcelTraffic()
    parcels = ParcelExchange(
        ActorExchange(crew, lambda client: None),
        run="simulated",
        seed=e.schedule.seed,
        watch=traffic.watch,
        **codecs,
    )
    end = run_experiment(
        e, tmp_path / "there", exchange=lambda on_client: parcels, traffic=traffic.take
    )
    assert end == wanted and log(tmp_path / "there") == log(tmp_path / "here")


@pytest.mark.parametrize("build", BUILDS)
def test_an_actor_that_is_killed_is_replaced_and_nothing_is_lost_or_counted_twice(
    build, there, crew, own, tmp_path
):
    orders = there / "orders"
    before = set(crew.pids())

    def kill(record):
        if record.round == 0:
            (orders / "3-").touch()  # whoever loads client 3 in the next round dies

    exchange = ActorExchange(crew, lambda client: None)
    run_experiment(
        personal(build(orders)), tmp_path, exchange=lambda on_client: exchange, on_round=kill
    )
    assert not list(orders.iterdir())
    assert len(before & set(crew.pids())) == 2
    assert log(tmp_path) == log(there / build.__name__)
    assert own_files(own) == own_files(there / build.__name__ / "personal")


def test_a_client_that_brings_about_the_death_of_every_actor_is_given_up_alone(
    there, crew, own, tmp_path
):
    orders = there / "orders"
    e = personal(folded(orders))
    e = replace(e, schedule=replace(e.schedule, rounds=1, clients_per_round=None, drop_out=0.0))
    # One that waited before it may be blamed for its first death, so more than it takes.
    for i in range(6):
        (orders / f"3-{i}").touch()

    class HealedAtTheEnd(ActorExchange):
        def __call__(self, assignments):
            for order in orders.glob("3-*"):
                order.unlink()
            return super().__call__(assignments)

    exchange = HealedAtTheEnd(crew, lambda client: None)
    run_experiment(e, tmp_path, exchange=lambda on_client: exchange)
    failed = {f.client: f.reason for f in log(tmp_path)[0].failed}
    assert failed.keys() == {3} and "3 actors died at its work" in failed[3]
    final = log(tmp_path)[-1]
    assert {f.client: f.reason for f in final.failed} == {BROKEN: "OSError: the disk is gone"}
    assert list(final.clients) == [c.id for c in e.clients]
