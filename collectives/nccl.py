"""The exchange by NCCL: buckets are summed to their owners while backward runs, and new weights spread after it.

The same turns as `exchange.Exchange`, for `AllReduce`. NCCL adds in an order of its own, which depends on the ranks and
the machine: unlike the owners' algorithm it does not promise the same bits for another number of ranks. It wants the
same calls in the same order on all ranks, so all sums of a turn come before what is made of them.

Legend: P floats of the flat buffer, K ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from collectives.comm import Comm
from collectives.exchange import Apply
from collectives.lane import lane_of
from collectives.layout import Layout
from collectives.leaves import Leaves
from collectives.plan import Block, Own, Work
from collectives.turn import Turn

NAP_S = 1e-4

Pieces = Sequence[tuple[int, torch.Tensor]]  # (the owner's rank, floats)


class Link(Protocol):
    """What links all ranks (`kernels.gpu.NcclLink`): calls that are queued where the lane works."""

    def sum_up(self, pieces: Pieces, flag: torch.Tensor) -> None: ...
    def spread(self, pieces: Pieces) -> None: ...
    def check(self) -> None: ...


@dataclass
class _Plan:
    layout: Layout
    work: list[Work]


class NcclExchange(Turn):
    """Sums of P floats over all splits, bucket by bucket, turn by turn.

    comm      the ranks and their splits
    weights   [P], what `apply` changes
    leaves    this rank's gradient buffers, seen by nobody else
    bucket    floats of a bucket
    link      of all ranks
    apply     makes new weights of the sum of an owned piece
    deferred  whether it waits until `share` is called
    note      told of every bucket's way: (name, begin, end) in time.monotonic_ns
    """

    def __init__(
        self, comm: Comm, weights: torch.Tensor, leaves: Leaves, bucket: int, link: Link, *, apply: Apply,
        deferred: bool = False, note: Callable[[str, int, int], None] = lambda name, begin, end: None,
    ):
        layout = Layout(len(weights), [list(range(comm.size))], bucket)
        super().__init__(comm, leaves, len(layout.buckets), deferred)
        self.link, self.apply, self.note = link, apply, note
        self.lane = lane_of(weights.device)
        self.held = list(leaves.near(0, len(weights)).values())  # partial sums of this rank's splits, [P] each
        self.sums: list[Pieces] = []
        self.news: list[Pieces] = []
        self.plan = _Plan(layout, [])
        for number, (low, high) in enumerate(layout.buckets):
            pieces = [piece for piece in layout.pieces(number, 0) if piece.low < piece.high]
            self.sums.append([(p.owner, self.held[0][p.low : p.high]) for p in pieces])
            self.news.append([(p.owner, weights[p.low : p.high]) for p in pieces])
            mine = [
                Block(p.low, self.held[0][p.low : p.high], weights[p.low : p.high], None, lambda: None)
                for p in pieces if p.owner == comm.rank
            ]
            self.plan.work.append(Work(low, high, own=[Own([], mine, [])]))
        self.flag = torch.zeros(1, dtype=torch.int32, device=weights.device)
        # Bytes of a turn, as owners would exchange them: NCCL does not say which ways it takes.
        owned = 4 * sum(high - low for low, high in layout.owned(comm.rank))
        self.bytes = {"reduce": 4 * len(weights) - owned, "share": owned * (comm.size - 1)}
        self._under_way: list[tuple[str, int, Callable[[float], bool] | None]] = []
        self._since = 0.0

    def poll(self) -> None:
        while self._under_way:
            name, began, mark = self._under_way[0]
            if mark is not None and not mark(0.0):
                return
            self.note(name, began, time.monotonic_ns())
            del self._under_way[0]

    def finish(self) -> bool:
        self._wait()
        self.learned = bool(self.flag.item())
        return self.learned if self.deferred else self.share()

    def share(self) -> bool:
        if self.learned:
            self.lane.follow()
            for bucket in self.order:
                began = time.monotonic_ns()
                with self.lane.working():
                    for block in self.plan.work[bucket].own[0].blocks:
                        self.apply(block.total, block.low)
                    self.link.spread(self.news[bucket])
                    self._under_way.append((f"bucket {bucket} share", began, self.lane.mark()))
            self._wait()
            self.comm.sent.update(self.bytes)
        self.active_s += time.monotonic() - self._since
        return self.learned

    def waiting_for(self) -> str:
        return f"{self._under_way[0][0]} waits for NCCL, which does not say for whom" if self._under_way else ""

    def _before_the_first(self) -> None:
        self._since = time.monotonic()

    def _set_out(self, bucket: int) -> None:
        began = time.monotonic_ns()
        work = self.plan.work[bucket]
        self.lane.follow()
        with self.lane.working():
            for other in self.held[1:]:
                self.held[0][work.low : work.high].add_(other[work.low : work.high])
            self.flag.fill_(self._mine_learned)  # the last bucket's counts
            self.link.sum_up(self.sums[bucket], self.flag)
            self._under_way.append((f"bucket {bucket} reduce", began, self.lane.mark()))

    def _wait(self) -> None:
        while self._under_way:
            self.poll()
            self.link.check()
            if self._under_way:
                time.sleep(NAP_S)
