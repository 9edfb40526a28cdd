import gc
import weakref
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.exchange.flower.client import answer
from fedmoe.exchange.flower.policy import QuorumError, RoundPolicy
from fedmoe.exchange.flower.post import BROKEN, FAILED, PARCEL, WORK, Post
from fedmoe.exchange.flower.records import post_of
from fedmoe.exchange.inprocess import in_process
from fedmoe.exchange.parcels import ParcelExchange
from fedmoe.exchange.personal import PersonalStore
from fedmoe.experiments.run import run_experiment
from fedmoe.state import split_state
from fedmoe.types import Assignment, ClientFailure, ClientUpdate, ExpertId, Job
from fedmoe.wire.codecs import BF16, Int8, TopK
from fedmoe.wire.packing import Codecs
from fedmoe.wire.parcel import Hello, pack_failure, pack_hello
from tests.exchange.flower.fake import World, asks_hello, error, said, worker

WHOLE = frozenset(ExpertId(0, e) for e in range(4))


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.gather()
    return world


def assignments(world, round=0, clients=range(4), **changes):
    model = split_state(world.experiment.factory())
    return {c: replace(Assignment(round, model, WHOLE), **changes) for c in clients}


def kinds(replies):
    return {r.client: type(r) for r in replies}


def of(replies, client):
    [reply] = [r for r in replies if r.client == client]
    return reply


def work_of(world, client):
    return lambda message: worker(world.clients[client])(message)


# The same result


@pytest.mark.parametrize("method", ["fedavg", "fedper", "fedmoe", "wide"])
def test_a_run_gives_the_same_bits_as_in_process(tmp_path, method):
    world = World(tmp_path, method)
    world.gather()
    there = run_experiment(
        world.experiment, tmp_path / "there", exchange=lambda told: world.exchange(on_client=told)
    )
    assert there == run_experiment(world.experiment, tmp_path / "here")
    assert not world.told("refused") and not world.told("failed") and not world.told("retried")


@pytest.mark.parametrize("up", [BF16(), Int8(), TopK(0.2)])
def test_codecs_with_an_error_give_the_same_bits_as_in_one_process(tmp_path, up):
    world = World(tmp_path, "wide")
    world.gather()
    made, codecs = world.experiment, {"down": Codecs.of(BF16()), "up": Codecs.of(up)}
    there = run_experiment(made, tmp_path / "there", exchange=lambda _: world.exchange(**codecs))
    parcels = ParcelExchange(
        in_process(made.factory, made.data.load, made.plan, made.schedule.seed),
        run="any",
        seed=made.schedule.seed,
        feedback=PersonalStore(tmp_path / "owed"),
        **codecs,
    )
    assert there == run_experiment(made, tmp_path / "here", exchange=lambda _: parcels)
    assert not world.told("failed") and not world.told("refused")


def test_the_order_of_replies_does_not_matter(tmp_path, world):
    held_back = {0, 1, 2}

    def slow(client):
        def handle(message):
            if client in held_back:
                held_back.discard(client)  # the last to be asked answers first
                return None
            return worker(world.clients[client])(message)

        return handle

    for c in world.clients:
        world.grid.nodes[100 + c] = slow(c)
    got = run_experiment(world.experiment, tmp_path / "there", exchange=lambda _: world.exchange())
    first = [client for client, _ in world.told("replied")][:4]
    assert first == [3, 0, 1, 2]
    assert got == run_experiment(world.experiment, tmp_path / "here")


def test_each_client_that_answered_is_told_of(world):
    told = []
    list(world.exchange(on_client=told.append)(assignments(world)))
    assert sorted(told) == [0, 1, 2, 3]


def test_nobody_is_asked_where_nobody_has_work(world):
    assert list(world.exchange()({})) == []


def test_messages_are_of_the_type_of_their_job(world):
    for job, kind in (
        (Job.TRAIN, "train"),
        (Job.SCOUT, "query"),
        (Job.EVALUATE, "evaluate"),
        (Job.SERVE, "evaluate"),
    ):
        list(world.exchange()(assignments(world, clients=[1], job=job)))
        assert world.grid.works()[-1].metadata.message_type == kind


