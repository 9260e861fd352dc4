"""An all-reduce in one call: the sum of what every rank holds, without an update or a backward to hide it behind.

What the exchange does with buckets one after another is done in a straight line where it is one bucket on CPUs: for
messages of a few KiB the steps of a program count, not the bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from collectives.comm import Comm, PeerLost
from collectives.exchange import LOOK_S, Exchange
from collectives.plan import Parcel, Plan
from kernels.window import Meeting, TreeSum


class PlainSum:
    """Sums of gradients that lie in the leaves already, where every rank holds one split.

    comm    the ranks; each holds one split
    common  [P] where the sum is in the end
    plan    who sums and sends what, with `totals="result"`
    """

    def __init__(self, comm: Comm, common: torch.Tensor, plan: Plan):
        self.comm, self.plan = comm, plan
        self.exchange = Exchange(comm, common, plan)
        self.flags, self.me = self.exchange.flags, self.exchange.me
        self.turn = 0
        self._sum = self._chosen()

    def __call__(self) -> None:
        """One sum (collective). Raises PeerLost if a neighbour is gone."""
        self.turn += 1
        self._sum()

    def _chosen(self) -> Callable[[], None]:
        """The straightest way for this plan."""
        work, comm = self.plan.work[0], self.comm
        sums = [block.sum_up for own in work.own for block in own.blocks]
        kernels = [one for one in sums if isinstance(one, TreeSum)]
        plain = len(self.plan.work) == 1 and self.plan.wire is None and self.exchange.common is self.plan.result
        plain &= self.exchange.common.device.type == "cpu" and len(kernels) == len(sums) <= 1
        if plain and len(comm.islands) == 1 and self.flags.library is not None:
            meeting = Meeting(self.flags, self.me, 0, 1, kernels[0] if kernels else None)
            return lambda: meeting(self.turn, self._look_after)
        if plain and len(comm.islands) > 1 and self.plan.layout.everyone:
            self.summing = self._summing()
            return self._swapped
        return self._exchanged

    def _exchanged(self) -> None:
        """The exchange's own turn."""
        split = self.comm.splits[0]
        self.exchange.begin()
        self.exchange.stepped(split, 1)
        self.exchange.finish()

    def _swapped(self) -> None:
        """Every island sends every other what it holds, and adds up.

        Who sums waits until all gradients are there, and everybody for those who sum: nobody else, for with more ranks
        than cores each wait is a change of process.
        """
        work = self.plan.work[0]
        for parcel in work.awaited:
            parcel.message.start()
        self.flags.post(self.me, 0, self.turn)
        if self.me not in self.summing:
            return self._wait(1, self.summing)
        self._wait(0, range(len(self.comm.neighbours)))
        for duty in work.duties:
            duty.sum_up()
            duty.target.message.start()
        _await(work.awaited)
        for own in work.own:
            for block in own.blocks:
                block.sum_up()
        _await(work.sent)
        self.flags.post(self.me, 1, self.turn)
        self._wait(1, self.summing)

    def _summing(self) -> list[int]:
        """The places of the neighbours that sum, for this island or for another."""
        comm, layout = self.comm, self.plan.layout
        pieces = [(k, p) for i in range(len(comm.islands)) for k, p in enumerate(layout.pieces(0, i)) if p.low < p.high]
        return sorted({comm.neighbours.index(layout.partner(place, comm.island)) for place, _ in pieces})

    def _wait(self, flag: int, places: Sequence[int]) -> None:
        """Until so many neighbours' flags are up."""
        for place in places:
            while place != self.me and not self.flags.wait(place, flag, self.turn, LOOK_S):
                self._look_after(place)

    def _look_after(self, place: int) -> None:
        rank = self.comm.neighbours[place]
        if not self.comm.alive(rank):
            raise PeerLost(f"{self.comm.name_of(rank)} is gone; the sum waited for it")


def _await(parcels: Sequence[Parcel]) -> None:
    """Until all are through; whoever needs the core in between has it."""
    for parcel in parcels:
        while not parcel.message.arrived():
            os.sched_yield()
