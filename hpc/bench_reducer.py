"""A rank of the all-reduce benchmark: every implementation in one process, in turns, at the sizes it is told.

Started as `python -m mpi4py -m hpc.bench_reducer SPEC`; SPEC is JSON: the driver's `address`, `sizes` (bytes, all that
will come), `bucket` (bytes, between hosts), `store` (a path for gloo's ranks to meet at) and `interface` (the network
they talk over). A number from the driver is a size: one round of it. Where it is another than before, buffers are
prepared and every implementation's result is checked first.

All values are zeros while the clock runs: sums in place, over and over, must not overflow. Waiting for the common start
costs no processor time where ranks share a host, for it would be taken from those who still work.

Legend: N floats of a size.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
from mpi4py import MPI

from collectives.comm import Comm
from collectives.layout import Layout
from collectives.leaves import Leaves
from collectives.plain import PlainSum
from collectives.plan import Plan
from hpc.bench import in_turns
from hpc.bench_crew import Gate
from hpc.bench_loop import join_gloo
from kernels.window import Meeting

TURN_S = 0.1  # a timing repeats what is quick until the slowest side needs about so long
REPEATS = 256  # but no more often
COLD = 16 << 20  # bytes from which on nothing is repeated: caches hold what the other implementations left in them
LONG = 64 << 20  # bytes beside which what a rested throttle lets through at once is nothing
TRIALS = 3
BURST = 256 << 10  # bytes that a rested throttle lets through at once (`hosts.py`)
PERIOD = 251 << 12  # floats after which the checked values repeat
SHORT = 4 << 20  # bytes up to which every host may as well do all the work itself
STREAMED = 4 << 20  # bytes a read from a socket may bring at most


class Side(NamedTuple):
    """One implementation at one size.

    given  [N] that goes in
    act    one operation; collective
    found  [N] where the result is then; None: this rank gets none
    of     the ranks whose values are summed in it
    """

    impl: str
    algorithm: str
    given: np.ndarray
    act: Callable[[], object]
    found: np.ndarray | None
    of: Sequence[int]


class Buffers:
    """Memory for all implementations but ours, which is used again at every size."""

    def __init__(self, size: int):
        self.mpi, self.gloo, self.source, self.target = (np.zeros(size, np.float32) for _ in range(4))


class Stream:
    """A TCP connection from the first rank of the first host to the first one of the second.

    Raises OSError where they do not reach each other.
    """

    def __init__(self, comm: Comm):
        self.sender, self.receiver = comm.islands[0][0], comm.islands[1][0]
        listener = socket.create_server(("", 0)) if comm.rank == self.receiver else None
        port = comm.gather(listener.getsockname()[1] if listener else 0)[self.receiver]
        self.socket: socket.socket | None = None
        if comm.rank == self.sender:
            self.socket = socket.create_connection((comm.hosts[self.receiver], port), timeout=60.0)
            self.socket.settimeout(None)
        if listener:
            self.socket = listener.accept()[0]
            listener.close()
        self.sends = comm.rank == self.sender

    def carry(self, given: np.ndarray, found: np.ndarray) -> None:
        """All bytes of `given` there, into `found` here; nothing on other ranks. Raises OSError if the peer is gone."""
        if self.socket is None:
            return
        if self.sends:
            return self.socket.sendall(given.view(np.uint8).data)
        space = found.view(np.uint8).data
        while space:
            came = self.socket.recv_into(space[:STREAMED])
            if not came:
                raise ConnectionError("the sender of the plain TCP stream is gone")
            space = space[came:]


class Reducer:
    """All implementations of this rank, and how they are timed.

    comm    ranks that hold one split each
    spec    the worker's values
    """

    def __init__(self, comm: Comm, spec: dict[str, Any]):
        self.comm, self.bucket = comm, spec["bucket"]
        self.buffers = Buffers(max(spec["sizes"]) // 4)
        join_gloo(spec["store"], comm.size, spec["interface"], comm.rank)
        self.stream = Stream(comm) if len(comm.islands) > 1 else None
        place = comm.neighbours.index(comm.rank)
        self.meeting = Meeting(comm.memory.flags(2), place, 0, 1, None) if len(comm.islands) == 1 else None
        self.meetings = self.rounds = self.repeats = self.size = 0
        self.sides: list[Side] = []

    def round(self, size: int) -> dict[str, Any]:
        """One timing of every implementation at a size in bytes: seconds of an operation on this rank."""
        if size != self.size:
            self._prepare(size)
        seconds: dict[int, float] = {}
        for number in in_turns(self.rounds, range(len(self.sides))):
            seconds[number] = self._timed(self.sides[number].act, self.repeats)
        self.rounds += 1
        names = [[side.impl, side.algorithm] for side in self.sides]
        return {"sides": names, "seconds": [seconds[k] for k in range(len(names))], "repeats": self.repeats}

    def _prepare(self, size: int) -> None:
        self.size = size
        self.sides = [*self._ours(size // 4), *self._others(size // 4)]
        for side in self.sides:
            check(self.comm, side)
        self.repeats = 1
        if size >= COLD:
            return
        trials = [[self._timed(side.act, 1) for _ in range(TRIALS)] for side in self.sides]
        slowest = max(statistics.median(taken) for taken in trials)
        self.repeats = max(1, min(REPEATS, int(TURN_S / max(self.comm.gather(slowest)))))

    def _timed(self, act: Callable[[], object], repeats: int) -> float:
        if repeats > 1 or (self.stream is not None and self.size < LONG):
            for _ in range(min(repeats, -(-BURST // self.size))):
                act()  # brings its memory back into the caches, and takes what a rested throttle lets through
        self._meet()
        began = time.perf_counter()
        for _ in range(repeats):
            act()
        return (time.perf_counter() - began) / repeats

    def _meet(self) -> None:
        if self.meeting is None:
            return self.comm.barrier()
        self.meetings += 1
        self.meeting(self.meetings, lambda rank: None)

    # -- the implementations ----------------------------------------------------------------------------------------

    def _ours(self, count: int) -> list[Side]:
        comm, several = self.comm, len(self.comm.islands) > 1
        algorithms = ["owners"]
        if several:
            algorithms += ["everyone"] * (4 * count <= SHORT) + ["ring"]
        leaves = Leaves(comm, count)
        common = comm.memory.common(count) if several else leaves.first  # in place, as MPI's
        sides = []
        for algorithm in algorithms:
            layout = Layout(count, comm.islands, self.bucket // 4 if several else count, algorithm == "everyone")
            plan = Plan(
                leaves, [common] * len(comm.neighbours), common, layout,
                algorithm="ring" if algorithm == "ring" else "owners", totals="result",
            )
            act = PlainSum(comm, common, plan)
            sides.append(Side("trireme", algorithm, leaves.mine[0].numpy(), act, common.numpy(), range(comm.size)))
        return sides

    def _others(self, count: int) -> list[Side]:
        everyone, mine = range(self.comm.size), [self.comm.rank]
        mpi, gloo, source, target = (
            buffer[:count] for buffer in (self.buffers.mpi, self.buffers.gloo, self.buffers.source, self.buffers.target)
        )
        tensor = torch.from_numpy(gloo)
        sides = [
            Side("mpi", "in place", mpi, lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, mpi), mpi, everyone),
            Side("gloo", "", gloo, lambda: torch.distributed.all_reduce(tensor), gloo, everyone),
            Side("memcpy", "", source, lambda: np.copyto(target, source), target, mine),
        ]
        if self.stream is not None:
            stream = self.stream
            found = target if self.comm.rank == stream.receiver else None
            sides.append(Side("tcp", "", source, lambda: stream.carry(source, target), found, [stream.sender]))
        return sides


def check(comm: Comm, side: Side) -> None:
    """Run an implementation once on known values, see that the result is right, and leave zeros (collective).

    The values are whole numbers, so that any order of additions gives the same sum. Raises ValueError, on all ranks, if
    a value is wrong on any.
    """
    ramp = np.arange(min(PERIOD, len(side.given)), dtype=np.float32) % 251
    for at in range(0, len(side.given), PERIOD):
        block = side.given[at : at + PERIOD]
        block[:] = ramp[: len(block)] + comm.rank
    comm.barrier()
    side.act()
    bad = sum(comm.gather(0 if side.found is None else _wrong(side.found, ramp, side.of)))
    if bad:
        raise ValueError(f"{side.impl} {side.algorithm}: {bad} of {len(side.given)} sums are wrong, over all ranks")
    side.given[:] = 0.0
    side.act()
    comm.barrier()


def _wrong(found: np.ndarray, ramp: np.ndarray, ranks: Sequence[int]) -> int:
    """How many values are not the sum of what `check` gave these ranks."""
    many, rest = len(ranks), sum(ranks)
    blocks = [found[at : at + PERIOD] for at in range(0, len(found), PERIOD)]
    return sum(int((block != many * ramp[: len(block)] + rest).sum()) for block in blocks)


def work(spec: dict[str, Any]) -> None:
    """Take rounds until dismissed."""
    torch.set_num_threads(1)
    comm = Comm.start()
    reducer = Reducer(comm, spec)
    gate = Gate(spec["address"], {"rank": comm.rank, "hosts": sorted(set(comm.hosts))})
    while size := gate.wait():
        gate.report(reducer.round(size))
    torch.distributed.destroy_process_group()
    comm.finish()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
