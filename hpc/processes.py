"""Processes of this host, and what tells them from others of the same number. Only Python's own library."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

SEGMENT = r" (/dev/shm/(?:mpich_shm_|sm_segment\.|vader_segment\.)\S*)$"


def state_of(pid: int) -> str:
    """A process's state, a letter as `ps` shows it ("T" is stopped, "Z" has ended); "X" if there is none."""
    return _fields(pid)[0]


def started(pid: int) -> int:
    """When a process was started, in ticks since this host was; 0 if it is gone."""
    state, *fields = _fields(pid)
    return 0 if state in "ZX" else int(fields[18])


def boot() -> str:
    """Which start of this host this is; "" where that is not known."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def space() -> str:
    """Which set of process numbers this process lives in; "" where that is not known."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def cores() -> int:
    """Cores that this process may use; what is hyper-threaded counts once, for two ranks on one are no faster."""
    found = set()
    for cpu in os.sched_getaffinity(0):
        try:
            found.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            found.add(str(cpu))
    return len(found)


def segments_of(pid: int) -> set[Path]:
    """What a rank shares with others through its MPI library, by files in memory that nobody removes once it is killed.

    They fill the host's memory, and MPICH names them by Slurm's job and step: a job that is requeued on the same host
    would find its own old ones, and not start.
    """
    with suppress(OSError):
        found = re.findall(SEGMENT, Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE)
        return {Path(name) for name in found}
    return set()


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed on this host, since it was started, for want of memory."""
    with suppress(OSError):
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def _fields(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ["X"]