# Memory


def test_one_decoded_update_is_alive_at_a_time(world):
    alive: set[int] = set()
    most = 0
    for reply in world.exchange()(assignments(world)):
        assert isinstance(reply, ClientUpdate)
        tensors = [*reply.model.shared.values()]
        for t in tensors:
            weakref.finalize(t, alive.discard, id(t))
            alive.add(id(t))
        most = max(most, len(alive))
        count = len(tensors)
        del reply, t, tensors
        gc.collect()
    assert most == count
    assert world.grid.largest_pull == 1


def test_equal_experts_of_several_clients_are_one_record(world):
    list(world.exchange()(assignments(world)))
    first, second = world.grid.works()[:2]
    assert first.content["expert.0.2"] is second.content["expert.0.2"]
    assert first.content["shared"] is second.content["shared"]


# Failures


def test_what_a_client_says_went_wrong_is_its_failure_in_the_same_words(world):
    world.grid.nodes[102] = lambda m: said(m, Post(FAILED, "ValueError: the disk is gone"))
    replies = list(world.exchange()(assignments(world)))
    assert of(replies, 2) == ClientFailure(2, "ValueError: the disk is gone")
    assert len(world.grid.works()) == 4  # it would be the same again


def test_a_failure_may_also_come_as_a_parcel(world):
    def handle(message):
        parcel = pack_failure(run="abc.1", client=2, round=0, reason="the roof is gone")
        return said(message, Post(PARCEL, "", parcel.manifest))

    world.grid.nodes[102] = handle
    assert of(list(world.exchange()(assignments(world))), 2).reason == "the roof is gone"


@pytest.mark.parametrize(
    "broken",
    [
        lambda m: error(m, 8, "ClientApp stopped responding."),
        lambda m: error(m, 2, "WorkerError"),
        lambda m: error(m, 3, "Message Unavailable"),
        lambda m: said(m, Post(BROKEN, "the worker of client 1 died over its work")),
    ],
)
def test_work_is_asked_for_again_where_a_process_broke(world, broken):
    left = [broken]

    def handle(message):
        return left.pop()(message) if left else worker(world.clients[1])(message)

    world.grid.nodes[101] = handle
    replies = list(world.exchange()(assignments(world)))
    assert kinds(replies) == dict.fromkeys(range(4), ClientUpdate)
    assert [c for c, _ in world.told("retried")] == [1]
    first, second = (m for m in world.grid.works() if m.metadata.dst_node_id == 101)
    assert post_of(first.content).manifest == post_of(second.content).manifest


def test_a_process_that_breaks_every_time_is_given_up(world):
    world.grid.nodes[101] = lambda m: error(m, 8, "ClientApp stopped responding.")
    replies = list(world.exchange(policy=RoundPolicy(retries=2))(assignments(world)))
    reason = of(replies, 1).reason
    assert reason == "error 8: ClientApp stopped responding. (asked 3 times)"
    assert world.clock.now >= 1 + 2  # retry_s, and twice as long


def test_a_client_whose_node_went_is_sent_the_same_again_when_it_is_back(world):
    def goes(message):
        del world.grid.nodes[103]
        return error(message, 5, "Node Unavailable")

    world.grid.nodes[103] = goes
    world.clock.at(50, lambda: world.grid.nodes.update({103: work_of(world, 3)}))
    assert kinds(world.exchange()(assignments(world))) == dict.fromkeys(range(4), ClientUpdate)
    assert [text for _, text in world.told("retried")] == ["error 5: Node Unavailable"]
    assert world.told("left") == [(3, "")]
    assert world.clock.now >= 50


def test_a_node_that_was_started_anew_is_asked_who_it_is_and_sent_its_work_again(world):
    # Its old process took the message with it, and Flower tells nobody.
    lost = []

    def handle(message):
        if not lost and not asks_hello(message):
            lost.append(message)
        return None if message in lost else work_of(world, 3)(message)

    world.grid.nodes[103] = handle
    world.clock.at(10, lambda: world.grid.since.update({103: "later"}))
    assert kinds(world.exchange()(assignments(world))) == dict.fromkeys(range(4), ClientUpdate)
    assert world.told("retried") == [(3, "its node was started anew")]
    assert sum(asks_hello(m) for m in world.grid.sent) == 5


