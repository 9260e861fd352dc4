"""Sums and signals in memory that the ranks of a host share.

`TreeSum` adds many buffers in the order of a tree, in one pass over memory: blocks of them are added while they are in
the first cache, so that a sum of four costs four reads and one write, not six and three. `Flags` are how ranks tell
each other how far they are: a value a flag that only grows, set by its owner and awaited by anybody, asleep if it takes
long. `Meeting` is a whole all-reduce of one call: all are ready, each sums its part, all are done.

The CPU side is `src/window.cpp`; without it (no compiler) torch sums and Python polls. CUDA tensors are summed by
torch.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels import native

ADD = -1  # in a program: add the two topmost values
SPINS = 2000  # looks of a waiting rank before it lends its core: some microseconds
LINE = 16  # words of a flag: a cache line, so that ranks do not disturb each other's
LEARNED = 2  # the word of a flag that says in which turn its owner had something to add


class TreeSum:
    """out = the sum of `leaves`, added as `program` says.

    leaves   float32 tensors [n], contiguous, on one device
    program  postfix: the index of a leaf, or ADD; e.g. (l0 + l1) + l2 is [0, 1, ADD, 2, ADD]
    out      [n], written in place; may be the leaf that the program names first
    round_   what every value but the last sum is rounded to (torch.bfloat16, torch.float16), or None
    streams  whether `out` is written past the caches: right where it is large and not read soon

    The reference, for one leaf x after another: `stack.append(x)`, or `b, a = stack.pop(), stack.pop();
    stack.append(a + b)`. Every addition is one float32 addition, on both sides, so results are equal bit for bit.
    """

    def __init__(
        self, leaves: Sequence[torch.Tensor], program: Sequence[int], out: torch.Tensor,
        round_: torch.dtype | None = None, streams: bool = False,
    ):
        assert all(t.dtype == torch.float32 and t.is_contiguous() and t.shape == out.shape for t in (*leaves, out))
        assert sorted(program) == [ADD] * (len(leaves) - 1) + list(range(len(leaves)))
        self.leaves, self.program, self.out, self.round_ = list(leaves), list(program), out, round_
        self.streams = streams
        self.library = native.library() if out.device.type == "cpu" and round_ is None else None
        if self.library is not None:
            self.pointers = (ctypes.c_void_p * len(leaves))(*(leaf.data_ptr() for leaf in leaves))
            self.steps = (ctypes.c_int32 * len(program))(*program)
            self.arguments = (
                self.pointers, self.steps, len(program), out.data_ptr(), out.numel(), int(streams)
            )

    def __call__(self) -> torch.Tensor:
        """Add up; returns `out`."""
        if self.library is not None:
            self.library.trireme_tree_sum(*self.arguments)
            return self.out
        return self._reference()

    def _reference(self) -> torch.Tensor:
        stack: list[torch.Tensor] = []
        adds = len(self.leaves) - 1
        for step in self.program:
            if step >= 0:
                stack.append(self._rounded(self.leaves[step]) if adds else self.leaves[step])
                continue
            right, left = stack.pop(), stack.pop()
            adds -= 1
            stack.append(torch.add(left, right, out=self.out) if not adds else self._rounded(left + right))
        return self.out if stack[0] is self.out else self.out.copy_(stack[0])

    def _rounded(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.round_ is None else value.to(self.round_).float()


class Flags:
    """Flags of the ranks of a host, in their shared window.

    words  uint32 [ranks, flags, LINE]: row r belongs to rank r, who alone posts there; zero at first
    fence  makes what other processes wrote visible and one's own visible to them (MPI's Win.Sync); for the Python side

    Values are turn numbers modulo 2^32.
    """

    def __init__(self, words: np.ndarray, fence: Callable[[], None]):
        assert words.dtype == np.uint32 and words.shape[2] == LINE
        self.words, self.fence = words, fence
        self.library = native.library()
        ranks, flags = words.shape[:2]
        start = words.ctypes.data
        self.at = [[start + 4 * LINE * (r * flags + f) for f in range(flags)] for r in range(ranks)]
        crowded = ranks > len(os.sched_getaffinity(0))  # the awaited rank may need the core of the one that waits
        self.spins = -1 if crowded else SPINS

    def post(self, rank: int, flag: int, turn: int, learned: bool = False) -> None:
        """Raise one's own flag; everything written before is seen by who sees the flag."""
        if learned:
            self.words[rank, flag, LEARNED] = turn & 0xFFFFFFFF
        if self.library is not None:
            return self.library.trireme_post(self.at[rank][flag], turn & 0xFFFFFFFF)
        self.fence()
        self.words[rank, flag, 0] = turn & 0xFFFFFFFF
        self.fence()

    def wait(self, rank: int, flag: int, turn: int, patience_s: float) -> bool:
        """Whether the flag reached the turn before patience (0: only look) ran out."""
        if self.library is not None:
            spins = self.spins if patience_s else 0
            return bool(self.library.trireme_wait(self.at[rank][flag], turn & 0xFFFFFFFF, spins, int(patience_s * 1e9)))
        deadline = time.monotonic() + patience_s
        while True:
            self.fence()
            if (int(self.words[rank, flag, 0]) - turn) & 0xFFFFFFFF < 1 << 31:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(20e-6)

    def learned(self, rank: int, flag: int, turn: int) -> bool:
        """Whether the flag's owner had something to add in this turn; ask after `wait`."""
        return int(self.words[rank, flag, LEARNED]) == turn & 0xFFFFFFFF


