from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.exchange.flower.client import Client, answer, key_of, reply
from fedmoe.exchange.flower.post import BROKEN, FAILED, HELLO, KINDS, PARCEL, WORK, Post
from fedmoe.exchange.flower.records import content_of, post_of
from fedmoe.exchange.personal import PersonalStore
from fedmoe.experiments.table import make_experiment
from fedmoe.federated.local import work
from fedmoe.state import split_state, state_hash
from fedmoe.types import Assignment, ExpertId, Job
from fedmoe.wire.codecs import Int8, Raw, TopK
from fedmoe.wire.packing import Codecs, pack_assignment, unpack_update
from fedmoe.wire.parcel import Parcel, kind_of, pack_query, unpack_hello, unpack_miss
from tests.exchange.flower.fake import FakeGrid, spec_of, terms_of

EXACT = Raw()
WHOLE = frozenset(ExpertId(0, e) for e in range(4))


class Asked:
    """One client, asked by hand."""

    def __init__(self, folder, method="fedavg", id=1):
        self.spec = spec_of(method)
        self.experiment = make_experiment(self.spec)
        self.terms = terms_of(self.spec)
        self.client = Client(id, folder)

    def assignment(self, round=0, **changes):
        model = split_state(self.experiment.factory())
        return replace(Assignment(round, model, WHOLE), **changes)

    def post(self, assignment, known=(), up=EXACT):
        parcel = pack_assignment(
            assignment, run="abc.1", client=1, known=known, reply=Codecs.of(up)
        )
        return Post(WORK, self.terms.text, parcel.manifest, parcel.groups)

    def update(self, assignment, **options):
        post = answer(self.post(assignment, **options), self.client)
        assert post.kind == PARCEL, post.text
        return unpack_update(
            Parcel(post.manifest, post.groups), assignment, run="abc.1", client=1
        ).update

    def hello(self, **changes):
        query = pack_query(run="abc.1")
        text = replace(self.terms, **changes).text
        return answer(Post(HELLO, text, query.manifest), self.client)

    def worked(self, assignment, own=None):
        return work(
            1,
            assignment,
            self.experiment.factory,
            self.experiment.data.load(1),
            self.experiment.plan,
            own,
            0,
        )


@pytest.fixture
def asked(tmp_path):
    return Asked(tmp_path)


def test_a_client_says_who_it_is_and_what_it_has(asked):
    said = asked.hello()
    hello = unpack_hello(Parcel(said.manifest), run="abc.1")
    assert (hello.client, hello.num_examples, hello.held) == (1, 12, frozenset())
    assert hello.key == asked.client.key and len(hello.key) == 32


def test_a_clients_key_stays(tmp_path):
    assert key_of(tmp_path / "a") == key_of(tmp_path / "a") != key_of(tmp_path / "b")


def test_the_work_done_is_that_of_a_client_in_process(asked):
    wanted, _ = asked.worked(asked.assignment(3, evaluate=True))
    got = asked.update(asked.assignment(3, evaluate=True))
    assert state_hash(got.model) == state_hash(wanted.model)
    assert got.metrics == wanted.metrics and got.num_examples == 12
    assert torch.equal(got.profile.count_LE, wanted.profile.count_LE)


def test_what_a_client_keeps_is_kept_by_run_and_round(tmp_path):
    asked = Asked(tmp_path, "fedper")
    first, own = asked.worked(asked.assignment(0))
    second, _ = asked.worked(asked.assignment(1), own)
    for _ in range(2):  # asked again after the server was killed, it begins where it began before
        assert state_hash(asked.update(asked.assignment(0)).model) == state_hash(first.model)
        assert state_hash(asked.update(asked.assignment(1)).model) == state_hash(second.model)
    asked.terms = replace(asked.terms, key="another")
    assert state_hash(asked.update(asked.assignment(1)).model) != state_hash(second.model)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["abc", "another"]


@pytest.mark.parametrize("job", [Job.SCOUT, Job.EVALUATE, Job.SERVE])
def test_only_training_writes_what_a_client_keeps(tmp_path, job):
    asked = Asked(tmp_path, "fedper")
    asked.update(asked.assignment(1, job=job))
    assert not (tmp_path / "runs").exists()


def test_what_a_codec_leaves_out_is_sent_later(tmp_path):
    asked = Asked(tmp_path, "wide")
    assignment = asked.assignment(0)
    asked.update(assignment, up=TopK(0.05))
    owed = PersonalStore(tmp_path / "runs" / "abc" / "owed").load(1, 1)
    assert owed is not None and owed.experts
    # It is owed until it is trained again, and then another is.
    again = asked.update(asked.assignment(1), up=TopK(0.05))
    fresh = Asked(tmp_path / "fresh", "wide").update(asked.assignment(1), up=TopK(0.05))
    assert state_hash(again.model) != state_hash(fresh.model)


def test_a_round_that_is_asked_for_twice_is_answered_with_the_same_bytes(tmp_path):
    asked = Asked(tmp_path, "wide")
    for codec in (Int8(), TopK(0.1)):
        first, second = (answer(asked.post(asked.assignment(2), up=codec), asked.client)
                         for _ in range(2))
        assert first.groups == second.groups