def test_a_client_may_come_back_under_another_node(world):
    # As without authentication, where every start makes a node of its own.
    world.grid.nodes[103] = lambda message: None
    world.clock.at(10, lambda: world.grid.nodes.update({203: work_of(world, 3)}))
    assert kinds(world.exchange()(assignments(world))) == dict.fromkeys(range(4), ClientUpdate)
    assert world.roster.members[3].node.id == 203


# Refused by name


def test_a_second_answer_to_one_round_is_refused_as_a_duplicate(world):
    slow = []

    def handle(message):
        if not slow and not asks_hello(message):
            slow.append(message)
        if message in slow and world.clock.now < 15:
            return None
        return work_of(world, 3)(message)

    world.grid.nodes[103] = handle
    world.grid.nodes[102] = lambda m: work_of(world, 2)(m) if world.clock.now > 20 else None
    world.clock.at(10, lambda: world.grid.since.update({103: "later"}))
    replies = list(world.exchange()(assignments(world)))
    assert kinds(replies) == dict.fromkeys(range(4), ClientUpdate) and len(replies) == 4
    assert world.told("refused") == [(3, "duplicate: it has answered round 0 already")]


def test_an_answer_to_an_earlier_round_is_refused_as_stale_and_hurts_nobody(world):
    first = []

    def sleepy(message):
        if not first:
            first.append(message)
        if message is first[0]:
            return worker(world.clients[3])(message) if world.clock.now > 60 else None
        return worker(world.clients[3])(message)

    world.grid.nodes[103] = sleepy
    exchange = world.exchange(policy=RoundPolicy(deadline_s=30))
    early = list(exchange(assignments(world, 0)))
    assert of(early, 3) == ClientFailure(3, "no answer within 30 s")
    world.clock.now = 61
    replies = list(exchange(assignments(world, 1)))
    assert kinds(replies) == dict.fromkeys(range(4), ClientUpdate)
    assert world.told("refused") == [(3, "stale: it answers round 0")]


def replayed(world, client, **changes):
    """An answer of this client to other work than it was asked for."""
    there = World(world.clients[0].state.parent / "there")
    there.roster = there.new_roster(changes.pop("run", "abc.1"))
    there.clients[client] = replace(world.clients[client])
    recorded = []

    def handle(message):
        recorded.append(answer(post_of(message.content), there.clients[client]))
        return said(message, recorded[-1])

    there.grid.nodes[100 + client] = handle
    there.gather()
    list(there.exchange()(assignments(there, clients=[client], **changes)))
    return lambda message: said(message, recorded[-1])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"round": 5}, "stale: the parcel must be of round 0, got one of round 5"),
        ({"run": "abc.0"}, "ForeignError: the parcel must be of run 'abc.1', got one of 'abc.0'"),
    ],
)
def test_a_replayed_answer_is_refused_by_name(world, changes, words):
    world.grid.nodes[101] = replayed(world, 1, **changes)
    assert of(list(world.exchange()(assignments(world))), 1) == ClientFailure(1, words)
    assert world.told("refused") == [(1, words)]


def test_an_answer_to_other_values_of_the_same_round_is_stale(world):
    other = split_state(world.experiment.factory())
    other = replace(other, shared={n: t + 1 for n, t in other.shared.items()})
    world.grid.nodes[101] = replayed(world, 1, model=other)
    reason = of(list(world.exchange()(assignments(world))), 1).reason
    assert reason == "stale: the parcel answers other values than this round's"


def test_an_answer_in_the_name_of_another_client_is_foreign(world):
    world.grid.nodes[101] = replayed(world, 2)
    reason = of(list(world.exchange()(assignments(world))), 1).reason
    assert reason.startswith("ForeignError: the parcel must be of client 1, got one of client 2")