class _Meeting(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ready", "done", "leaves", "program", "out")),
        *((name, ctypes.c_int64) for name in ("count", "patience_ns")),
        *((name, ctypes.c_int32) for name in ("ranks", "mine", "steps", "past_caches", "spins")),
        ("turn", ctypes.c_uint32), ("entered", ctypes.c_int32),
    ]


class Meeting:
    """A whole all-reduce among the ranks of a host: all ready, each sums its part, all done.

    flags        the ranks' flags
    mine         this rank's row
    ready, done  the numbers of the two flags
    sums         this rank's part of the sum, or None if it has none
    """

    def __init__(self, flags: Flags, mine: int, ready: int, done: int, sums: TreeSum | None):
        self.flags, self.mine, self.numbers, self.sums = flags, mine, (ready, done), sums
        ranks = len(flags.at)
        if flags.library is None:
            return
        kept = [(ctypes.c_void_p * ranks)(*(row[number] for row in flags.at)) for number in (ready, done)]
        record = _Meeting(
            ctypes.addressof(kept[0]), ctypes.addressof(kept[1]), ranks=ranks, mine=mine, spins=flags.spins
        )
        if sums is not None:
            assert sums.library is not None
            record.leaves, record.program = ctypes.addressof(sums.pointers), ctypes.addressof(sums.steps)
            record.steps, record.out = len(sums.program), sums.out.data_ptr()
            record.count, record.past_caches = sums.out.numel(), int(sums.streams)
        self.record, self.kept = record, kept
        self.call, self.address = flags.library.trireme_meet_and_sum, ctypes.addressof(record)

    def __call__(self, turn: int, late: Callable[[int], None], patience_s: float = 0.1) -> None:
        """Meet; `late(rank)` is called every `patience_s` seconds in which that rank did not come: it may raise."""
        if self.flags.library is None:
            return self._reference(turn, late, patience_s)
        self.record.turn, self.record.patience_ns = turn & 0xFFFFFFFF, int(patience_s * 1e9)
        while (missing := self.call(self.address)) >= 0:
            late(missing)

    def _reference(self, turn: int, late: Callable[[int], None], patience_s: float) -> None:
        for number, act in zip(self.numbers, (None, self.sums), strict=True):  # ready; then the sum, and done
            if act is not None:
                act()
            self.flags.post(self.mine, number, turn)
            for rank in range(len(self.flags.at)):
                while not self.flags.wait(rank, number, turn, patience_s):
                    late(rank)
