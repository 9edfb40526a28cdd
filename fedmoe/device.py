"""Where a model runs, in which precision, and how much memory that takes."""

import ctypes
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def pick_device(wanted: str | torch.device | None = None) -> torch.device:
    """The device asked for; without one the GPU if there is one, else the CPU.

    Raises:
        ValueError: a GPU is asked for that is not there.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be among the {torch.cuda.device_count()} GPUs here or the CPU, "
            f"got {str(wanted)!r}"
        )
    return device


def autocast(
    device: torch.device, enabled: bool | None = None
) -> AbstractContextManager[None] | torch.autocast:
    """A context in which matrix products run in bfloat16: by default on a GPU alone."""
    if enabled is None:
        enabled = device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16) if enabled else nullcontext()


def flush_denormals() -> bool:
    """Let this thread take numbers too small for float32's exponent (below 1e-38) for 0.

    A client of few labels soon has a loss near 0, and then gradients of such numbers, which a CPU
    computes many times slower than others: a backward pass took 56 ms in place of 7. For good, and
    for the threads that this one starts.

    Returns:
        Whether the processor can.
    """
    return torch.set_flush_denormal(True)


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees, for its next use, instead of returning it.

    A training step frees its gradients and activations only to ask for as much again. With the C
    library's defaults on Linux, large ones are handed back and come anew page by page, which took
    a fifth of the time of a MoE layer's step (2-core EPYC). Affects the whole process, for good.

    Returns:
        Whether it could be set: only with the GNU C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    # Older versions take no more than half a heap, 32 MiB.
    kept = mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)
    return bool(kept and mallopt(trim_threshold, 2**31 - 1))


def peak_memory(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes that tensors made during `step` take at any time in it.

    What was there before does not count; what the graph saves for the backward pass does, and
    gradients and optimizer state if the step makes them. On the CPU, scratch memory within one
    operation is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    live = _LiveStorages()
    with live:
        step()
    return live.peak_bytes


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation's tensors, and knows of their storages when each is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By address, for as long as the storage lives; 0 bytes for one from before.
        self.bytes_of: dict[int, int] = {}
        self.watchers: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages(args, kwargs):
            if storage._cdata not in self.bytes_of:
                self._watch(storage, 0)
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in self.bytes_of:
                self._watch(storage, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def _watch(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        address = storage._cdata

        def freed(_: object) -> None:
            self.live_bytes -= self.bytes_of.pop(address)
            del self.watchers[address]

        self.bytes_of[address] = num_bytes
        self.watchers[address] = weakref.ref(storage, freed)
        self.live_bytes += num_bytes


def _storages(*trees: object) -> Iterable[torch.UntypedStorage]:
    tensors = (t for t in tree_leaves(trees) if isinstance(t, Tensor))
    return (t.untyped_storage() for t in tensors if not t.is_meta)  # those take no memory
