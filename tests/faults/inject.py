"""A rank of `trireme` in which something goes wrong at a given (rank, step, phase).

    mpiexec -n 2 python -m mpi4py tests/faults/inject.py PLAN train RECIPE key=value ...

PLAN is a JSON file: a list of {"what", "rank", "step", "phase", "mark"}. A fault strikes once, when that rank first
enters that phase after that step; then `mark` exists, and the job that goes on later is spared. What can go wrong:

    kill, stop      SIGKILL, SIGSTOP to itself
    raise           an exception that nobody expects
    hang, locked    sleeps for ever; and with Python's lock held
    memory          takes memory until the kernel kills it (in a memory cgroup of its own)
    disk            fills the file system of "room", a folder
    exchange        the exchange of this step fails

The phase "verify" is before all steps, when a rank checks a shard.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # of version 1, of version 2
ROOM = 64 << 20  # bytes that a rank may still take


def no_memory_cgroup() -> str:
    """Why a rank cannot be given too little memory here; empty if it can."""
    try:
        group = _memory_group()
        group.rmdir()
        return ""
    except OSError as error:
        return f"no memory cgroup can be made here ({error})"


def _memory_group() -> Path:
    first, second = CGROUPS
    group = (first if first.is_dir() else second) / f"trireme-{os.getpid()}"
    group.mkdir()
    name = "memory.limit_in_bytes" if first.is_dir() else "memory.max"
    if not (group / name).exists():
        group.rmdir()
        raise OSError("no memory controller")
    return group


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise RuntimeError("injected: nobody expected this")


def hang() -> None:
    time.sleep(1e6)


def locked() -> None:
    ctypes.PyDLL(None).sleep(1_000_000)


def memory() -> None:
    group = _memory_group()
    limit = group / "memory.limit_in_bytes"
    (limit if limit.exists() else group / "memory.max").write_text(str(ROOM))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    taken = []
    while True:
        taken.append(b"\1" * (1 << 20))


def disk(room: str) -> None:
    with suppress(OSError), open(Path(room) / "filler", "wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()


def exchange() -> None:
    from collectives import exchange, packed

    def broken(self: Any) -> bool:
        raise OSError("injected: the exchange failed")

    exchange.Exchange.finish = packed.PackedExchange.complete = broken  # type: ignore[method-assign]


ACTS = {
    "kill": kill, "stop": stop, "raise": fail, "hang": hang, "locked": locked, "memory": memory, "exchange": exchange,
}


def strike(fault: dict[str, Any]) -> None:
    try:
        os.close(os.open(fault["mark"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    print(f"injected: {fault['what']} in rank {fault['rank']}", file=sys.stderr, flush=True)
    disk(fault["room"]) if fault["what"] == "disk" else ACTS[fault["what"]]()


def arm(plan: list[dict[str, Any]]) -> None:
    """From now on faults strike this process."""
    from hpc.meter import Meter
    from hpc.shards import Dataset

    whole, verify = Meter.__call__, Dataset.verify

    @contextmanager
    def phase(self: Meter, name: str) -> Iterator[None]:
        with whole(self, name):
            for fault in plan:
                if (fault["rank"], fault["phase"]) == (self.comm.rank, name) and self.at >= fault["step"]:
                    strike(fault)
            yield

    def verified(self: Dataset, *arguments: Any) -> None:
        from mpi4py import MPI

        for fault in plan:
            if (fault["rank"], fault["phase"]) == (MPI.COMM_WORLD.rank, "verify"):
                strike(fault)
        verify(self, *arguments)

    Meter.__call__ = phase  # type: ignore[method-assign]
    Dataset.verify = verified  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from hpc.__main__ import main

    arm(json.loads(Path(sys.argv[1]).read_text()))
    sys.exit(main(sys.argv[2:]))
