"""Where a model runs, in which precision, and how much memory a step needs there."""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def pick_device(wanted: str | None = None) -> torch.device:
    """The device to run on: the one asked for, else a GPU if there is one, else the CPU.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that this machine has, got {wanted!r} without a GPU")
    return device


def autocast(device: torch.device, bf16: bool | None = None) -> AbstractContextManager[object]:
    """bf16 autocast on a GPU, full precision on a CPU, unless `bf16` says otherwise."""
    if device.type == "cuda" if bf16 is None else bf16:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of tensors that live during `step` and were made in it, on `device`.

    A GPU's allocator is asked; on a CPU every storage that an operation returns is followed until
    it is freed, those that autograd keeps included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    follower = _Storages()
    with follower:
        step()
    return follower.peak


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}  # bytes, by the storage's identity
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        before = _addresses(tree_leaves((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self._follow(leaf, before)
        return out

    def _follow(self, tensor: Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive or key in before:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def _addresses(leaves: Iterable[object]) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
