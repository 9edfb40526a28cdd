"""A run whose every message is bytes on the way: the same run, and what its codecs make of it."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from fedmoe.checkpoint import content_hash
from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.parcels import ParcelExchange, coding_generator
from fedmoe.exchange.personal import PersonalStore
from fedmoe.experiments.run import without
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import LocalPlan, Phase, fedper
from fedmoe.federated.rounds import Schedule, run_rounds
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.init import seeded
from fedmoe.nn.moe import MoE
from fedmoe.state import split_state
from fedmoe.types import Assignment, ClientFailure, ClientInfo, Job
from fedmoe.wire.cache import ExpertCache
from fedmoe.wire.codecs import BF16, Int8, TopK
from fedmoe.wire.packing import Codecs
from fedmoe.wire.parcel import kind_of, parcel_bytes
from tests.tiny import CLASSES, IN, client_data

WIDTH = 32
CLIENTS = tuple(ClientInfo(k, num_examples=12) for k in range(4))
PLAN = LocalPlan((Phase(epochs=1),), lr=0.1, batch_size=5)
LOSSY = (BF16(), Int8(), TopK(0.2))


class Wide(nn.Module):
    """As `Tiny`, but with tensors that are worth coding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(IN, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        experts = {e: FFN(WIDTH, 8, CLASSES) for e in range(4)}
        self.head = MoE(TopKGate(WIDTH, 4, 1), experts, 4)

    def forward(self, x_NI):
        return self.head(self.norm(self.stem(x_NI)).tanh())


def wide():
    return seeded(Wide, 0)


def is_stem(name):
    return name.startswith("stem.")


def run(tmp_path, wrap, strategy=FedAvg(), plan=PLAN, rounds=2, schedule=None):  # noqa: B008
    """The hash of what a run ends with; every client must have answered every time."""
    reports = []
    store = PersonalStore(tmp_path / "personal") if plan.stores else None
    exchange = wrap(in_process(wide, client_data, plan, 0, store=store))
    state = run_rounds(
        strategy,
        strategy.init(split_state(wide()), CLIENTS),
        CLIENTS,
        exchange,
        schedule or Schedule(rounds),
        prepare=partial(without, personal=plan.personal),
        after_round=reports.append,
    )
    assert not any(r.failed or r.refused for r in reports)
    return content_hash(state)


def plainly(exchange):
    return exchange


METHODS = {
    "fedavg": {},
    "fedmoe": {"strategy": FedMoE(), "rounds": 3},
    "fedper": {"plan": fedper(is_stem, PLAN)},
    "some clients a round": {"schedule": Schedule(4, clients_per_round=2)},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("with_cache", [False, True], ids=["no cache", "cache"])
def test_exact_codecs_give_the_same_model_bit_for_bit(method, with_cache, tmp_path):
    caches = (lambda k: ExpertCache(tmp_path / f"cache-{k}")) if with_cache else lambda k: None
    parcels = partial(ParcelExchange, run="r", seed=0, caches=caches)
    wanted = run(tmp_path / "plain", plainly, **METHODS[method])
    assert run(tmp_path / "parcels", parcels, **METHODS[method]) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("codec", LOSSY, ids=str)
def test_a_run_with_codecs_is_repeated_bit_for_bit_and_is_another_than_without(codec, tmp_path):
    down = Codecs.of(Int8()) if codec.remembers else Codecs.of(codec)

    def once(name):
        wrap = partial(
            ParcelExchange,
            run=name,
            seed=0,
            down=down,
            up=Codecs.of(codec),
            feedback=PersonalStore(tmp_path / name),
        )
        return run(tmp_path, wrap)

    assert once("first") == once("second") != run(tmp_path, plainly)


def test_one_message_goes_down_and_one_up_and_codecs_make_them_smaller(tmp_path):
    sizes = {}
    for name, codecs in {"raw": Codecs(), "int8": Codecs.of(Int8())}.items():
        seen, total = Counter(), Counter()

        def watch(client, way, parcel, seen=seen, total=total):
            seen[client, way, kind_of(parcel)] += 1
            total[way] += parcel_bytes(parcel)

        run(tmp_path, partial(
            ParcelExchange, run="r", seed=0, down=codecs, up=codecs, watch=watch
        ))  # fmt: skip
        assert set(seen.values()) == {3}  # two rounds and the evaluation at the end
        assert set(seen) == {(k, *way) for k in range(4)
                             for way in (("down", "assignment"), ("up", "update"))}  # fmt: skip
        sizes[name] = total
    # Names and small tensors take their part in a model as small as this.
    assert all(sizes["int8"][way] < 0.6 * sizes["raw"][way] for way in ("down", "up"))


def test_a_client_that_loses_its_cache_is_sent_everything(tmp_path):
    kinds = Counter()
    turns = iter(range(1000))

    def forgetful(client):
        """Another empty folder each time that the client looks."""
        return ExpertCache(tmp_path / f"{next(turns)}")

    def watch(client, way, parcel):
        kinds[way, kind_of(parcel)] += 1

    same_model = Assignment(0, split_state(wide()), frozenset(split_state(wide()).experts))
    exchange = ParcelExchange(
        in_process(wide, client_data, PLAN, 0), run="r", seed=0, caches=forgetful, watch=watch
    )
    for round in range(2):
        asked = replace(same_model, round=round, job=Job.EVALUATE, evaluate=True)
        [reply] = exchange({1: asked})
        assert "received_test" in reply.metrics
    # What it held when it answered is what it is thought to hold; it held nothing.
    assert kinds == {("down", "assignment"): 2, ("up", "update"): 2}

    class Fading:
        """A cache that forgets between its answer and the next round."""

        full, held_once = ExpertCache(tmp_path / "full"), False

        def put(self, sealed):
            self.full.put(sealed)

        def get(self, hash):
            return None

        def held(self):
            return self.full.held()

    kinds.clear()
    exchange = ParcelExchange(
        in_process(wide, client_data, PLAN, 0),
        run="r", seed=0, caches=lambda k: Fading(), watch=watch,
    )  # fmt: skip
    for round in range(2):
        [reply] = exchange({1: replace(same_model, round=round)})
        assert reply.metrics
    assert kinds == {("down", "assignment"): 3, ("up", "miss"): 1, ("up", "update"): 2}


def test_a_client_that_fails_is_a_failure_with_its_reason():
    def broken(client):
        raise RuntimeError("no disk")

    exchange = ParcelExchange(in_process(wide, broken, PLAN, 0), run="r", seed=0)
    asked = Assignment(0, split_state(wide()), frozenset(split_state(wide()).experts))
    assert list(exchange({2: asked})) == [ClientFailure(2, "RuntimeError: no disk")]


def test_an_update_that_cannot_be_coded_is_a_failure():
    def sick(assignments):
        for client, a in assignments.items():
            [update] = in_process(wide, client_data, PLAN, 0)({client: a})
            nan = {n: torch.full_like(t, torch.nan) if t.is_floating_point() else t
                   for n, t in update.model.shared.items()}  # fmt: skip
            yield replace(update, model=replace(update.model, shared=nan))

    asked = Assignment(0, split_state(wide()), frozenset(split_state(wide()).experts))
    for up in (Codecs(), Codecs.of(Int8())):
        [failure] = ParcelExchange(sick, run="r", seed=0, up=up)({2: asked})
        assert failure.client == 2 and "finite" in failure.reason


def test_codecs_that_leave_something_out_need_a_place_to_keep_it():
    with pytest.raises(ValueError, match="feedback must not be None"):
        ParcelExchange(plainly, run="r", seed=0, up=Codecs(experts=TopK()))


def test_rounding_has_draws_of_its_own_for_every_round_and_client():
    keys = [(0, 1, 2), (0, 2, 1), (0, 1, 3), (1, 1, 2)]
    draws = {tuple(torch.rand(3, generator=coding_generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)
