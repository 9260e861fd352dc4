"""Memory that ranks share: the windows, results and flags of an island.

On a GPU, neighbours map each other's buffers. On CPUs they share anonymous files, in huge pages where the system gives
them. MPI's own shared windows lie in /dev/shm, which is 64 MiB large in many a container. An anonymous file (memfd) is
not part of it; it gets huge pages if /sys/kernel/mm/transparent_hugepage/shmem_enabled says "advise"; and it is gone
with the last process that has it, whatever ends them. Where one process may not open another's (containers may forbid
it), MPI's window serves.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from kernels import gpu
from kernels.window import LINE, Flags

CPU = torch.device("cpu")
PAGE = 4096
HUGE = 2 << 20  # bytes; smaller windows have ordinary pages


class Memory:
    """What a rank shares with its neighbours, the ranks of its island.

    neighbours  the ranks of the island, ascending
    rank        this one
    gather      every neighbour's JSON value, in their order, on every one of them (collective)
    fallback    so many bytes of each of them in MPI's memory, and the fence for it (collective)
    mapped      whether they map each other's GPU memory
    """

    def __init__(
        self, neighbours: list[int], rank: int, gather: Callable[[Any], list[Any]],
        fallback: Callable[[int], tuple[list[Any], Callable[[], None]]], mapped: bool,
    ):
        self.neighbours, self.rank, self.mapped = neighbours, rank, mapped
        self._gather, self._fallback = gather, fallback
        self._kept: list[Any] = []
        self._commons: set[int] = set()
        self._handles: dict[int, str] = {}  # address -> what neighbours need to map a device buffer of this rank

    def zeros(self, count: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A flat buffer [count] of zeros in memory of this rank's own, which neighbours can map if GPUs allow it."""
        if device.type == "cuda" and self.mapped and count and dtype == torch.float32:
            buffer = gpu.zeros(count, device)
            self._handles[buffer.data_ptr()] = gpu.handle(buffer)
            self.keep(buffer)
            return buffer
        return torch.zeros(count, dtype=dtype, device=device)

    def keep(self, held: Any) -> None:
        """Hold on to something until the process ends: others' memory, or what others may have mapped."""
        self._kept.append(held)

    def window(self, count: int, device: torch.device = CPU) -> list[torch.Tensor]:
        """Zeroed float32 buffers [count] of all neighbours, in their order, each seen by all (collective).

        Raises ValueError for a GPU's memory if the neighbours cannot map it.
        """
        if device.type == "cuda":
            if seen := self._seen(self.zeros(count, device)):
                return seen
            raise ValueError(f"neighbours cannot map memory of '{device}'; they belong on islands of their own")
        parts, _ = self._shared(4 * count, 4 * count)
        parts[self.neighbours.index(self.rank)].zero_()  # by its owner, so that it lies in memory near to it
        return [part.view(torch.float32) for part in parts]

    def common(self, count: int) -> torch.Tensor:
        """One zeroed float32 buffer [count] that is the same memory for all neighbours (collective)."""
        buffer = self._first_shared(4 * count)[0].view(torch.float32)
        self.keep(buffer)  # as long as its address stands for it
        self._commons.add(buffer.data_ptr())
        return buffer

    def is_common(self, tensor: torch.Tensor) -> bool:
        """Whether what one neighbour writes into this tensor is there for the others: it came from `common`."""
        return len(self.neighbours) == 1 or tensor.data_ptr() in self._commons

    def results(self, weights: torch.Tensor) -> list[torch.Tensor]:
        """Where each neighbour puts new weights [P] for all to see: where they are, if all see them (collective)."""
        if weights.is_cuda:
            return self._seen(weights) or self.window(len(weights), weights.device)
        common = weights if self.is_common(weights) else self.common(len(weights))
        return [common] * len(self.neighbours)

    def flags(self, count: int) -> Flags:
        """So many flags of every neighbour, in their order (collective)."""
        buffer, sync = self._first_shared(4 * LINE * count * len(self.neighbours))
        return Flags(buffer.numpy().view(np.uint32).reshape(-1, count, LINE), sync)

    def _seen(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """A device buffer of every neighbour, one's own among them; [] if any has none to map (collective)."""
        if len(self.neighbours) == 1:
            return [mine]
        handles = self._gather(self._handles.get(mine.data_ptr(), ""))
        if not all(handles):
            return []
        told = zip(self.neighbours, handles, strict=True)
        return [mine if r == self.rank else gpu.mapped(handle, len(mine), mine.device) for r, handle in told]

    def _first_shared(self, size: int) -> tuple[torch.Tensor, Callable[[], None]]:
        """Zeroed bytes [size] in the first neighbour's memory, seen by all of them."""
        first = self.neighbours[0] == self.rank
        parts, sync = self._shared(size if first else 0, size)
        if first:
            parts[0].zero_()
        sync()
        self._gather("zeroed")
        sync()
        return parts[0], sync

    def _shared(self, mine: int, size: int) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """Bytes of all neighbours, in memory that all of them see, and the fence for it.

        mine  how many bytes this rank gives
        size  how many those give that give any
        """
        if len(self.neighbours) == 1:
            return [torch.empty(size, dtype=torch.uint8)], lambda: None
        parts = share(mine, self._gather)
        if parts is not None:
            return [part[:size] for part in parts], fence
        found, sync = self._fallback(-(-mine // PAGE) * PAGE)
        empty = torch.empty(0, dtype=torch.uint8)
        return [torch.frombuffer(part, dtype=torch.uint8)[:size] if len(part) else empty for part in found], sync


def share(size: int, gather: Callable[[Any], Sequence[Any]]) -> list[torch.Tensor] | None:
    """Bytes of every process, each seen by all (collective over the processes of a host).

    size    how many bytes this process gives
    gather  every process's JSON value, in their order, on every one of them (collective)

    Returns uint8 tensors in the processes' order, zeroed; None, on all of them, if any could not see another's.
    """
    fd, offered = -1, None
    with suppress(OSError, AttributeError):  # no memfd here
        fd = os.memfd_create("trireme", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        offered = [os.getpid(), fd, os.fstat(fd).st_ino, size]
    offers = gather(offered)
    found: list[torch.Tensor] = []
    with suppress(OSError, TypeError, ValueError):  # not allowed, or not the same file: another pid namespace
        found = [_opened(*offer) for offer in offers]
    fitting = all(gather(len(found) == len(offers)))  # and nobody closes before all have opened
    if fd >= 0:
        os.close(fd)
    return found if fitting else None


def fence() -> None:
    """Order this process's reads and writes of shared memory, as taking a lock does.

    For the Python side of flags. Enough on x86; on other processors the native library's flags are the ones to have.
    """
    with threading.Lock():
        pass


def _opened(pid: int, number: int, inode: int, size: int) -> torch.Tensor:
    """Another process's anonymous file, mapped. Raises OSError if it is not that file."""
    fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
    try:
        if os.fstat(fd).st_ino != inode:
            raise OSError(f"/proc/{pid}/fd/{number} is another file than was offered")
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        mapped = mmap.mmap(fd, size)
    finally:
        os.close(fd)
    if size >= HUGE:
        with suppress(OSError, AttributeError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=torch.uint8)