def test_an_answer_from_another_node_is_foreign(world):
    def handle(message):
        reply = work_of(world, 1)(message)
        reply.metadata.__dict__["_src_node_id"] = 999
        return reply

    world.grid.nodes[101] = handle
    reason = of(list(world.exchange()(assignments(world))), 1).reason
    assert reason == "foreign: node 999 answers what node 101 was asked"


def test_an_answer_to_nothing_is_foreign_and_nobodys_failure(world):
    def handle(message):
        reply = work_of(world, 1)(message)
        reply.metadata.__dict__["_reply_to_message_id"] = "of another run"
        world.grid.nodes[101] = work_of(world, 1)
        return reply

    world.grid.nodes[101] = handle
    exchange = world.exchange(policy=RoundPolicy(deadline_s=20))
    assert kinds(exchange(assignments(world)))[0] is ClientUpdate
    assert (None, "foreign: it answers what was never sent") in world.told("refused")


@pytest.mark.parametrize(
    "post",
    [
        Post(PARCEL),
        Post(PARCEL, "", b"\xff\xff"),
        Post(PARCEL, "", pack_hello(Hello(1, run="abc.1")).manifest),
        Post("work", "{}"),
        Post("hello"),
    ],
)
def test_a_malformed_answer_is_its_clients_failure(world, post):
    world.grid.nodes[101] = lambda message: said(message, post)
    replies = list(world.exchange()(assignments(world)))
    assert kinds(replies)[1] is ClientFailure
    assert [c for c, _ in world.told("refused")] == [1]


def test_a_message_of_another_kind_is_its_clients_failure(world):
    def handle(message):
        reply = work_of(world, 1)(message)
        del reply.content["fedmoe"]
        return reply

    world.grid.nodes[101] = handle
    reason = of(list(world.exchange()(assignments(world))), 1).reason
    assert reason.startswith("PostError: a message must hold a record 'fedmoe'")


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A world, and client 1's good answer in it."""
    world, got = World(tmp_path_factory.mktemp("any")), []
    world.gather()
    handle = work_of(world, 1)
    world.grid.nodes[101] = lambda m: got.append(post_of(handle(m).content)) or said(m, got[-1])
    list(world.exchange()(assignments(world, clients=[1])))
    return world, got[-1]


