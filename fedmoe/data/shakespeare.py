"""Tiny Shakespeare: a million characters of plays, by the role that speaks them.

The file of Karpathy's char-rnn (2015, MIT; the text is in the public domain). Roles as clients, and
the next character as the task, are from McMahan et al. (2017), arXiv:1602.05629, and LEAF (Caldas
et al., 2018, arXiv:1812.01097). Ours has far fewer roles: this file is a part of the plays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedmoe.data.files import read_published

ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FILE_NAME = "tinyshakespeare.txt"

_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HOW_TO_GET_IT = (
    "It is data/tinyshakespeare/input.txt of the repository karpathy/char-rnn, 1,115,394 bytes."
)


def load_roles(folder: Path | None = None) -> dict[str, str]:
    """What each of the 309 roles says, all its speeches joined, most talkative first.

    Reads `tinyshakespeare.txt` in `folder`, else in the folder that FEDMOE_DATA names, else in
    `../shared/data`.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is another file.
    """
    return parse_roles(read_published(FILE_NAME, _SHA256, folder, HOW_TO_GET_IT))


def parse_roles(text: str) -> dict[str, str]:
    """Role to text, from speeches with an empty line between, each under a line `ROLE:`.

    Speeches of a role are joined by a line break, in order. Longest text first, and roles with
    as much in the order of their names.
    """
    speeches: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        head, _, speech = block.strip().partition("\n")
        if head.endswith(":"):
            speeches.setdefault(head[:-1], []).append(speech)
    roles = {role: "\n".join(said) for role, said in speeches.items()}
    return dict(sorted(roles.items(), key=lambda item: (-len(item[1]), item[0])))


def encode(text: str) -> npt.NDArray[np.uint8]:
    """Each character's place in ALPHABET.

    Raises:
        ValueError: a character is not in it.
    """
    codes: Mapping[str, int] = {character: code for code, character in enumerate(ALPHABET)}
    if strange := sorted(set(text) - set(ALPHABET)):
        raise ValueError(
            f"text must be of the {len(ALPHABET)} characters of ALPHABET, got also {strange[:5]}; "
            f"replace them, or leave them out"
        )
    return np.array([codes[character] for character in text], dtype=np.uint8)
