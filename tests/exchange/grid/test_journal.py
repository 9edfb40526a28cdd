import pytest
from flwr.app import ConfigRecord, RecordDict

from fedmoe.exchange.grid.journal import Journal, Kept


def kept(n):
    return Kept(RecordDict({"c": ConfigRecord({"n": n})}), {"partition-id": 3})


@pytest.fixture
def journal(tmp_path):
    made = Journal(tmp_path)
    for number in (2, 5, 9):
        made.write(7, number, kept(number))
    return made


@pytest.mark.parametrize("number, found", [(10, 9), (9, 5), (6, 5), (5, 2), (3, 2)])
def test_a_message_that_is_done_again_finds_what_was_there_before_it(journal, number, found):
    again = Journal(journal.folder)  # of the process that comes after
    assert again.before(7, number) == kept(found)
    assert Journal(journal.folder).before(7, 99) == kept(found)  # what came after is undone


def test_before_its_first_message_a_node_has_nothing(journal):
    assert journal.before(7, 2) is None
    assert journal.before(8, 99) is None
    assert not list(journal.folder.iterdir())


def test_what_can_never_be_asked_for_again_is_removed(journal):
    journal.settled = 9
    journal.write(7, 12, kept(12))
    assert sorted(p.stem for p in journal.folder.iterdir()) == ["7-12", "7-9"]
    journal.settled = 11  # 12 may still be done again, from what 9 left
    journal.write(7, 13, kept(13))
    assert sorted(p.stem for p in journal.folder.iterdir()) == ["7-12", "7-13", "7-9"]


def test_a_file_that_was_not_finished_is_none(journal):
    (journal.folder / "7-11.new").write_bytes(b"half")
    assert Journal(journal.folder).before(7, 99) == kept(9)
