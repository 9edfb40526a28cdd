"""A client's cache on its disk: whole or absent, bounded, and shared without harm."""

import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.wire.cache import LEFT_OVER_S, SMALLEST, ExpertCache
from fedmoe.wire.codecs import Int8, Raw
from fedmoe.wire.groups import seal, unseal

SIZE = 8000  # bytes of a group's numbers


def group(seed, codec=Raw()):  # noqa: B008
    draw = torch.Generator().manual_seed(seed)
    return seal({"v": torch.randn(SIZE // 4, generator=draw)}, codec)[0]


def used_at(cache, sealed, second):
    path = cache.folder / f"{sealed.hash.hex()}.safetensors"
    os.utime(path, (second, second))


@pytest.mark.parametrize("codec", [Raw(), Int8()], ids=str)
def test_what_was_put_in_is_there_for_another_cache_on_the_same_folder(tmp_path, codec):
    sealed = group(1, codec)
    ExpertCache(tmp_path / "cache").put(sealed)
    back = ExpertCache(tmp_path / "cache").get(sealed.hash)
    assert back.raws == sealed.raws and back.hash == sealed.hash
    assert torch.equal(unseal(back.meta, back.raws)["v"], unseal(sealed.meta, sealed.raws)["v"])


def test_an_empty_cache_holds_nothing(tmp_path):
    cache = ExpertCache(tmp_path / "none")
    assert cache.held() == () and cache.get(b"\0" * 32) is None


@given(st.data())
def test_a_damaged_file_counts_as_absent_and_goes(tmp_path_factory, data):
    cache, sealed = ExpertCache(tmp_path_factory.mktemp("cache")), group(1)
    cache.put(sealed)
    [path] = cache.folder.iterdir()
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] ^= data.draw(st.integers(1, 255))
    else:
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    path.write_bytes(bytes(raw))
    found = cache.get(sealed.hash)
    # A flipped bit outside of what counts, such as a space in the header, does no harm.
    assert found is None or found.raws == sealed.raws
    if found is None:
        assert cache.held() == ()


def test_another_groups_file_under_this_name_counts_as_damaged(tmp_path):
    cache, right, wrong = ExpertCache(tmp_path), group(1), group(2)
    cache.put(wrong)
    (tmp_path / f"{wrong.hash.hex()}.safetensors").rename(
        tmp_path / f"{right.hash.hex()}.safetensors"
    )
    assert cache.get(right.hash) is None and cache.held() == ()


def test_the_least_recently_used_goes_first(tmp_path):
    groups = [group(seed) for seed in range(4)]
    cache = ExpertCache(tmp_path, limit_bytes=3 * (SIZE + 600))
    for second, sealed in enumerate(groups[:3]):
        cache.put(sealed)
        used_at(cache, sealed, 1000 + second)
    assert cache.held() == tuple(g.hash for g in reversed(groups[:3]))
    assert cache.get(groups[0].hash) is not None  # used now
    cache.put(groups[3])
    assert set(cache.held()) == {groups[i].hash for i in (0, 2, 3)}
    cache.put(groups[2])  # is there: used again, not written again
    assert cache.held()[0] == groups[2].hash


def test_the_folder_never_takes_more_than_its_limit(tmp_path):
    cache = ExpertCache(tmp_path, limit_bytes=2 * (SIZE + 600))
    for seed in range(7):
        cache.put(group(seed))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= cache.limit_bytes


def test_what_is_tiny_or_too_large_is_not_kept(tmp_path):
    tiny, _ = seal({"v": torch.ones(SMALLEST // 4 - 1)}, Raw())
    ExpertCache(tmp_path).put(tiny)
    ExpertCache(tmp_path, limit_bytes=SIZE + 10).put(group(1))
    ExpertCache(tmp_path, limit_bytes=0).put(group(1))
    assert list(tmp_path.iterdir()) == []


def test_strangers_in_the_folder_are_left_alone(tmp_path):
    cache = ExpertCache(tmp_path)
    for name in ("notes.txt", "model.safetensors"):
        (tmp_path / name).write_text("mine")
    cache.put(group(1))
    assert len(cache.held()) == 1 and (tmp_path / "model.safetensors").exists()


def test_what_a_killed_process_left_goes_and_what_another_is_writing_stays(tmp_path):
    old, new = tmp_path / "a.1-1.part", tmp_path / "b.2-2.part"
    for path in (old, new):
        path.write_bytes(b"half")
    long_ago = time.time() - LEFT_OVER_S - 60
    os.utime(old, (long_ago, long_ago))
    ExpertCache(tmp_path).put(group(1))
    assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    cache = ExpertCache(tmp_path / "file" / "cache")
    cache.put(group(1))
    assert cache.held() == () and cache.get(group(1).hash) is None


def test_a_limit_below_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="limit_bytes must be 0 or more, got -1"):
        ExpertCache(tmp_path, limit_bytes=-1)


BUSY = """
import sys
from pathlib import Path
from fedmoe.wire.cache import ExpertCache
from tests.wire.test_cache import SIZE, group
cache = ExpertCache(Path(sys.argv[1]), limit_bytes=3 * (SIZE + 600))
groups = [group(seed) for seed in range(8)]
for turn in range(60):
    sealed = groups[(turn * int(sys.argv[2])) % 8]
    cache.put(sealed)
    found = cache.get(groups[(turn * 5) % 8].hash)
    assert found is None or found.raws == groups[(turn * 5) % 8].raws
    cache.held()
"""


@pytest.mark.slow
def test_two_processes_share_a_folder_that_is_too_small_for_both(tmp_path):
    commands = [[sys.executable, "-c", BUSY, str(tmp_path), step] for step in ("1", "3")]
    running = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    assert not list(tmp_path.glob("*.part"))
    assert len(ExpertCache(tmp_path).held()) <= 3
