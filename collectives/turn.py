"""A turn of an exchange, as strategies see it: gradients go in split by split, full buckets set out, results come back.

Which bucket sets out when is the same on all ranks, and settled here; how its sums cross is settled by who inherits:
`exchange.Exchange`, or `nccl.NcclExchange`.

Legend: P floats of the flat buffer.
"""

from __future__ import annotations

import torch

from collectives.comm import Comm
from collectives.leaves import Leaves


class Turn:
    """The turns of one exchange: `enter` every split, `stepped` after each, `full` for buckets final before that.

    comm      the ranks and their splits
    leaves    the buffers that gradients are added into
    buckets   how many there are
    deferred  whether results wait until `share` is called, because they need something of all sums first

    Then `finish`, and `share` if deferred.
    """

    threaded = False  # whether a thread moves buckets on while this rank computes

    def __init__(self, comm: Comm, leaves: Leaves, buckets: int, deferred: bool):
        self.comm, self.leaves, self.deferred = comm, leaves, deferred
        self.order = list(range(buckets))  # in which buckets set out; the same on all ranks
        self.learned = False  # whether any split of any rank had something to add, in the turn just finished
        self.active_s = 0.0  # seconds so far in which an exchange was under way beside this rank's computing
        self._mine_learned = False
        self._filled = [False] * buckets
        self._started = 0  # buckets that set out

    # -- what strategies call ---------------------------------------------------------------------------------------

    def enter(self, split: int) -> torch.Tensor:
        """The zeroed buffer [P] that the gradient of this split is to be added into."""
        if split == self.comm.splits[0]:
            self.begin()
        return self.leaves.mine[self.leaves.steps[split].buffer].zero_()

    def begin(self) -> None:
        """A turn begins; `enter` calls it for the first split."""
        self._mine_learned = self.learned = False
        self._filled = [False] * len(self.order)
        self._started = 0

    def full(self, bucket: int) -> None:
        """This bucket of the last split's gradient is final on this rank."""
        self._mine_learned = True
        self._fill(bucket)

    def stepped(self, split: int, count: int) -> None:
        """The whole gradient of this split, over `count` items, is final: add it up with those before it."""
        self._mine_learned |= count > 0
        for into, added in self.leaves.steps[split].adds:
            self.leaves.add_(into, added)
        if split == self.comm.splits[-1]:
            for bucket, filled in enumerate(self._filled):
                if not filled:
                    self._fill(bucket)

    def poll(self) -> None:
        """Move on what can be moved without waiting."""
        raise NotImplementedError

    def finish(self) -> bool:
        """Until every bucket's result is there, or, if deferred, every sum is.

        Returns whether any split of any rank had something to add (if deferred, only `share` can tell).
        """
        raise NotImplementedError

    def share(self) -> bool:
        """After `finish` of a deferred exchange: apply, and bring the results to every rank; returns as `finish`."""
        raise NotImplementedError

    def run_through(self) -> None:
        """A whole turn of empty gradients, to see how long it takes."""
        for split in self.comm.splits:
            self.enter(split)
            self.stepped(split, 1)
        self.finish()
        if self.deferred:
            self.share()

    def close(self) -> None:
        """The exchange is not used again."""

    def waiting_for(self) -> str:
        """What is being waited for, for whoever must explain a hang; "" if nothing is."""
        raise NotImplementedError

    # -- what inheritors settle -------------------------------------------------------------------------------------

    def _fill(self, bucket: int) -> None:
        """This bucket is full; those set out of which all before them in the order are."""
        self._filled[bucket] = True
        while self._started < len(self.order) and self._filled[bucket := self.order[self._started]]:
            if not self._started:
                self._before_the_first()
            self._started += 1
            self._set_out(bucket)

    def _before_the_first(self) -> None:
        """The first bucket of a turn is about to set out."""

    def _set_out(self, bucket: int) -> None:
        """A full bucket's exchange begins."""
        raise NotImplementedError
