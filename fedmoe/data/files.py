"""Finding the one file that a data set lies in, and making sure that it is the right one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

DATA_VARIABLE = "FEDMOE_DATA"
DATA_FOLDER = Path("../shared/data")  # beside the repository, in whose root commands are run


def find_file(
    name: str, folder: Path | None, variable: str, usual: Path, how_to_get_it: str
) -> Path:
    """The file `name` in `folder`, else in the folder that `variable` names, else in `usual`.

    A folder that was named is the only one tried.

    Raises:
        FileNotFoundError: it is not there; says `how_to_get_it`.
    """
    named = os.environ.get(variable)
    if folder is not None:
        place, by = Path(folder), "the argument folder"
    elif named:
        place, by = Path(named), f"the environment variable {variable}"
    else:
        place, by = usual, "the usual place"
    path = place / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} must be in {place.absolute()}, which {by} names, and is not; either put it "
            f"there or set {variable} to the folder that has it. {how_to_get_it}"
        )
    return path


def read_published(name: str, sha256: str, folder: Path | None, how_to_get_it: str) -> str:
    """The text of a file of `folder`, of FEDMOE_DATA or of `../shared/data`, as it was published.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is another file than the one with this SHA-256.
    """
    path = find_file(name, folder, DATA_VARIABLE, DATA_FOLDER, how_to_get_it)
    content = path.read_bytes()
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise ValueError(
            f"{path}: wanted the file with SHA-256 {sha256}, got {got}; it was changed, or is "
            f"another edition. {how_to_get_it}"
        )
    return content.decode("utf-8")
