from __future__ import annotations

import numpy as np
import pytest

from fedmoe.data.shakespeare import ALPHABET, encode, load_roles, parse_roles

TEXT = """ANNE:
Good day.

BOB:
Good day to you, Anne.
How now?

ANNE:
Well.

CAT:
Good day.
Well.

A line that nobody says.
"""


def test_speeches_are_joined_by_role_and_the_longest_comes_first():
    assert list(parse_roles(TEXT).items()) == [
        ("BOB", "Good day to you, Anne.\nHow now?"),
        ("ANNE", "Good day.\nWell."),
        ("CAT", "Good day.\nWell."),  # as long: in the order of names
    ]


def test_a_code_is_a_place_in_the_alphabet():
    assert encode("\n za").tolist() == [0, 1, 64, 39]
    assert encode("a").dtype == np.uint8
    assert encode(ALPHABET).tolist() == list(range(65))


def test_a_character_that_is_not_in_the_alphabet_is_named():
    with pytest.raises(ValueError, match="of the 65 characters .* got also .'é'.*; replace"):
        encode("été")


def test_another_file_of_that_name_is_refused(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text(TEXT)
    with pytest.raises(ValueError, match=r"wanted .* SHA-256 86c4e6aa.* karpathy/char-rnn"):
        load_roles(tmp_path)


def test_the_real_roles_are_all_there_in_the_alphabet(real_roles):
    assert len(real_roles) == 309
    lengths = [len(said) for said in real_roles.values()]
    assert lengths == sorted(lengths, reverse=True)
    assert next(iter(real_roles)) == "GLOUCESTER"
    assert set("".join(real_roles.values())) <= set(ALPHABET)