def test_a_client_that_lacks_what_it_is_thought_to_have_says_so(tmp_path):
    asked = Asked(tmp_path, "wide")
    asked.update(asked.assignment(0))
    held = asked.client.cache.held()
    post = asked.post(asked.assignment(1), known=held)
    assert set(post.groups) == {"shared"}  # four experts are known by their hashes
    assert answer(post, asked.client).kind == PARCEL
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    back = answer(post, asked.client)
    parcel = Parcel(back.manifest, back.groups)
    assert kind_of(parcel) == "miss"
    lacking = unpack_miss(parcel, run="abc.1", client=1, round=1).hashes
    assert len(lacking) == 4 and set(lacking) <= set(held)


def test_a_client_may_keep_no_cache(tmp_path):
    asked = Asked(tmp_path, "wide")
    asked.client = replace(asked.client, cache_bytes=0)
    asked.update(asked.assignment(0))
    assert asked.client.cache is None and not (tmp_path / "cache").exists()


def test_what_goes_wrong_is_told_in_the_words_of_a_client_in_process(asked):
    bad = asked.assignment(sub_moe=WHOLE | {ExpertId(0, 9)})
    post = answer(asked.post(bad), asked.client)
    assert post.kind == FAILED
    assert post.text.startswith("ValueError: client 1 was assigned expert 9 of layer 0, and neith")


def test_want_of_memory_may_pass(asked):
    def make(spec):
        raise MemoryError("no room")

    asked.client = replace(asked.client, make=make)
    assert vars(asked.hello()) == vars(Post(BROKEN, "MemoryError: no room"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"definition": "ffff"}, "hash of its settings is 'ffff' at the server and '"),
        ({"partition": "mine"}, "hash of its partition is 'mine' at the server and 'tiny-part"),
        ({"rounds": 3}, "hash of its settings is '"),
        ({"target": "domain"}, "UnknownNameError: no experiment is called 'domain'; did you mean"),
        ({"method": "fedavy"}, "has no method 'fedavy'; did you mean 'fedavg'"),
        ({"arguments": {"speed": 1}}, "TypeError: small.. got an unexpected keyword"),
        ({"run": "abc.2"}, "ForeignError: the terms are of run 'abc.2', and run 'abc.1' asks"),
    ],
)
def test_terms_that_are_not_the_clients_are_refused_by_name(asked, changes, words):
    post = asked.hello(**changes)
    assert post.kind == FAILED
    with pytest.raises(ValueError, match=words):
        raise ValueError(post.text)


def test_a_client_may_take_part_in_one_experiment_alone(asked):
    asked.client = replace(asked.client, only="demo")
    assert asked.hello().text == (
        "TermsError: client 1 takes part in experiment 'demo' alone, and the server runs "
        "'tests.exchange.flower.runs:small'"
    )


def test_a_client_may_make_its_experiments_itself(asked):
    asked.client = replace(asked.client, make=lambda spec: asked.experiment)
    assert asked.hello().kind == PARCEL


def test_work_for_another_client_or_run_is_refused(asked):
    asked.client = replace(asked.client, id=2)
    post = answer(asked.post(asked.assignment()), asked.client)
    assert post.kind == FAILED and post.text.startswith("ForeignError: the parcel must be of cli")
    asked.client = replace(asked.client, id=1)
    asked.terms = replace(asked.terms, run="abc.9")
    post = answer(asked.post(asked.assignment()), asked.client)
    assert post.kind == FAILED and post.text.startswith("ForeignError: the parcel must be of run")


def test_a_message_is_answered_by_a_message(asked):
    grid = FakeGrid({7: lambda message: reply(message, asked.client)})
    from flwr.app import Message

    query = pack_query(run="abc.1")
    content = content_of(Post(HELLO, asked.terms.text, query.manifest))
    [sent] = grid.push_messages([Message(content, 7, "query.hello")])
    [back] = grid.pull_messages([sent])
    assert post_of(back.content).kind == PARCEL and back.metadata.reply_to_message_id == sent
    del content["fedmoe"]
    [sent] = grid.push_messages([Message(content, 7, "query.hello")])
    [back] = grid.pull_messages([sent])
    assert post_of(back.content).text.startswith("PostError: a message must hold a record")


@settings(max_examples=200)
@given(st.data())
def test_whatever_a_client_is_asked_it_answers(tmp_path_factory, data):
    asked = Asked(tmp_path_factory.getbasetemp() / "any")
    good = asked.post(asked.assignment())
    manifest = bytearray(good.manifest)
    for _ in range(data.draw(st.integers(0, 3))):
        manifest[data.draw(st.integers(0, len(manifest) - 1))] ^= data.draw(st.integers(0, 255))
    text = data.draw(st.sampled_from([good.text, good.text[:-1], "", "{}", "null"]))
    groups = {
        g: {n: v[: data.draw(st.sampled_from([len(v), len(v), 0, 3]))] for n, v in values.items()}
        for g, values in good.groups.items()
        if data.draw(st.booleans()) or data.draw(st.booleans())
    }
    post = Post(data.draw(st.sampled_from(KINDS)), text, bytes(manifest), groups)
    assert answer(post, asked.client).kind in (PARCEL, FAILED)
