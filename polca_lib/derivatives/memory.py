"""How much memory is free, how much a computation takes, and how many examples fit."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Files in which a control group (a container) states its limit in bytes: version 2, then version 1.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def default_budget(device: str | torch.device) -> int:
    """Half of the bytes that are free on ``device`` now."""
    device = torch.device(device)
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + held_back) // 2
    limits = [int(text) for file in _LIMITS if file.exists() and (text := file.read_text().strip()).isdigit()]
    # The group counts cached files as used, so subtract the memory of this process instead.
    within = min(limits, default=math.inf) - psutil.Process().memory_info().rss
    return max(0, min(psutil.virtual_memory().available, within)) // 2


def checked_device(device: str) -> str:
    """Return ``device`` if this machine has it and can compute on it.

    Raises:
        ValueError: the device is unknown, missing, or lacks float64, which sums need (``mps``).
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    allowed = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    if device not in allowed:
        reason = "has no float64, which sums need" if device == "mps" else "is not on this machine"
        raise ValueError(f"device = {device!r} {reason}; allowed: {', '.join(allowed)}")
    return device


def rounded_budget(device: str | torch.device) -> int:
    """:func:`default_budget` rounded down to a power of two, so that a resumed run rarely gets another budget."""
    return 2 ** math.floor(math.log2(max(1, default_budget(device))))


def peak_bytes(function: Callable[[], object], device: str | torch.device) -> int:
    """Run ``function`` and return the most bytes that its tensors held at a time.

    On a CPU, memory that an operation allocates and frees internally is not counted.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with _Meter() as meter:
        function()
    return meter.peak


class _Meter(TorchDispatchMode):
    """Counts each storage from the operation that allocates it until it is freed; views share a storage."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._known.update(_storages((args, kwargs)))
        # Forward mode uses tensors of zeros without memory. Below this mode torch's kernels would read them, and crash.
        # Views do not read; they stay without memory, as several elements would share it and could not be written to.
        if not function.is_view:
            args, kwargs = pytree.tree_map_only(torch.Tensor, _materialised, (args, kwargs))
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                self._known.add(storage)
                self.held += storage.nbytes()
                # The Python object of a storage lives as long as the storage, even if only a graph holds it.
                weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.held)
        return result

    def _free(self, size: int) -> None:
        self.held -= size


def _materialised(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor._is_zerotensor() else tensor


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    storages = [leaf.untyped_storage() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [storage for storage in storages if storage.device.type != "meta"]  # tensors of a trace hold nothing


def fit(measure: Callable[[int], int], budget: int, most: int) -> int:
    """max n <= ``most`` with ``measure(n)`` <= ``budget``: how many examples fit into ``budget`` bytes.

    The peak is a maximum over moments, each a constant plus a part proportional to n. It is therefore convex in n and
    at most proportional to n. A line through two points overestimates what fits: go half of the way along it, to at
    most twice as many examples, and measure again.

    Raises:
        ValueError: not even one fits.
    """
    n, peak, slope = 1, measure(1), 0.0
    if peak > budget:
        raise ValueError(
            f"one example takes {peak:,} bytes at a time, but of memory only {budget:,} are left for it; "
            "raise memory, or use shorter examples or a smaller model"
        )
    while (certain := n * budget // peak) < most:
        likely = n + (budget - peak) // (2 * slope) if slope else 2 * n
        more = int(max(certain, min(likely, 2 * n, most)))
        if more <= 1.1 * n:
            return certain
        more_peak = measure(more)
        slope = (more_peak - peak) / (more - n)
        if more_peak > budget:  # the peak is convex: between n and more it lies below the chord
            return n + int((budget - peak) // slope)
        n, peak = more, more_peak
    return most


def rows_that_fit(n_rows: int, row_bytes: int, budget: int) -> int:
    """How many of ``n_rows`` vectors fit into ``budget`` bytes; at least one."""
    return max(1, min(n_rows, budget // row_bytes))
