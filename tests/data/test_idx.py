from __future__ import annotations

import gzip
import hashlib
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.data import idx
from fedmoe.data.idx import ImageSource, idx_header, read_idx


def idx_bytes(array: np.ndarray) -> bytes:
    return idx_header(array.shape) + array.astype(np.uint8).tobytes()


def write_idx(path: Path, array: np.ndarray) -> Path:
    raw = idx_bytes(array)
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)
    return path


# --- read_idx


@pytest.mark.parametrize("suffix", ["", ".gz"])
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
def test_read_idx_gives_back_what_was_written(tmp_path_factory, suffix, shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    path = write_idx(tmp_path_factory.mktemp("idx") / f"a{suffix}", array)
    assert np.array_equal(read_idx(path, shape), array)


def test_read_idx_reads_a_file_written_by_hand(tmp_path):
    path = tmp_path / "hand"
    path.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 1, 7, 255]))
    assert read_idx(path, (2, 1)).tolist() == [[7], [255]]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@given(kept=st.integers(0, 4 + 8 + 11))
def test_a_file_cut_short_anywhere_is_refused_by_name(tmp_path_factory, suffix, kept):
    path = tmp_path_factory.mktemp("idx") / f"cut{suffix}"
    raw = idx_bytes(np.ones((3, 4)))[:kept]
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    with pytest.raises(ValueError, match=f"{path}: wanted .* got "):
        read_idx(path, (3, 4))


def test_a_gzip_file_cut_short_is_refused_by_name(tmp_path):
    path = write_idx(tmp_path / "a.gz", np.ones((3, 4)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path}: wanted a whole gzip file, got a damaged one"):
        read_idx(path, (3, 4))


def test_gzip_in_name_only_is_refused_by_name(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(idx_bytes(np.ones((3, 4))))
    with pytest.raises(ValueError, match=f"{path}: wanted a whole gzip file"):
        read_idx(path, (3, 4))


def test_gzip_without_the_name_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(idx_bytes(np.ones((3, 4)))))
    with pytest.raises(ValueError, match="starts with 00 00 08, got 1f 8b .* gzip without .gz"):
        read_idx(path, (3, 4))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ((4, 3), r"wanted an array of shape \(4, 3\), got \(3, 4\)"),
        ((12,), "wanted 1 dimensions .* got 2; images and labels may have changed places"),
    ],
)
def test_another_shape_than_wanted_is_refused(tmp_path, wanted, said):
    path = write_idx(tmp_path / "a", np.ones((3, 4)))
    with pytest.raises(ValueError, match=said):
        read_idx(path, wanted)


def test_bytes_of_another_type_are_refused(tmp_path):
    path = tmp_path / "floats"
    path.write_bytes(bytes([0, 0, 13]) + idx_bytes(np.ones((3, 4)))[3:])
    with pytest.raises(ValueError, match="starts with 00 00 08, got 00 00 0d 02"):
        read_idx(path, (3, 4))


def test_a_file_with_more_than_it_says_is_refused(tmp_path):
    path = tmp_path / "long"
    path.write_bytes(idx_bytes(np.ones((3, 4))) + b"x")
    with pytest.raises(ValueError, match="wanted 12 bytes behind the header, got more"):
        read_idx(path, (3, 4))


def test_a_gzip_bomb_is_refused_without_being_unpacked(tmp_path):
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(idx_bytes(np.ones((3, 4))))
        for _ in range(32):
            file.write(bytes(1 << 20))  # 32 MiB, in 140 kB
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="got more"):
            read_idx(path, (3, 4))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# --- a source of four files

NAMES = [f"{p}-{h}" for p in ("train", "t10k") for h in ("images-idx3-ubyte", "labels-idx1-ubyte")]
IMAGE = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
LABEL = (np.arange(30) % 10).astype(np.uint8)
# Twenty images to train and ten to test, every class alike.
ARRAYS = dict(zip(NAMES, (IMAGE[:20], LABEL[:20], IMAGE[20:], LABEL[20:]), strict=True))
SMALL = ImageSource(
    "Small",
    "FEDMOE_SMALL",
    (),
    "nobody/small",
    "Draw it yourself.",
    num_train=(2,) * 10,
    num_test=(1,) * 10,
    md5=tuple(hashlib.md5(idx_bytes(array)).hexdigest() for array in ARRAYS.values()),
)


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder of its own for every test, so nothing that is kept is met again."""
    for name, array in ARRAYS.items():
        write_idx(tmp_path / name, array)
    return tmp_path


def test_training_images_come_first(small):
    x, y = SMALL.load(small)
    assert np.array_equal(x.numpy(), IMAGE)
    assert y.tolist() == LABEL.tolist()


def test_gzipped_files_are_the_same_set(small):
    for name in NAMES:
        write_idx(small / f"{name}.gz", ARRAYS[name])
        (small / name).unlink()
    assert np.array_equal(SMALL.load(small).x.numpy(), IMAGE)


def test_a_pixel_that_differs_is_refused_with_both_sums(small):
    changed = IMAGE[20:].copy()
    changed[3, 14, 14] ^= 1
    write_idx(small / NAMES[2], changed)
    got = hashlib.md5(idx_bytes(changed)).hexdigest()
    with pytest.raises(
        ValueError, match=f"wanted t10k-images-.* with md5 {SMALL.md5[2]}, got {got}; .* not Small"
    ):
        SMALL.load(small)


def test_labels_that_count_otherwise_are_refused(small):
    other = replace(SMALL, num_train=(3, 1, *(2,) * 8))
    with pytest.raises(ValueError, match=r"wanted \[3, 1, 2.* train images .* got \[2, 2, 2"):
        other.load(small)


def test_the_hub_is_checked_like_a_folder(monkeypatch):
    import datasets

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    parts = {
        "train": {"image": list(IMAGE[:20]), "label": LABEL[:20].tolist()},
        "test": {"image": list(IMAGE[20:]), "label": LABEL[20:].tolist()},
    }
    monkeypatch.setattr(datasets, "load_dataset", {"nobody/small": parts}.__getitem__)
    idx._from_hub.cache_clear()
    x, y = SMALL.load()
    assert np.array_equal(x.numpy(), IMAGE) and y.tolist() == LABEL.tolist()
    parts["test"]["image"] = list(IMAGE[19:29])
    idx._from_hub.cache_clear()
    with pytest.raises(ValueError, match="nobody/small: wanted t10k-images-idx3-ubyte with md5"):
        SMALL.load()


def test_an_unreachable_hub_is_an_error_that_says_where_was_looked_and_how_to_get_it(monkeypatch):
    import datasets

    def unreachable(name):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    nowhere = replace(SMALL, folders=(Path("a"), Path("b")))
    with pytest.raises(
        FileNotFoundError, match=r"Small is not in .*/a, not in .*/b, and .*\nDraw it yourself"
    ):
        nowhere.load()


def test_two_sources_in_one_folder_are_not_taken_for_each_other(small):
    SMALL.load(small)
    with pytest.raises(ValueError, match="not Other"):
        replace(SMALL, name="Other", md5=("0" * 32,) * 4).load(small)
