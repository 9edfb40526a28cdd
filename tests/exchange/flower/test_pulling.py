import threading

import pytest

from fedmoe.exchange.flower.pulling import Puller


class Slow:
    """A grid with a reply that takes as long as a test wants."""

    def __init__(self):
        self.go_on = threading.Event()

    def pull_messages(self, ids):
        [message_id] = ids
        if message_id == "slow":
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


def test_what_goes_wrong_with_a_pull_is_raised_where_it_was_wanted():
    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        Puller(Slow()).pull(["bad"])
