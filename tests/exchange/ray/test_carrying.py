"""What goes out to actors and comes back, whichever of them die."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.exchange.actors import ActorsError
from fedmoe.exchange.ray import carrying
from fedmoe.exchange.ray.carrying import Carrying
from fedmoe.federated.folding import Folded, Folding
from fedmoe.federated.sums import Sums
from fedmoe.types import ClientFailure
from tests.exchange.ray.played import (
    ERRAND,
    FAILS,
    REFUSED,
    PlayedCrew,
    assignments,
    exchange,
    played,
)


def in_one(num_clients):
    folding = Folding(*ERRAND)
    sent = assignments(num_clients)
    for reply in exchange(sent):
        if not isinstance(reply, ClientFailure):
            folding.add(reply, sent[reply.client])
    return folding.done()


@given(
    num_clients=st.integers(1, 40),
    count=st.integers(1, 4),
    chance=st.sampled_from([0.0, 0.1, 0.3]),
    folds=st.booleans(),
    most=st.integers(1, 6),
    settle_s=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 2**32),
)
def test_every_client_is_counted_once_whichever_actors_die(
    num_clients, count, chance, folds, most, settle_s, seed
):
    draw, deaths = random.Random(seed), Counter()

    def dies(slip):
        dying = deaths.total() < carrying.RESTARTS and draw.random() < chance
        deaths[slip.head] += dying
        return dying

    limits = {"MOST_CLIENTS": most, "SETTLE_S": settle_s, "WORTH_MOVING_S": 0.0}
    told = []
    with played(**limits):
        team = PlayedCrew(count, dies, draw)
        errand = ERRAND if folds else None
        answers = list(Carrying(team, 1, assignments(num_clients), errand, told.append).answers())
    failed = {a.client: a.reason for a in answers if isinstance(a, ClientFailure)}
    given_up = {client for client, reason in failed.items() if "died" in reason}
    assert len(given_up) * carrying.DEATHS <= deaths.total()
    assert sorted(told) == list(range(num_clients))
    if not folds:
        assert sorted(a.client for a in answers) == list(range(num_clients))
        return
    parts = [a for a in answers if isinstance(a, Folded)]
    notes = [n for p in parts for n in p.notes]
    refused = [r.client for p in parts for r in p.refused]
    assert sorted([*failed, *refused, *(n.update.client for n in notes)]) == list(
        range(num_clients)
    )
    assert all(n.bytes_up == 7 and not n.update.model.shared for n in notes)
    if not given_up:
        sums = Sums()
        for part in parts:
            sums.merge(part.sums)
        old = {"w": torch.zeros(1)}
        wanted = in_one(num_clients).sums.mean("shared", old)["w"]
        assert torch.equal(sums.mean("shared", old)["w"], wanted)


def test_without_deaths_each_actor_sends_one_sum():
    with played(MOST_CLIENTS=4):
        team = PlayedCrew(2, lambda slip: False, random.Random(0))
        team.pace[assignments(1)[0].job] = 1e-9
        parts = [
            a
            for a in Carrying(team, 1, assignments(24), ERRAND, lambda client: None).answers()
            if isinstance(a, Folded)
        ]
    assert sorted(len(p.notes) + len(p.refused) for p in parts) == [11, 12]


def test_a_client_stays_with_its_actor():
    with played(MOST_CLIENTS=4):
        team = PlayedCrew(3, lambda slip: False, random.Random(0))
        sent = assignments(9)
        first = {client: team.seat_of(client) for client in sent}
        for number in range(3):
            list(Carrying(team, number, sent, None, lambda client: None).answers())
        assert {client: team.seat_of(client) for client in sent} == first
    assert {seat.number for seat in first.values()} == {0, 1, 2}


def test_an_idle_actor_takes_over_what_a_busy_one_has_not_begun():
    with played(MOST_CLIENTS=1):
        busy = PlayedCrew(2, lambda slip: False, random.Random(0))
        sent = {c: a for c, a in assignments(40).items() if c % 2}  # all of one actor
        busy.pace[sent[1].job] = 1.0
        list(Carrying(busy, 1, sent, None, lambda client: None).answers())
    assert 0 < len(busy.moved) < len(sent)
    assert set(busy.moved.values()) <= {0, 1}


def test_a_client_that_kills_is_given_up_and_those_beside_it_are_not():
    def dies(slip):
        return b"K\x09" in slip.head  # client 9

    with played():
        team = PlayedCrew(1, dies, random.Random(0))
        answers = list(Carrying(team, 1, assignments(12), ERRAND, lambda client: None).answers())
    failed = {a.client: a.reason for a in answers if isinstance(a, ClientFailure)}
    assert failed.keys() == {FAILS, 9}
    assert failed[9].startswith("3 actors died at its work, so it may need more memory")
    done = {n.update.client for a in answers if isinstance(a, Folded) for n in a.notes}
    assert done == set(range(12)) - {FAILS, REFUSED, 9}


def test_actors_that_die_without_end_end_the_round_with_their_name_and_the_clients():
    team = PlayedCrew(2, lambda slip: True, random.Random(0))
    with played():
        answers = Carrying(team, 1, assignments(30), None, lambda client: None).answers()
        with pytest.raises(ActorsError, match=r"died 13 times in one round.*actor [01] at"):
            list(answers)
