"""What is between ranks, measured as exchanges use it: two stages of messages, one after the other, both ways."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from collectives.choice import BUCKETS
from collectives.comm import Comm
from collectives.exchange import rest

LEAST_BYTES = 64
ROUNDS, BUDGET_S = 9, 1.0
TRIALS = 3
REST_S = 0.05  # before every exchange, as training computes before it: a throttle that rested lets some pass at once


class Ring:
    """Every rank sends to the one with its place on the next node, and hears from the one before; where all ranks are
    on one node: from rank to rank.

    size    bytes that a rank sends in an exchange, half of them in each of its two stages
    pieces  messages of a stage; a piece goes into the second stage when the first has brought it
    """

    def __init__(self, comm: Comm, size: int, pieces: int = 1):
        self.done = 0  # exchanges so far
        islands = comm.islands if len(comm.islands) > 1 else [[rank] for rank in range(comm.size)]
        node = next(i for i, ranks in enumerate(islands) if comm.rank in ranks)
        place = islands[node].index(comm.rank)
        ahead, behind = (islands[(node + way) % len(islands)] for way in (1, -1))
        to, source = ahead[place % len(ahead)], behind[place % len(behind)]
        each = max(1, size // (2 * pieces))

        def parts() -> list[torch.Tensor]:
            return [torch.zeros(each, dtype=torch.uint8) for _ in range(2 * pieces)]

        sent = [comm.sending(part, to, tag, "plan") for tag, part in enumerate(parts())]
        awaited = [comm.receiving(part, source, tag) for tag, part in enumerate(parts())]
        self.sent, self.awaited = sent, awaited
        self.stages = [sent[:pieces], sent[pieces:]]
        self.expected = [awaited[:pieces], awaited[pieces:]]

    def exchange(self, patient: bool = False) -> None:
        """Both stages of all pieces; `patient`: the core is another thread's."""
        for message in (*self.awaited, *self.stages[0]):
            message.start()
        began = time.monotonic()
        waiting, moved = set(range(len(self.stages[0]))), True
        while waiting:
            here = {piece for piece in waiting if self.expected[0][piece].arrived()}
            for piece in sorted(here):
                self.stages[1][piece].start()
            waiting, moved = waiting - here, bool(here)
            if waiting and not moved:
                rest(time.monotonic() - began, patient)
        for message in (*self.expected[1], *self.sent):
            while not message.arrived():
                rest(time.monotonic() - began, patient)
        self.done += 1


def measure_link(comm: Comm, floats: int) -> dict[str, Any]:
    """Seconds of an exchange by the bytes that leave a node, as JSON values of `model.Link` (collective).

    floats  of the model: sizes go up to what float32 takes between two nodes, and down to nothing; a bit a value too
    """
    ranks = comm.local_size if len(comm.islands) > 1 else 1
    most = 4 * floats // ranks
    sizes = sorted({LEAST_BYTES, *(most >> shift for shift in (2, 4, 5, 7) if most >> shift > LEAST_BYTES)})
    streams = sorted({size: -(-size * ranks // BUCKETS[0]) for size in (most // 4, most)}.items())
    return {
        "both": _curve(comm, [(size, 1) for size in sizes], ranks), "streamed": _curve(comm, streams, ranks),
        "core": 0.0, "ranks": comm.size, "hosts": len(comm.islands),
    }


def _curve(comm: Comm, wanted: Sequence[tuple[int, int]], ranks: int) -> list[tuple[int, float]]:
    """(bytes that leave a node, seconds) of exchanges of so many bytes a rank, in so many pieces (collective)."""
    points, highest = [], 0.0
    for size, pieces in wanted:
        ring = Ring(comm, size, pieces)
        times: list[float] = []
        spent = 0.0
        while len(times) <= ROUNDS and (len(times) < 4 or spent < BUDGET_S):
            time.sleep(REST_S)
            comm.barrier()
            began = time.perf_counter()
            ring.exchange()
            times.append(max(comm.gather(time.perf_counter() - began)))
            spent += times[-1]
        highest = max(highest, statistics.median(times[1:]))  # more bytes never take less time
        points.append((size * ranks, highest))
    return points


def message_seconds(comm: Comm) -> float:
    """What a rank itself has to do for a message, sent and awaited: seconds, of one to itself."""
    ring = Ring(comm.apart(), LEAST_BYTES)
    times = []
    for _ in range(50):
        began = time.perf_counter()
        ring.exchange()
        times.append((time.perf_counter() - began) / len(ring.sent))
    return statistics.median(times)


def beside(comm: Comm, act: Callable[[], object], size: int) -> float:
    """Seconds that a byte which leaves, while another one comes, takes from the core that computes (collective).

    act   computes
    size  bytes of an exchange that goes on meanwhile, again and again, on a thread
    """
    ring = Ring(comm, size)
    act()
    return statistics.median(_beside(comm, act, ring, size) for _ in range(TRIALS))


def _beside(comm: Comm, act: Callable[[], object], ring: Ring, size: int, times: int = 5) -> float:
    """The same of one trial."""
    quiet = []
    for _ in range(times):
        comm.barrier()
        quiet.append(_timed(act))
    ring.exchange()
    comm.barrier()
    met = comm.gather([statistics.median(quiet), _timed(ring.exchange)])
    usual, once = (max(rank[k] for rank in met) for k in (0, 1))
    rounds = math.ceil(2.0 * times * usual / once) + 1  # they last longer than computing, and are as many everywhere

    def stream() -> None:
        for _ in range(rounds):
            ring.exchange(patient=True)

    thread = threading.Thread(target=stream)
    comm.barrier()
    ring.done = 0
    thread.start()
    spent = sum(_timed(act) for _ in range(times))
    moved = (ring.done + 0.5) * size
    thread.join()
    return max(0.0, statistics.mean(comm.gather((spent - times * statistics.median(quiet)) / moved)))


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
