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
from functools import partial
from typing import NamedTuple

import torch

from collectives.comm import Comm, PeerLost
from collectives.lane import lane_of
from collectives.plan import Block, Get, Parcel, Plan, Work
from kernels.window import Flags, Meeting, TreeSum

LOOK_S = 0.1  # how often a rank that waits looks whether the awaited one still lives
NAP_S = 1e-4  # between two looks of who has nothing else to do
LONG_NAP_S = 5e-4  # between two looks of the thread beside backward: the cores are backward's
LOOKS = 50  # of a rank that only waits, before it lets others have the core
AT_ONCE = 4  # buckets that this thread looks after; those behind them are not through before them
SPIN_S = 3e-4  # how long a rank that only waits keeps looking without a nap

Apply = Callable[[torch.Tensor, int], None]  # (the sum of a block, its first float): write the result into `common`


class Wait(NamedTuple):
    """What a bucket waits for: `over(patience in seconds)` says whether it is there."""

    peer: int
    what: str
    over: Callable[[float], bool]


START = Wait(-1, "to begin", lambda patience: True)
HELD = Wait(-1, "to be let go", lambda patience: False)


@dataclass
class _Run:
    """A bucket on its way."""

    bucket: int
    program: Iterator[Wait]
    wait: Wait = START


class Exchange:
    """Sums of P floats over all splits, bucket by bucket, turn by turn.

    comm      the ranks and their splits
    common    [P] where results are in the end, and what `apply` changes; may be memory of each rank's own
    plan      who sums and sends what
    apply     makes a result of a sum, block by block; None: the sum is the result
    deferred  whether `apply` waits until `share` is called, because it needs something of all sums first
    threaded  whether a thread moves buckets on while this rank computes
    note      told of every bucket's way: (name, begin, end) in time.monotonic_ns

    One turn: `enter` every split, `stepped` after each, `full` for buckets that are final before that, `finish`.
    """

    def __init__(
        self, comm: Comm, common: torch.Tensor, plan: Plan, *, apply: Apply | None = None, deferred: bool = False,
        threaded: bool = False, note: Callable[[str, int, int], None] = lambda name, begin, end: None,
    ):
        self.comm, self.common, self.plan = comm, common, plan
        self.apply, self.deferred, self.threaded, self.note = apply, deferred, threaded, note
        self.lane = lane_of(common.device)
        self.flags: Flags = comm.flags(2 * len(plan.work))  # of bucket b: 2 b is "full", 2 b + 1 is "done"
        self.me = comm.neighbours.index(comm.rank)
        self.order = list(range(len(plan.work)))  # in which buckets set out; the same on all ranks
        self.turn = 0
        self.learned = False  # whether any split of any rank had something to add, in the turn just finished
        self.active_s = 0.0
        self._runs: list[_Run] = []
        self._mine_learned = False
        self._filled: list[bool] = []
        self._started = 0
        self._failure: BaseException | None = None
        self._since = self._inline_s = 0.0
        self._released = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._finishing = self._closed = False
        self._short_cut = self._at_once()
        if threaded:
            threading.Thread(target=self._beside, name="exchange", daemon=True).start()

    def _at_once(self) -> Callable[[], None] | None:
        """A short cut through a whole turn, where it is a plain sum in one bucket on CPUs; None if there is none."""
        work = self.plan.work[0]
        blocks = [block for own in work.own for block in own.blocks]
        sums = [block.sum_up for block in blocks if isinstance(block.sum_up, TreeSum)]
        plain = self.apply is None and self.plan.wire is None and self.common is self.plan.result
        plain &= len(self.plan.work) == 1 and self.common.device.type == "cpu" and len(sums) == len(blocks) <= 1
        if not plain:
            return None
        if len(self.comm.islands) == 1 and self.flags.library is not None:
            meeting = Meeting(self.flags, self.me, 0, 1, sums[0] if sums else None)
            return lambda: meeting(self.turn, self._look_after)
        everyone = len(self.comm.neighbours) == 1 and not work.gets and len(work.duties) == len(self.comm.islands) - 1
        return partial(self._swap, work, sums[0]) if everyone and sums else None

    def _swap(self, work: Work, total: TreeSum) -> None:
        """Everyone sends everyone what it holds, and adds up."""
        messages = [parcel.message for parcel in (*work.awaited, *work.sent)]
        for message in messages:
            message.start()
        looks = 0
        for message in messages:
            while not message.arrived():
                looks += 1
                if looks % LOOKS == 0:
                    os.sched_yield()
        total()

    # -- one turn ---------------------------------------------------------------------------------------------------

    def enter(self, split: int) -> torch.Tensor:
        """The zeroed buffer [P] that the gradient of this split is to be added into."""
        step = self.plan.leaves.steps[split]
        if split == self.comm.splits[0]:
            self._begin()
        return self.plan.leaves.mine[step.buffer].zero_()

    def _begin(self) -> None:
        self._mine_learned = self.learned = False
        self._filled = [False] * len(self.plan.work)
        self._started = 0
        self._released = not self.deferred
        self.turn += 1

    def full(self, bucket: int) -> None:
        """This bucket of the last split's gradient is final on this rank."""
        self._mine_learned = True
        self._fill(bucket)

    def stepped(self, split: int, count: int) -> None:
        """The whole gradient of this split, over `count` items, is final: add it up with those before it."""
        self._mine_learned |= count > 0
        for into, added in self.plan.leaves.steps[split].adds:
            self.plan.leaves.add_(into, added)
        if split == self.comm.splits[-1]:
            for bucket in range(len(self._filled)):
                if not self._filled[bucket]:
                    self._fill(bucket)

    def finish(self) -> bool:
        """Until every bucket's result is in `common`, or, if deferred, every sum is there.

        Returns whether any split of any rank had something to add (if deferred, only `share` can tell). Raises
        PeerLost, or what `apply` raised.
        """
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
        """After `finish` of a deferred exchange: apply, and bring the results to every rank; returns as `finish`."""
        self._released = True
        return self.finish()

    def sum_now(self) -> None:
        """A whole turn at once, of gradients that lie in the leaves already, where every rank holds one split."""
        if self._short_cut is not None:
            self.turn += 1
            return self._short_cut()
        self._begin()
        self._mine_learned = True
        for bucket in self.order:
            self._fill(bucket)
        self.finish()

    def run_through(self) -> None:
        """A whole turn of empty gradients, to see how long it takes."""
        for split in self.comm.splits:
            self.enter(split)
            self.stepped(split, 1)
        self.finish()
        if self.deferred:
            self.share()

    def close(self) -> None:
        """End the thread; the exchange is not used again."""
        self._closed = True
        self._wake.set()

    def waiting_for(self) -> str:
        """What is being waited for, for whoever must explain a hang; "" if nothing is."""
        runs = [run for run in self._runs if run.wait.peer >= 0]
        if not runs:
            return ""
        said = {f"bucket {run.bucket} of {len(self.plan.work)} waits for {self._said(run.wait)}" for run in runs[:4]}
        return "; ".join(sorted(said))

    def _said(self, wait: Wait) -> str:
        return f"{wait.what} of {self.comm.name_of(wait.peer)}"

    # -- moving buckets on ------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Move on what can be moved without waiting; what fails is kept for `finish`."""
        began = time.monotonic()
        if self._runs and self._lock.acquire(blocking=False):
            try:
                self._advance()
            finally:
                self._lock.release()
            self._inline_s += time.monotonic() - began

    def _fill(self, bucket: int) -> None:
        self._filled[bucket] = True
        opened = False
        while self._started < len(self.order) and self._filled[bucket := self.order[self._started]]:
            if not self._started:
                for parcel in self.plan.awaited:
                    parcel.message.start()
            if not self._runs:
                self._since = time.monotonic()
            self._runs.append(_Run(bucket, self._bucket(bucket, self.plan.work[bucket], self.lane.mark())))
            self._started += 1
            opened = True
        if opened and self.threaded:
            self._wake.set()

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
        """Give the processor to whom is waited for."""
        first = next((run for run in self._runs if run.wait is not HELD), None)
        if first is not None and len(self.comm.islands) == 1:
            first.wait.over(LOOK_S)  # only flags can be waited for: sleep until that one is raised
        elif quiet_s < SPIN_S:
            os.sched_yield()
        else:
            time.sleep(NAP_S)

    def _look_after_peers(self) -> None:
        for run in self._runs:
            if run.wait.peer >= 0 and not self.comm.alive(run.wait.peer):
                self._failure = PeerLost(
                    f"{self.comm.name_of(run.wait.peer)} is gone; bucket {run.bucket} of {len(self.plan.work)} waited "
                    f"for its {run.wait.what}"
                )

    def _look_after(self, place: int) -> None:
        rank = self.comm.neighbours[place]
        if not self.comm.alive(rank):
            raise PeerLost(f"{self.comm.name_of(rank)} is gone; the sum waited for it")

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
