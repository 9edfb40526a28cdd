"""Compile C++ once per machine, and load it.

A library lies in the user's cache under a hash of its source, the compiler, the flags and the
processor. It is built beside its place and moved there, so processes that build it at the same time
do not meet. Nothing is loaded that another user could have written.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno")
TIMEOUT_S = 300
SWITCH = "FEDMOE_NATIVE"


def enabled() -> bool:
    """Whether compiled kernels are wanted; FEDMOE_NATIVE=0 says no."""
    return os.environ.get(SWITCH, "1") not in ("0", "")


@lru_cache(maxsize=32)
def compiled(source: str) -> ctypes.CDLL | None:
    """The library of this C++ source; None where it is not wanted, or cannot be built or kept.

    The first call on a machine compiles for some seconds. Why it cannot be is told once, as a
    warning.
    """
    if not enabled() or (compiler := _compiler()) is None:
        return None
    try:
        return ctypes.CDLL(str(_built(source, compiler)))
    except (OSError, subprocess.SubprocessError) as why:
        warnings.warn(
            f"compiled kernels are not used, torch does their work: {_told(why)}; "
            f"{SWITCH}=0 silences this",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def cache_folder() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME/fedmoe/native, or ~/.cache/fedmoe/native."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fedmoe" / "native"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")


def _built(source: str, compiler: str) -> Path:
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_ours(folder)
    path = folder / f"{_key(source, compiler)}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            code, library = Path(beside) / "kernel.cpp", Path(beside) / "kernel.so"
            code.write_text(source, encoding="utf-8")
            subprocess.run(
                [compiler, *FLAGS, "-o", str(library), str(code)],
                check=True,
                capture_output=True,
                timeout=TIMEOUT_S,
            )
            library.replace(path)
    _check_ours(path)
    return path


def _check_ours(path: Path) -> None:
    """Raise PermissionError for what another user owns or may write."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{path} must belong to this user, and nobody else may write it: remove it, or set "
            f"XDG_CACHE_HOME to a folder of your own"
        )


def _key(source: str, compiler: str) -> str:
    """Of all that the machine code depends on: -march=native asks the processor."""
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, timeout=TIMEOUT_S
    ).stdout
    parts = (source.encode(), version, " ".join(FLAGS).encode(), _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _processor() -> str:
    """Its name and abilities, so that a cache on a shared disk serves several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _told(why: Exception) -> str:
    if isinstance(why, subprocess.CalledProcessError):
        last = why.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return f"the compiler failed: {' '.join(last)}"
    return str(why)
