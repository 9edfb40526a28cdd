"""Compiled code is built once, only from this user's folder, and is never needed."""

import ctypes
import os
import subprocess

import pytest

from fedmoe.native import build
from fedmoe.native.build import compiled

PLUS_ONE = 'extern "C" int plus_one(int x) { return x + 1; }'
needs_a_compiler = pytest.mark.skipif(build._compiler() is None, reason="no compiler here")


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FEDMOE_NATIVE", raising=False)
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@needs_a_compiler
def test_source_becomes_a_library_that_runs():
    library = compiled(PLUS_ONE)
    assert isinstance(library, ctypes.CDLL) and library.plus_one(41) == 42


@needs_a_compiler
def test_a_library_is_built_once(monkeypatch):
    compiled(PLUS_ONE)
    compiled.cache_clear()
    run, told = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda c, **kw: told.append(c) or run(c, **kw))
    assert compiled(PLUS_ONE).plus_one(1) == 2
    assert not [c for c in told if "-shared" in c]
    assert [p.suffix for p in build.cache_folder().iterdir()] == [".so"]


@pytest.mark.parametrize("off", ["0", ""])
def test_the_switch_turns_compiled_code_off(monkeypatch, off):
    monkeypatch.setenv("FEDMOE_NATIVE", off)
    assert compiled(PLUS_ONE) is None


def test_without_a_compiler_there_is_no_library_and_no_noise(monkeypatch, recwarn):
    monkeypatch.setattr(build, "_compiler", lambda: None)
    assert compiled(PLUS_ONE) is None and not recwarn.list


@needs_a_compiler
def test_source_that_does_not_compile_is_told_and_torch_goes_on():
    with pytest.warns(RuntimeWarning, match="the compiler failed"):
        assert compiled("no C++ at all") is None
    assert not list(build.cache_folder().iterdir())


@needs_a_compiler
def test_a_folder_that_others_can_write_is_not_trusted():
    build.cache_folder().mkdir(parents=True)
    os.chmod(build.cache_folder(), 0o777)
    with pytest.warns(RuntimeWarning, match="nobody else may write it"):
        assert compiled(PLUS_ONE) is None


@needs_a_compiler
def test_a_library_that_others_can_write_is_not_loaded():
    compiled(PLUS_ONE)
    compiled.cache_clear()
    [library] = build.cache_folder().iterdir()
    library.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="nobody else may write it"):
        assert compiled(PLUS_ONE) is None
