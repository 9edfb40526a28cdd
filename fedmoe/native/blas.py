"""The matrix product of the BLAS that torch brought, for compiled kernels to call.

A second BLAS in a process would be slower, larger, and round otherwise.
"""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache(maxsize=1)
def sgemm_address() -> int | None:
    """Where Fortran's `sgemm_` is, with 32-bit whole numbers; None if torch does not show one."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        return None
    try:
        sgemm = ctypes.CDLL(str(library)).sgemm_  # loaded already: this opens it once more
    except (OSError, AttributeError):
        return None
    return ctypes.cast(sgemm, ctypes.c_void_p).value
