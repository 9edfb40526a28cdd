"""A client's side: from an assignment as it arrived to the update that goes back.

`reply` does it for a Flower message, in anybody's own ClientApp; `answer` for a `Post`, in the
worker. What a client keeps lies in its folder: `cache/` has experts by content hash, for all runs;
a folder for each run has its own parameters (`personal/`) and what a codec left out (`owed/`).
"""

import json
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Message

from fedmoe.data.examples import ClientData
from fedmoe.exchange.flower.forward import Place
from fedmoe.exchange.flower.identity import Identity, identity_of
from fedmoe.exchange.flower.post import BROKEN, FAILED, HELLO, PARCEL, WORK, Post, PostError
from fedmoe.exchange.flower.records import content_of, post_of
from fedmoe.exchange.flower.terms import Terms
from fedmoe.exchange.one_client import work_with_store
from fedmoe.exchange.parcels import coding_generator
from fedmoe.exchange.personal import PersonalStore
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec
from fedmoe.experiments.table import make_experiment
from fedmoe.types import Job
from fedmoe.wire.cache import ExpertCache
from fedmoe.wire.packing import pack_update, unpack_assignment
from fedmoe.wire.parcel import (
    ForeignError,
    Hello,
    MissingError,
    Parcel,
    pack_hello,
    pack_miss,
    read_manifest,
    unpack_query,
)

RESIDENT = 2  # experiments, and clients' data, that stay in memory

Make = Callable[[Spec], Experiment]


class TermsError(ValueError):
    """The server's run is not one that this client takes part in; names both sides' values."""


@dataclass(frozen=True)
class Client:
    """Who a client is, where it keeps what is its own, and how it makes experiments.

    `make` is `make_experiment` for those of the table and for `module:function`; give your own
    function to take part with a model and data of your own.
    """

    id: int
    state: Path
    cache_bytes: int = 2**30  # of experts on disk; 0: none are kept
    device: str = "cpu"
    only: str = ""  # the only experiment that it takes part in; empty: any
    make: Make = make_experiment

    @staticmethod
    def at(place: Place) -> "Client":
        """As a node's configuration has it."""
        return Client(
            place.client, place.state, place.cache_mb * 2**20, place.device, place.only
        )

    @property
    def cache(self) -> ExpertCache | None:
        return ExpertCache(self.state / "cache", self.cache_bytes) if self.cache_bytes else None

    @property
    def key(self) -> str:
        """By which the server knows it again when it comes back; made at first, and kept."""
        return key_of(self.state)


def key_of(folder: Path) -> str:
    """The key in a folder, made where there is none yet. Of two who make one, both get the same."""
    path = folder / "key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".key.{secrets.token_hex(8)}"
        beside.write_text(secrets.token_hex(16), encoding="ascii")
        with suppress(FileExistsError):
            path.hardlink_to(beside)
        beside.unlink()
    return path.read_text(encoding="ascii").strip()


def ready(threads: int = 1) -> None:
    """Set how many threads torch may use in this process."""
    torch.set_num_threads(threads)


def reply(message: Message, client: Client) -> Message:
    """The answer to a server's message; whatever goes wrong is said in it."""
    try:
        post = answer(post_of(message.content), client)
    except PostError as why:
        post = Post(FAILED, f"PostError: {why}")
    return Message(content_of(post), reply_to=message)


def answer(post: Post, client: Client) -> Post:
    """The answer to what a server asks; whatever goes wrong is the answer."""
    try:
        terms = Terms.read(post.text)
        experiment = _agreed(terms, client)
        asked = Parcel(post.manifest, post.groups)
        if post.kind == HELLO:
            parcel = _hello(asked, terms, client, experiment)
        elif post.kind == WORK:
            parcel = _work(asked, terms, client, experiment)
        else:
            raise ValueError(f"a client is asked {HELLO!r} or {WORK!r}, got {post.kind!r}")
    except MemoryError as why:  # there may be more of it another time
        return Post(BROKEN, f"MemoryError: {why}")
    except Exception as why:  # whatever goes wrong on a client is that client's failure
        return Post(FAILED, f"{type(why).__name__}: {why}")
    return Post(PARCEL, "", parcel.manifest, parcel.groups)


def _agreed(terms: Terms, client: Client) -> Experiment:
    """The experiment that the terms name, as this client makes it."""
    if client.only and terms.target != client.only:
        raise TermsError(
            f"client {client.id} takes part in experiment {client.only!r} alone, and the server "
            f"runs {terms.target!r}"
        )
    spec = Spec(terms.target, terms.method, terms.seed, terms.rounds, terms.arguments)
    experiment, ours = _made(client.make, json.dumps(asdict(spec), sort_keys=True))
    theirs = Identity(terms.definition, terms.partition)
    for what, there, here in zip(("settings", "partition"), theirs, ours, strict=True):
        if there and there != here:
            raise TermsError(
                f"experiment {terms.target!r}, method {terms.method!r}: the hash of its {what} is "
                f"{there!r} at the server and {here!r} at client {client.id}; both must have the "
                "same experiment and the same data"
            )
    return experiment


@lru_cache(maxsize=RESIDENT)
def _made(make: Make, spec_text: str) -> tuple[Experiment, Identity]:
    spec = Spec(**json.loads(spec_text))
    experiment = make(spec)
    return experiment, identity_of(spec, experiment)


@lru_cache(maxsize=RESIDENT)
def _data(experiment: Experiment, client: int) -> ClientData:
    return experiment.data.load(client)


def _hello(asked: Parcel, terms: Terms, client: Client, experiment: Experiment) -> Parcel:
    run = unpack_query(asked)
    if run != terms.run:
        raise ForeignError(f"the terms are of run {terms.run!r}, and run {run!r} asks")
    cache = client.cache
    return pack_hello(
        Hello(
            client.id,
            num_examples=len(_data(experiment, client.id).train.y),
            held=frozenset(() if cache is None else cache.held()),
            key=client.key,
            run=run,
        )
    )


def _work(asked: Parcel, terms: Terms, client: Client, experiment: Experiment) -> Parcel:
    cache = client.cache
    try:
        received = unpack_assignment(asked, run=terms.run, client=client.id, cache=cache)
    except MissingError as why:
        return pack_miss(
            run=terms.run,
            client=client.id,
            round=read_manifest(asked).assignment.round,
            hashes=why.hashes,
            held=() if cache is None else cache.held(),
        )
    folder = client.state / "runs" / terms.key
    plan = experiment.plan
    update = work_with_store(
        client.id,
        received.assignment,
        experiment.factory,
        _data(experiment, client.id),
        plan,
        PersonalStore(folder / "personal") if plan.stores else None,
        experiment.schedule.seed,
        client.device,
    )
    round, codecs = received.assignment.round, received.codecs
    remembers = received.assignment.job is Job.TRAIN and codecs.remembers
    owed = PersonalStore(folder / "owed")
    parcel, left = pack_update(
        update,
        received,
        generator=coding_generator(experiment.schedule.seed, round, client.id),
        feedback=owed.load(client.id, round) if remembers else None,
        cache=cache,
    )
    if remembers and left is not None:
        owed.save(client.id, round, left)
    return parcel
