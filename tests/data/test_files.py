from __future__ import annotations

import hashlib

import pytest

from fedmoe.data.files import find_file, read_published

SHA256 = hashlib.sha256(b"words").hexdigest()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Three folders: an argument, one that a variable may name, and the usual one."""
    monkeypatch.delenv("FEDMOE_DATA", raising=False)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    folders = [tmp_path / name for name in ("argument", "variable", "shared/data")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    return folders


def test_the_argument_goes_before_the_variable_and_the_variable_before_the_usual_place(
    places, monkeypatch
):
    argument, variable, usual = places
    assert find_file("file", None, "FEDMOE_X", usual, "") == usual / "file"
    monkeypatch.setenv("FEDMOE_X", str(variable))
    assert find_file("file", None, "FEDMOE_X", usual, "") == variable / "file"
    assert find_file("file", argument, "FEDMOE_X", usual, "") == argument / "file"


def test_a_named_folder_is_the_only_one_tried(places, monkeypatch):
    argument, variable, usual = places
    (argument / "file").unlink()
    with pytest.raises(FileNotFoundError, match="file must be in .*argument, which the argument"):
        find_file("file", argument, "FEDMOE_X", usual, "")
    (variable / "file").unlink()
    monkeypatch.setenv("FEDMOE_X", str(variable))
    with pytest.raises(FileNotFoundError, match="variable FEDMOE_X .* Ask for it"):
        find_file("file", None, "FEDMOE_X", usual, "Ask for it.")


def test_a_published_file_is_found_beside_the_repository(places):
    (places[2] / "file").write_bytes(b"words")
    assert read_published("file", SHA256, None, "") == "words"


def test_a_file_that_was_changed_is_refused_with_both_sums(places):
    (places[2] / "file").write_bytes(b"Words")
    got = hashlib.sha256(b"Words").hexdigest()
    with pytest.raises(ValueError, match=f"wanted .* SHA-256 {SHA256}, got {got}; .* Ask for it"):
        read_published("file", SHA256, None, "Ask for it.")