@settings(max_examples=300)
@given(st.data())
def test_whatever_a_client_answers_the_round_ends_with_an_update_or_a_failure(answered, data):
    world, good = answered
    manifest = bytearray(good.manifest)
    for _ in range(data.draw(st.integers(0, 3))):
        manifest[data.draw(st.integers(0, len(manifest) - 1))] ^= data.draw(st.integers(0, 255))
    groups = {
        g: {n: v[: data.draw(st.sampled_from([len(v), 0, 3]))] for n, v in values.items()}
        for g, values in good.groups.items()
        if data.draw(st.integers(0, 3))
    }
    post = Post(
        data.draw(st.sampled_from([PARCEL, PARCEL, PARCEL, FAILED, BROKEN, WORK])),
        data.draw(st.text(max_size=5)),
        bytes(manifest[: data.draw(st.sampled_from([len(manifest), len(manifest) // 2]))]),
        groups,
    )
    world.grid.nodes[101] = lambda message: said(message, post)
    [reply] = world.exchange(policy=RoundPolicy(quorum=0))(assignments(world, clients=[1]))
    assert reply.client == 1
    if isinstance(reply, ClientUpdate):
        assert all(t.isfinite().all() for t in reply.model.shared.values())


# Waiting


def test_a_round_goes_on_after_its_deadline_with_a_quorum(world):
    world.grid.nodes[100] = lambda message: None
    exchange = world.exchange(policy=RoundPolicy(deadline_s=30, quorum=0.75))
    replies = list(exchange(assignments(world)))
    assert of(replies, 0) == ClientFailure(0, "no answer within 30 s")
    assert sum(isinstance(r, ClientUpdate) for r in replies) == 3
    assert 30 <= world.clock.now < 32


def test_without_a_quorum_the_run_fails_by_name(world):
    world.grid.nodes[100] = world.grid.nodes[101] = lambda message: None
    exchange = world.exchange(policy=RoundPolicy(deadline_s=30, quorum=0.75))
    words = r"round 0: 3 of 4 clients must answer \(quorum 0.75\), and 2 did in 30 s; .*\[0, 1\]"
    with pytest.raises(QuorumError, match=words):
        list(exchange(assignments(world)))


def test_failures_count_against_the_quorum(world):
    for node in (100, 101, 102):
        world.grid.nodes[node] = lambda m: said(m, Post(FAILED, "ValueError: no"))
    with pytest.raises(QuorumError, match="2 of 4 clients must answer"):
        list(world.exchange()(assignments(world)))


def test_measuring_needs_no_quorum_and_does_not_wait_for_who_is_away(world):
    for node in (100, 101, 102):
        del world.grid.nodes[node]
    replies = list(world.exchange()(assignments(world, job=Job.EVALUATE, evaluate=True)))
    assert {r.client: getattr(r, "reason", "") for r in replies} == {
        0: "is not there",
        1: "is not there",
        2: "is not there",
        3: "",
    }
    assert world.clock.now >= RoundPolicy().absent_s


def test_guests_who_never_came_do_not_stop_a_run(world):
    del world.grid.nodes[103]
    scouts = assignments(world, clients=[3], job=Job.SCOUT)
    [reply] = world.exchange(guests=[3])(scouts)
    assert reply == ClientFailure(3, "is not there")


def test_a_round_with_more_clients_than_it_needs_ends_when_enough_have_answered(world):
    world.grid.nodes[102] = lambda message: None
    replies = list(world.exchange(policy=RoundPolicy(enough=0.75))(assignments(world)))
    assert sum(isinstance(r, ClientUpdate) for r in replies) == 3
    assert of(replies, 2).reason.startswith("no answer within 0 s")


def test_who_is_waited_for_is_told_now_and_then(world):
    world.grid.nodes[100] = lambda message: None
    del world.grid.nodes[101]
    list(world.exchange(policy=RoundPolicy(deadline_s=130))(assignments(world)))
    assert [text for _, text in world.told("waiting")] == ["for [0, 1]; not here: [1]"] * 2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"deadline_s": 0.0}, "deadline_s must be above 0 seconds, or None for none, got 0.0"),
        ({"quorum": 1.5}, "quorum must be between 0 and 1, got 1.5"),
        ({"enough": 0.2}, r"enough must be between quorum \(0.5\) and 1, got 0.2"),
        ({"retries": -1}, "retries must be 0 or more, got -1"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        RoundPolicy(**changes)


# What clients hold


@pytest.fixture
def wide(tmp_path):
    world = World(tmp_path, "wide")
    world.gather()
    return world


def down(world):
    """Bytes of the last message to client 0."""
    return [e.nbytes for e in world.events if e.kind == "sent" and e.client == 0][-1]


def test_a_client_is_not_sent_what_it_has(wide):
    exchange = wide.exchange()
    list(exchange(assignments(wide, 0)))
    full = down(wide)
    list(exchange(assignments(wide, 1)))
    assert down(wide) < full / 2


def test_a_client_that_lost_its_cache_is_sent_everything(wide):
    exchange = wide.exchange()
    list(exchange(assignments(wide, 0)))
    full = down(wide)
    for path in (wide.clients[0].state / "cache").iterdir():
        path.write_bytes(b"damaged")
    replies = list(exchange(assignments(wide, 1)))
    assert kinds(replies) == dict.fromkeys(range(4), ClientUpdate)
    assert wide.told("missed") == [(0, "lacks 4 groups")]
    assert down(wide) >= full
    assert not wide.told("refused")


def test_a_client_that_comes_in_a_later_run_still_has_its_experts(wide):
    list(wide.exchange()(assignments(wide, 0)))
    full = down(wide)
    wide.roster = wide.new_roster("xyz.7")
    wide.gather()
    list(wide.exchange()(assignments(wide, 0)))
    assert down(wide) < full / 2
