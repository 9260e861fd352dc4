"""The exchange of packed gradients: every rank sends every owner what its splits have of the owner's columns; owners
add up, make an update of the sum, pack it, and send it to all.

Source: paper 002, section 3.1: "each compute node is responsible for aggregating a 1/K-th subset of model parameters,
which it will receive in quantized form from all peer nodes ... These are then summed up in unquantized form,
post-processed (AdaGrad, momentum), and redistributed to all peers, again quantized." O(1) in the number of ranks. The
splits are added in their order, whoever holds them, so the sum is the same for every number of ranks.

A turn: `rows` gives the places that the splits' values are packed into; `start` sends them; `complete` waits, has the
owner's part made and sent, and waits for the others'. Where threads may call MPI, a thread can do `complete` while the
rank computes.

Legend: P floats of the flat buffer, K ranks, N splits, S floats that this rank owns.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch

from collectives.comm import Comm, PeerLost
from collectives.exchange import LOOK_S, rest
from collectives.lane import lane_of
from collectives.message import Message
from kernels import onebit
from kernels.onebit import LANES, Columns

BLOCK = 1 << 17  # floats, about, that a CPU makes an update of at a time: they stay in the cache from step to step


class Codec(Protocol):
    """How the floats [F] of a stretch are packed into int32, and added up again.

    The first int32 of a packed row is 0 where there is nothing. values, residual, out: float32 [F], of which columns
    say what counts; packed: int32 [n], n as `packed` tells.
    """

    def packed(self, columns: Columns, floats: int) -> int:
        """How many int32 the packed floats of some columns are."""
        ...

    def pack_(
        self, values: torch.Tensor, residual: torch.Tensor | None, columns: Columns, packed: torch.Tensor
    ) -> bool:
        """Pack values and what was left of those before; what is left now is in `residual`. Returns whether all are
        finite, their sums over columns too."""
        ...

    def add_(self, out: torch.Tensor, packed: torch.Tensor, columns: Columns, fresh: bool) -> None:
        """Add packed rows [N, n] to `out` in place, split after split, from 0 if `fresh`."""
        ...


class OneBit:
    """A bit a value and two levels a column: `kernels.onebit`."""

    def packed(self, columns: Columns, floats: int) -> int:
        return columns.packed

    def pack_(
        self, values: torch.Tensor, residual: torch.Tensor | None, columns: Columns, packed: torch.Tensor
    ) -> bool:
        return onebit.quantize_(values, residual, columns, packed)

    def add_(self, out: torch.Tensor, packed: torch.Tensor, columns: Columns, fresh: bool) -> None:
        onebit.accumulate_(out, packed, columns, fresh=fresh)


class Float32:
    """The values themselves; nothing is left."""

    def packed(self, columns: Columns, floats: int) -> int:
        return 1 + floats

    def pack_(
        self, values: torch.Tensor, residual: torch.Tensor | None, columns: Columns, packed: torch.Tensor
    ) -> bool:
        packed[0] = 1
        packed[1:].view(torch.float32).copy_(values)
        return bool(torch.isfinite(values).all())

    def add_(self, out: torch.Tensor, packed: torch.Tensor, columns: Columns, fresh: bool) -> None:
        if fresh:
            out.zero_()
        for row in packed:
            if row[0]:
                out.add_(row[1:].view(torch.float32))


@dataclass(frozen=True)
class Block:
    """Floats [low, high) of the flat buffer, whole columns; where they are packed: int32 [first, last) of a row."""

    low: int
    high: int
    columns: Columns
    first: int
    last: int


@dataclass(frozen=True)
class Part:
    """What a rank owns: floats [low, high), block by block; `packed`: int32 of a row."""

    low: int
    high: int
    blocks: list[Block]
    packed: int


def cut_parts(columns: Columns, size: int, ranks: int, codec: Codec, block: int = BLOCK) -> list[Part]:
    """Every rank's part of the columns of [P], together [0, P): the same for every codec, about equal in what is sent
    of them at a bit a value, where a vector's values take most.

    block  floats of a block, about
    """
    starts = [0, *columns.starts[1:], size]
    packed = [0, *accumulate(2 + -(-width // LANES) for width in columns.widths)]
    edges = _edges(packed, 0, len(starts) - 1, ranks)
    parts = []
    for first, last in pairwise(edges):
        pieces = max(1, (starts[last] - starts[first]) // block)
        inner = _edges(starts, first, last, pieces)
        blocks, at = [], 0
        for one, two in pairwise(inner):
            if one == two:
                continue
            some = columns.part(one, two, starts[one])
            taken = codec.packed(some, starts[two] - starts[one])
            blocks.append(Block(starts[one], starts[two], some, at, at + taken))
            at += taken
        parts.append(Part(starts[first], starts[last], blocks, at))
    return parts


def _edges(marks: Sequence[int], first: int, last: int, parts: int) -> list[int]:
    """Columns [first, last) in so many runs, as even in what is before their edges as these allow."""
    low, high = marks[first], marks[last]
    inner = [bisect_left(marks, low + (high - low) * k // parts, first, last) for k in range(1, parts)]
    return [first, *inner, last]


# (how floats are packed, the rows that came for a block, the block, where its packed result is to be)
Make = Callable[[Codec, torch.Tensor, Block, torch.Tensor], None]


class PackedExchange:
    """One set of buffers and messages; a turn at a time.

    comm     the ranks and their splits
    columns  of the flat buffer
    size     P
    codec    how floats are packed
    device   where the buffers are
    tag      messages carry this number and the next one; no other exchange's do
    make     makes an owner's packed result of what came, block by block
    note     told of every stage: (name, begin, end) in time.monotonic_ns

    `complete` raises PeerLost, or what `make` raised.
    """

    def __init__(
        self, comm: Comm, columns: Columns, size: int, codec: Codec, device: torch.device, tag: int, make: Make,
        note: Callable[[str, int, int], None],
    ):
        self.comm, self.codec, self.make, self.note = comm, codec, make, note
        self.lane = lane_of(device)
        block = BLOCK if device.type == "cpu" else size
        self.parts = parts = cut_parts(columns, size, comm.size, codec, block)
        self.mine = parts[comm.rank]
        held = len(comm.splits)
        others = [rank for rank in range(comm.size) if rank != comm.rank]

        def zeros(rows: int, part: Part) -> torch.Tensor:
            return torch.zeros(rows, max(part.packed, 1), dtype=torch.int32, device=device)

        self.incoming = zeros(comm.n_splits, self.mine)
        self.outgoing = [
            self.incoming[comm.splits[0] : comm.splits[-1] + 1] if rank == comm.rank else zeros(held, part)
            for rank, part in enumerate(parts)
        ]
        self.results = [zeros(1, part) for part in parts]
        self.partials_out = [comm.sending(self.outgoing[r].view(-1), r, tag, "reduce") for r in others]
        self.partials_in = [
            comm.receiving(self.incoming[comm.splits_of(r)[0] : comm.splits_of(r)[-1] + 1].view(-1), r, tag)
            for r in others
        ]
        self.results_out = [comm.sending(self.results[comm.rank].view(-1), r, tag + 1, "share") for r in others]
        self.results_in = [comm.receiving(self.results[r].view(-1), r, tag + 1) for r in others]
        self.learned = False  # whether any split of any rank had something, in the turn just completed
        self.took_s = 0.0  # seconds that the last turn took, waited for or not
        self.waiting: tuple[int, str] | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._patient = False

    def rows(self, split: int) -> list[tuple[Block, torch.Tensor]]:
        """All blocks, and where the values of one of this rank's splits are to be packed."""
        held = split - self.comm.splits[0]
        return [(b, self.outgoing[r][held, b.first : b.last]) for r, part in enumerate(self.parts) for b in part.blocks]

    def landed(self) -> list[tuple[Block, torch.Tensor]]:
        """All blocks, and their packed results, int32 [1, n], after `complete`."""
        return [(b, self.results[r][:, b.first : b.last]) for r, part in enumerate(self.parts) for b in part.blocks]

    def start(self, beside: bool) -> None:
        """All splits are packed: send them; `beside`: a thread completes the turn, if threads may."""
        for message in (*self.partials_in, *self.results_in):
            message.start()
        self._await_lane()
        for message in self.partials_out:
            message.start()
        self._began = time.monotonic()
        if beside and self.comm.threads:
            self._patient = True
            self._thread = threading.Thread(target=self._beside, name="exchange", daemon=True)
            self._thread.start()

    def complete(self) -> bool:
        """Until this rank has all results; whether any split of any rank had something."""
        if self._thread is not None:
            self._patient = False
            self._thread.join()
            self._thread = None
        else:
            self._run()
        if self._failure is not None:
            raise self._failure
        return self.learned

    def close(self) -> None:
        """It is not used again, and nothing of it is on its way."""
        for message in (*self.partials_in, *self.partials_out, *self.results_in, *self.results_out):
            message.free()

    def run_through(self) -> None:
        """A turn of which nobody has anything to add, to see how long its messages take (collective)."""
        for rows in self.outgoing:
            rows[:, 0] = 0
        self.start(beside=False)
        self.complete()

    def _beside(self) -> None:
        try:
            self._run()
        except BaseException as error:  # raised again by `complete`
            self._failure = error

    def _run(self) -> None:
        at = time.monotonic_ns()
        self._await(self.partials_in, "gradient")
        at = self._noted("reduce", at)
        with self.lane.working():
            for block in self.mine.blocks:
                cut = slice(block.first, block.last)
                self.make(self.codec, self.incoming[:, cut], block, self.results[self.comm.rank][0, cut])
            self._await_lane()
        at = self._noted("update", at)
        for message in self.results_out:
            message.start()
        self._await(self.results_in, "part of the result")
        self._await((*self.partials_out, *self.results_out), "readiness to receive")
        with self.lane.working():
            self.learned = any(bool(result[0, 0]) for result in self.results)  # the first block's, as all others'
        self._noted("share", at)
        self.took_s = time.monotonic() - self._began

    def _await_lane(self) -> None:
        mark = self.lane.mark()
        while mark is not None and not mark(LOOK_S):
            pass

    def _await(self, messages: Sequence[Message], what: str) -> None:
        """Until all are through. Raises PeerLost if whom they wait for is gone."""
        began = looked = time.monotonic()
        pending = list(messages)
        while pending := [message for message in pending if not self._arrived(message, what)]:
            self.waiting = (pending[0].peer, what)
            now = time.monotonic()
            if now - looked > LOOK_S:
                looked = now
                for message in pending:
                    if not self.comm.alive(message.peer):
                        raise PeerLost(f"{self.comm.name_of(message.peer)} is gone; this rank waited for its {what}")
            rest(now - began, self._patient)
        self.waiting = None

    def _arrived(self, message: Message, what: str) -> bool:
        try:
            return message.arrived()
        except Exception as error:
            if not type(error).__module__.startswith("mpi4py"):
                raise
            lost = f"the exchange with {self.comm.name_of(message.peer)} failed while waiting for its {what}: {error}"
            raise PeerLost(lost) from error

    def _noted(self, stage: str, began: int) -> int:
        now = time.monotonic_ns()
        self.note(f"bucket 0 {stage}", began, now)
        return now
