from dataclasses import replace

import pytest

from fedmoe.exchange.flower.client import Client, answer
from fedmoe.exchange.flower.post import BROKEN, FAILED, PARCEL, Post
from fedmoe.exchange.flower.records import post_of
from fedmoe.exchange.flower.roster import GatherError
from fedmoe.wire import parcel
from tests.exchange.flower.fake import World, error, said, worker


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def nodes(world):
    return {c: m.node.id for c, m in world.roster.members.items()}


def look(world, seconds=1.0):
    world.clock.sleep(seconds)
    world.roster.look()


def test_nodes_say_which_clients_they_are(world):
    world.gather()
    assert nodes(world) == {0: 100, 1: 101, 2: 102, 3: 103}
    assert world.roster.members[2].num_examples == 12
    assert sorted(c for c, _ in world.told("hello")) == [0, 1, 2, 3]


def test_a_node_is_asked_once(world):
    world.gather()
    for _ in range(5):
        look(world)
    assert len(world.grid.sent) == 4


def test_nodes_are_looked_for_now_and_then_only(world):
    world.gather()
    asked = []
    found = world.grid.get_nodes
    world.grid.get_nodes = lambda: asked.append(1) or found()
    for _ in range(10):
        look(world, 0.1)
    assert len(asked) <= 3


def test_a_client_that_comes_late_is_waited_for(world):
    late = world.grid.nodes.pop(102)
    world.clock.at(30, lambda: world.grid.nodes.update({102: late}))
    world.gather()
    assert len(nodes(world)) == 4 and world.clock.now >= 30


def test_a_node_that_leaves_is_not_reachable_until_it_is_back(world):
    world.gather()
    handle = world.grid.nodes.pop(101)
    look(world)
    assert world.roster.reachable(1) is None and world.roster.reachable(0) is not None
    world.grid.nodes[101] = handle
    look(world)
    assert world.roster.reachable(1) is not None
    assert len(world.grid.sent) == 4  # it was not started anew, so it has what it had


def test_two_nodes_cannot_be_one_client(world, tmp_path):
    world.gather()
    impostor = Client(2, tmp_path / "elsewhere")
    world.grid.nodes[300] = worker(impostor)
    look(world)
    assert nodes(world)[2] == 102
    assert world.roster.refused == {300: "says it is client 2, which is node 102"}


def test_the_second_of_two_has_its_turn_when_the_first_is_gone(world, tmp_path):
    world.gather()
    world.grid.nodes[300] = worker(Client(2, tmp_path / "elsewhere"))
    look(world)
    del world.grid.nodes[102]
    look(world)
    look(world)
    assert nodes(world)[2] == 300 and not world.roster.refused


def test_a_client_with_its_old_key_takes_its_old_place(world):
    world.gather()
    world.grid.nodes[300] = worker(world.clients[2])
    look(world)
    assert nodes(world)[2] == 300 and not world.roster.refused


def test_a_node_whose_key_is_registered_for_another_client_is_refused(world):
    world.grid.names |= {100: "client-0", 101: "client-7", 102: "the left one"}
    with pytest.raises(GatherError, match="says it is client 1, but its key is registered as 'cli"):
        world.gather()
    assert sorted(nodes(world)) == [0, 2, 3]


def test_a_client_that_the_run_does_not_have_is_refused(world, tmp_path):
    class Stranger:
        def __call__(self, message):
            hello = parcel.pack_hello(parcel.Hello(77, run="abc.1"))
            return said(message, Post(PARCEL, "", hello.manifest))

    world.grid.nodes[500] = Stranger()
    world.gather()
    look(world)
    assert world.roster.refused == {500: "says it is client 77, which this run does not have"}


def test_a_client_on_other_terms_is_refused_with_both_values(world):
    terms = replace(world.roster.terms, definition="0123456789abcdef")
    world.roster.terms = terms
    with pytest.raises(GatherError) as caught:
        world.gather()
    assert "4 clients were to come within 60 s, and 0 did ([]); node 100: TermsError" in str(
        caught.value
    )
    assert "'0123456789abcdef' at the server and '" in str(caught.value)


def test_a_client_of_another_version_is_refused_with_both_versions(world, monkeypatch):
    def older(message):
        monkeypatch.setattr(parcel, "__version__", "0.0.9")
        try:
            return said(message, answer(post_of(message.content), world.clients[1]))
        finally:
            monkeypatch.undo()

    world.grid.nodes[101] = older
    with pytest.raises(GatherError) as caught:
        world.gather()
    assert "VersionError" in str(caught.value)
    assert "0.0.9" in str(caught.value) and "0.1.0" in str(caught.value)


@pytest.mark.parametrize(
    "reply",
    [
        lambda m: error(m, 8, "ClientApp stopped responding."),
        lambda m: said(m, Post(BROKEN, "the worker died")),
    ],
)
def test_a_hello_that_broke_is_asked_for_again_after_a_while(world, reply):
    left = [reply]

    def handle(message):
        return left.pop()(message) if left else worker(world.clients[0])(message)

    world.grid.nodes[100] = handle
    world.gather()
    assert 5 <= world.clock.now < 10


@pytest.mark.parametrize(
    "post", [Post(FAILED, "ValueError: no data"), Post(PARCEL), Post("hello"), None]
)
def test_a_hello_that_makes_no_sense_is_refused(world, post):
    def handle(message):
        reply = said(message, post or Post(PARCEL))
        if post is None:
            del reply.content["fedmoe"]
        return reply

    world.grid.nodes[100] = handle
    with pytest.raises(GatherError, match="node 100: "):
        world.gather()
    assert sorted(nodes(world)) == [1, 2, 3]


def test_a_hello_to_another_run_is_foreign(world):
    hello = parcel.pack_hello(parcel.Hello(0, run="abc.0"))
    world.grid.nodes[100] = lambda m: said(m, Post(PARCEL, "", hello.manifest))
    with pytest.raises(GatherError, match="ForeignError: .*'abc.1', got one of 'abc.0'"):
        world.gather()


def test_fewer_may_be_enough_to_begin(world):
    del world.grid.nodes[103]
    world.gather(3)
    assert world.clock.now < 1


def test_who_waits_tells_now_and_then(world):
    del world.grid.nodes[103]
    world.clock.at(130, lambda: world.grid.nodes.update({103: worker(world.clients[3])}))
    world.roster.gather(world.clients, 4)
    assert [text for _, text in world.told("waiting")] == ["3 of 4 clients are here"] * 2
