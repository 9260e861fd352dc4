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


class NcclExchange:
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

    threaded = False

    def __init__(
        self, comm: Comm, weights: torch.Tensor, leaves: Leaves, bucket: int, link: Link, *, apply: Apply,
        deferred: bool = False, note: Callable[[str, int, int], None] = lambda name, begin, end: None,
    ):
        self.comm, self.leaves, self.link = comm, leaves, link
        self.apply, self.deferred, self.note = apply, deferred, note
        self.lane = lane_of(weights.device)
        layout = Layout(len(weights), [list(range(comm.size))], bucket)
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
        self.order = list(range(len(self.plan.work)))  # in which buckets set out; the same on all ranks
        self.learned = False
        self.active_s = 0.0
        self._filled: list[bool] = []
        self._under_way: list[tuple[str, int, Callable[[float], bool] | None]] = []
        self._started = 0
        self._since = 0.0

    def enter(self, split: int) -> torch.Tensor:
        """The zeroed buffer [P] that the gradient of this split is to be added into."""
        if split == self.comm.splits[0]:
            self.learned, self._started, self._filled = False, 0, [False] * len(self.order)
        return self.leaves.mine[self.leaves.steps[split].buffer].zero_()

    def full(self, bucket: int) -> None:
        """This bucket of the last split's gradient is final on this rank."""
        self.learned = True
        self._fill(bucket)

    def stepped(self, split: int, count: int) -> None:
        """The whole gradient of this split, over `count` items, is final: add it up with those before it."""
        self.learned |= count > 0
        for into, added in self.leaves.steps[split].adds:
            self.leaves.add_(into, added)
        if split == self.comm.splits[-1]:
            for bucket, filled in enumerate(self._filled):
                if not filled:
                    self._fill(bucket)

    def poll(self) -> None:
        """Look what is done."""
        while self._under_way:
            name, began, mark = self._under_way[0]
            if mark is not None and not mark(0.0):
                return
            self.note(name, began, time.monotonic_ns())
            del self._under_way[0]

    def finish(self) -> bool:
        """Until the new weights are there, or, if deferred, every sum is; whether any rank had something to add."""
        self._wait()
        self.learned = bool(self.flag.item())
        return self.learned if self.deferred else self.share()

    def share(self) -> bool:
        """After `finish` of a deferred exchange: apply, and bring the results to every rank; returns as `finish`."""
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
        self.active_s += time.monotonic() - self._since
        return self.learned

    def run_through(self) -> None:
        """A whole turn of empty gradients, to see how long it takes."""
        for split in self.comm.splits:
            self.enter(split)
            self.stepped(split, 1)
        self.finish()
        if self.deferred:
            self.share()

    def close(self) -> None:
        """Nothing runs by itself here."""

    def waiting_for(self) -> str:
        """What is being waited for, for whoever must explain a hang; "" if nothing is."""
        return f"{self._under_way[0][0]} waits for NCCL, which does not say for whom" if self._under_way else ""

    def _fill(self, bucket: int) -> None:
        self._filled[bucket] = True
        while self._started < len(self.order) and self._filled[bucket := self.order[self._started]]:
            if not self._started:
                self._since = time.monotonic()
            self._started += 1
            self._set_out(bucket)

    def _set_out(self, bucket: int) -> None:
        began = time.monotonic_ns()
        work = self.plan.work[bucket]
        self.lane.follow()
        with self.lane.working():
            for other in self.held[1:]:
                self.held[0][work.low : work.high].add_(other[work.low : work.high])
            self.flag.fill_(self.learned)  # the last bucket's counts
            self.link.sum_up(self.sums[bucket], self.flag)
            self._under_way.append((f"bucket {bucket} reduce", began, self.lane.mark()))

    def _wait(self) -> None:
        while self._under_way:
            self.poll()
            self.link.check()
            if self._under_way:
                time.sleep(NAP_S)
