"""The exchange: gradients summed by their owners, and what the owners make of them brought to every rank.

Gradients live in windows that all ranks of an island see (Comm), and backward writes into them. A bucket that is final
on every rank of an island is summed where it lies: each rank reads the others' part of its own piece, in the tree over
splits, and hands the sum to `apply`, which writes the result into memory common to the island: nothing is copied.
Several islands send each other partial sums of the pieces that the other owns, and the results back; each rank of an
island talks to a partner in the other, so that all links carry their share, 2 (H - 1) / H of the bytes with H islands.

Every bucket is a small program of its own (`_bucket`) that stops where it has to wait. They run whenever somebody
calls `poll`: a thread beside backward, the hooks that say that a bucket is full, and at last `finish`. Paper 002,
section 3.1, calls the owners' scheme O(1) aggregation.

Legend: P floats of the flat buffer, K ranks, H islands.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from collectives.comm import Comm, PeerLost
from collectives.lane import lane_of
from collectives.plan import Block, Get, Parcel, Plan, Work
from collectives.turn import Turn
from kernels.window import Flags

LOOK_S = 0.1  # how often a rank that waits looks whether the awaited one still lives
NAP_S = 1e-4  # between two looks of who has nothing else to do
LONG_NAP_S = 5e-4  # between two looks of the thread beside backward: the cores are backward's
AT_ONCE = 4  # buckets that this thread looks after; those behind them are not through before them
SPIN_S = 3e-4  # how long a rank that only waits keeps looking without a nap

Apply = Callable[[torch.Tensor, int], None]  # (the sum of a block, its first float): write the result into `common`


class Wait(NamedTuple):
    """What a bucket waits for: `over(patience in seconds)` says whether it is there."""

    peer: int
    what: str
    over: Callable[[float], bool]


def rest(quiet_s: float, patient: bool = False) -> None:
    """Before looking again: give the processor to whom is waited for.

    quiet_s  for how long nothing came, or it has waited
    patient  whether the core is needed by another thread of this rank
    """
    if patient:
        time.sleep(LONG_NAP_S)
    elif quiet_s < SPIN_S:
        os.sched_yield()
    else:
        time.sleep(NAP_S)


START = Wait(-1, "to begin", lambda patience: True)
HELD = Wait(-1, "to be let go", lambda patience: False)


@dataclass
class _Run:
    """A bucket on its way."""

    bucket: int
    program: Iterator[Wait]
    wait: Wait = START


class Exchange(Turn):
    """Sums of P floats over all splits, bucket by bucket, turn by turn.

    comm      the ranks and their splits
    common    [P] where results are in the end, and what `apply` changes; may be memory of each rank's own
    plan      who sums and sends what
    apply     makes a result of a sum, block by block; None: the sum is the result
    deferred  whether `apply` waits until `share` is called, because it needs something of all sums first
    threaded  whether a thread moves buckets on while this rank computes
    note      told of every bucket's way: (name, begin, end) in time.monotonic_ns

    `finish` raises PeerLost, or what `apply` raised.
    """

    def __init__(
        self, comm: Comm, common: torch.Tensor, plan: Plan, *, apply: Apply | None = None, deferred: bool = False,
        threaded: bool = False, note: Callable[[str, int, int], None] = lambda name, begin, end: None,
    ):
        super().__init__(comm, plan.leaves, len(plan.work), deferred)
        self.common, self.plan = common, plan
        self.apply, self.threaded, self.note = apply, threaded, note
        self.lane = lane_of(common.device)
        self.flags: Flags = comm.memory.flags(2 * len(plan.work))  # of bucket b: 2 b is "full", 2 b + 1 is "done"
        self.me = comm.neighbours.index(comm.rank)
        self.turn = 0
        self._runs: list[_Run] = []
        self._failure: BaseException | None = None
        self._since = self._inline_s = 0.0
        self._released = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._finishing = self._closed = False
        if threaded:
            threading.Thread(target=self._beside, name="exchange", daemon=True).start()

    # -- one turn ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        super().begin()
        self._released = not self.deferred
        self.turn += 1

    def _before_the_first(self) -> None:
        for parcel in self.plan.awaited:
            parcel.message.start()

    def _set_out(self, bucket: int) -> None:
        if not self._runs:
            self._since = time.monotonic()
        self._runs.append(_Run(bucket, self._bucket(bucket, self.plan.work[bucket], self.lane.mark())))
        if self.threaded:
            self._wake.set()

    def finish(self) -> bool:
        self._finishing = True
        with self._lock:
            quiet_since = looked = time.monotonic()
            while self._failure is None and not self._settled():
                if self._advance():
                    quiet_since = time.monotonic()
                    continue
                now = time.monotonic()
                if now - looked > LOOK_S:
                    looked = now
                    self._look_after_peers()
                self._rest(now - quiet_since)
            if self._failure is not None:
                raise self._failure
        self._finishing = False
        self.active_s = max(0.0, self.active_s - self._inline_s)  # what this rank did itself was not hidden from it
        self._inline_s = 0.0
        return self.learned

    def share(self) -> bool:
        self._released = True
        return self.finish()

    def close(self) -> None:
        """End the thread; the exchange is not used again."""
        self._closed = True
        self._wake.set()

    def waiting_for(self) -> str:
        runs = [run for run in self._runs if run.wait.peer >= 0]
        if not runs:
            return ""
        said = {f"bucket {run.bucket} of {len(self.plan.work)} waits for {self._said(run.wait)}" for run in runs[:4]}
        return "; ".join(sorted(said))

    def _said(self, wait: Wait) -> str:
        return f"{wait.what} of {self.comm.name_of(wait.peer)}"

    # -- moving buckets on ------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """What fails is kept for `finish`."""
        began = time.monotonic()
        if self._runs and self._lock.acquire(blocking=False):
            try:
                self._advance()
            finally:
                self._lock.release()
            self._inline_s += time.monotonic() - began

    def _settled(self) -> bool:
        if self._released:
            return not self._runs
        return all(run.wait is HELD for run in self._runs)

    def _advance(self, at_most: int | None = None) -> bool:
        """Let every bucket, or the first so many, go as far as it can; whether any did. What is raised ends all."""
        moved = False
        for run in [run for run in self._runs if self._released or run.wait is not HELD][:at_most]:
            try:
                while self._released if run.wait is HELD else run.wait.over(0.0):
                    moved = True
                    with self.lane.working():
                        run.wait = next(run.program)
            except StopIteration:
                self._runs.remove(run)
                if not self._runs and not self.comm.alone:
                    self.active_s += time.monotonic() - self._since
            except BaseException as error:  # raised again where the turn is finished
                self._failure = self._explained(error, run)
                return True
        return moved

    def _explained(self, error: BaseException, run: _Run) -> BaseException:
        if not type(error).__module__.startswith("mpi4py") or run.wait.peer < 0:
            return error
        where = f"bucket {run.bucket} of {len(self.plan.work)}"
        lost = PeerLost(f"{where} failed when it last waited for {self._said(run.wait)}: {error}")
        lost.__cause__ = error
        return lost

    def _rest(self, quiet_s: float) -> None:
        """Sleep until a flag is raised, where that is what is waited for; else `rest`."""
        first = next((run for run in self._runs if run.wait is not HELD), None)
        if first is not None and len(self.comm.islands) == 1:
            first.wait.over(LOOK_S)  # only flags can be waited for: sleep until that one is raised
        else:
            rest(quiet_s)

    def _look_after_peers(self) -> None:
        for run in self._runs:
            if run.wait.peer >= 0 and not self.comm.alive(run.wait.peer):
                self._failure = PeerLost(
                    f"{self.comm.name_of(run.wait.peer)} is gone; bucket {run.bucket} of {len(self.plan.work)} waited "
                    f"for its {run.wait.what}"
                )

    def _beside(self) -> None:
        """The thread: while this rank computes, look after its buckets now and then."""
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            while self._runs and self._failure is None and not self._finishing:
                moved = False
                if self._lock.acquire(blocking=False):
                    try:
                        moved = self._advance(AT_ONCE)
                    finally:
                        self._lock.release()
                time.sleep(NAP_S if moved else LONG_NAP_S)

    # -- a bucket's way ---------------------------------------------------------------------------------------------

    def _bucket(self, bucket: int, work: Work, filled: Callable[[float], bool] | None) -> Iterator[Wait]:
        """Full everywhere on the island; partial sums out; own sums; results; done everywhere on the island."""
        began = time.monotonic_ns()
        yield from self._drained(filled)
        self.flags.post(self.me, 2 * bucket, self.turn, self._mine_learned)
        yield from self._all(2 * bucket, "gradient")
        here = self._any_learned(2 * bucket)
        anywhere = here
        for duty in work.duties:
            some = here
            if duty.source is not None:
                yield self._came(duty.source, "partial sum")
                some |= duty.source.unpack()
            if some:
                duty.sum_up()
                duty.target.pack()
                yield from self._drained(self.lane.mark())
            duty.target.message.start(empty=not some)
        for own in work.own:
            for source in own.sources:
                yield self._came(source, "partial sum")
                anywhere |= source.unpack()
        blocks = [block for own in work.own for block in own.blocks] if anywhere else []
        at = self._noted(bucket, "reduce", began)
        for block in blocks:
            block.sum_up()
            if not self.deferred:
                self._make(block)
        if self.deferred:
            sent = [self._came(duty.target, "readiness to receive") for duty in work.duties]
            yield from (*self._drained(self.lane.mark()), *sent, HELD)  # while it is held nobody looks after messages
            at = time.monotonic_ns()
            for block in blocks:
                self._make(block)
        at = self._noted(bucket, "update", at)
        for own in work.own:
            if own.targets:
                yield from self._drained(self.lane.mark())
            for target in own.targets:
                target.message.start(empty=not anywhere)
        for get in work.gets:
            yield self._came(get.source, "result")
            if get.source.message.received:
                anywhere = True
                self._take(get)
            for target in get.targets:
                target.message.start(empty=not get.source.message.received)
        for parcel in work.sent:
            yield self._came(parcel, "readiness to receive")
        yield from self._drained(self.lane.mark())
        self.flags.post(self.me, 2 * bucket + 1, self.turn, anywhere)
        yield from self._all(2 * bucket + 1, "part of the result")
        self.learned |= self._any_learned(2 * bucket + 1)
        if self.learned:
            for there, here_too in work.pulls:
                here_too.copy_(there)
        yield from self._drained(self.lane.mark())
        self._noted(bucket, "share", at)

    def _noted(self, bucket: int, part: str, began: int) -> int:
        """Tell of a part of a bucket's way that ends now; returns now."""
        now = time.monotonic_ns()
        self.note(f"bucket {bucket} {part}", began, now)
        return now

    def _drained(self, mark: Callable[[float], bool] | None) -> Iterator[Wait]:
        if mark is not None:
            yield Wait(self.comm.rank, "arithmetic", mark)

    def _all(self, flag: int, what: str) -> Iterator[Wait]:
        for k, rank in enumerate(self.comm.neighbours):
            if rank != self.comm.rank:
                yield Wait(rank, what, self._raised(k, flag))

    def _raised(self, k: int, flag: int) -> Callable[[float], bool]:
        return lambda patience: self.flags.wait(k, flag, self.turn, patience)

    def _came(self, parcel: Parcel, what: str) -> Wait:
        return Wait(parcel.message.peer, what, lambda patience: parcel.message.arrived())

    def _any_learned(self, flag: int) -> bool:
        return any(self.flags.learned(k, flag, self.turn) for k in range(len(self.flags.at)))

    def _make(self, block: Block) -> None:
        """The result of a block's sum; where the wire is narrow, what it grew by is rounded before it counts."""
        values = self.common[block.low : block.low + len(block.total)]
        if self.apply is None:
            if block.change is not None:
                block.total.copy_(block.change.copy_(block.total))
        elif block.change is None:
            self.apply(block.total, block.low)
        else:
            before = values.clone()
            self.apply(block.total, block.low)
            block.change.copy_(values - before)
            torch.add(before, block.change.float(), out=values)
        if self.apply is not None and values.data_ptr() != block.result.data_ptr():
            block.result.copy_(values)

    def _take(self, get: Get) -> None:
        """Bring another island's result into this island's memory; a float32 one is there already."""
        carried = get.source.values
        if carried is get.result:
            return
        if self.apply is None:
            get.result.copy_(carried)
        else:
            torch.add(self.common[get.low : get.low + len(carried)], carried.float(), out=get.result)
