import threading

import pytest

from fedmoe.exchange.flower.pulling import Puller


class Slow:
    """A grid with a reply that takes as long as a test wants."""

    def __init__(self):
        self.go_on = threading.Event()
        self.asked = []

    def pull_messages(self, ids):
        [message_id] = ids
        self.asked.append(message_id)
        if message_id.startswith("slow"):
            self.go_on.wait(60)
        if message_id == "bad":
            raise ConnectionError("the SuperLink is gone")
        return [f"reply to {message_id}"]


def test_a_reply_that_takes_long_does_not_hold_up_the_others():
    grid = Slow()
    puller = Puller(grid, patience_s=0.01)
    assert puller.pull(["slow"]) == []
    assert puller.busy == {"slow"} and puller.finished() == []
    assert puller.pull(["quick"]) == ["reply to quick"]
    [pull] = puller.slow
    grid.go_on.set()
    pull.done.wait(60)
    assert puller.finished() == ["reply to slow"]
    assert puller.busy == frozenset() and puller.finished() == []


def test_few_slow_replies_are_in_memory_at_a_time():
    grid = Slow()
    puller = Puller(grid, patience_s=0.01)
    for name in ("slow 1", "slow 2", "slow 3", "quick"):
        assert puller.pull([name]) == []
    assert puller.busy == {"slow 1", "slow 2"} == set(grid.asked)
    pulls = [*puller.slow]
    grid.go_on.set()
    for pull in pulls:
        pull.done.wait(60)
    assert puller.finished() == ["reply to slow 1", "reply to slow 2"]
    assert puller.pull(["quick"]) == ["reply to quick"]


def test_what_goes_wrong_with_a_pull_is_raised_where_it_was_wanted():
    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        Puller(Slow()).pull(["bad"])
