"""Memory that processes of one host share: anonymous files, in huge pages where the system gives them.

MPI's own shared windows lie in /dev/shm, which is 64 MiB large in many a container. An anonymous file (memfd) is not
part of it; it gets huge pages if /sys/kernel/mm/transparent_hugepage/shmem_enabled says "advise"; and it is gone with
the last process that has it, whatever ends them. Where one process may not open another's (containers may forbid it),
MPI's window serves.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

HUGE = 2 << 20  # bytes; smaller windows have ordinary pages


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
