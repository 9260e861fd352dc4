"""1-bit quantization with error feedback, and the sum of what was quantized, each in one pass over memory.

With g a column of the gradient and d its residual, both [n]:

    v = g + d;  above = mean of the v >= 0;  below = mean of the v < 0      (0 where there are none)
    bit_i = v_i >= 0;  q_i = above if bit_i else below;  d <- v - q

Source: paper 002, section 3: threshold 0, two reconstruction values a column "as to minimize the square quantization
error" (for a fixed threshold those are the means), the error added to the next gradient. Departure: the paper ties
values "within each weight-matrix column"; here a column is a contiguous run of the stored matrix, which in torch holds
all weights into one unit (a strided column costs three times as much to read). Every value of a vector is a column of
its own, so vectors cross exactly: as one column, biases whose gradients differ by orders of magnitude would share two
levels, and the residuals of the large ones wind up (docs/1bit.md).

Sums over a column are taken in 32 lanes, the value i in lane i modulo 32, which are then folded in halves: so the CPU,
the GPU and the torch reference give the same bits.

What a split sends of some columns is one row of int32, packed: [0] whether it holds anything, then a column's (below,
above) as float32, column after column, then its signs, 32 to a word, the first value in the lowest bit, every column
beginning with a word of its own.

Legend: F floats of a stretch of the flat buffer, C columns, W words of signs, N splits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from kernels import gpu, native

LANES = 32  # values of a word; lanes in which a column is summed
ENOUGH = 1 << 15  # floats; a second thread is not worth its start below
SOURCE = "onebit.cu"
THREADS = 256  # of a block: eight warps, a column each
WORDS = 64  # about how many of a column's a warp adds up,
WARPS = 1 << 16  # unless that would take more warps than this


@dataclass(frozen=True)
class Run:
    """Columns of one width that lie one behind the other: a matrix, or a part of its rows; of a vector all values.

    start  the first float of the first column
    rows   how many columns
    width  floats a column
    """

    start: int
    rows: int
    width: int

    @property
    def words(self) -> int:
        """Words of signs a column."""
        return -(-self.width // LANES)


class Columns:
    """The columns of a stretch of the flat buffer; floats that belong to no column (padding) are left alone.

    runs  ascending, not overlapping; starts count from the stretch's first float

    count   C
    words   W
    packed  int32 of a packed row: 1 + 2 C + W
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs = [run for run in runs if run.rows and run.width]
        self.count = sum(run.rows for run in self.runs)
        self.words = sum(run.rows * run.words for run in self.runs)
        self.packed = 1 + 2 * self.count + self.words
        self._tables: dict[torch.device, torch.Tensor] = {}

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, Sequence[int]]]) -> Columns:
        """The columns of parameters, given as (first float, shape): rows of matrices, single values of vectors.

        >>> Columns.of([(0, (3, 40)), (128, (3,))]).runs
        [Run(start=0, rows=3, width=40), Run(start=128, rows=3, width=1)]
        """
        runs = []
        for start, shape in shapes:
            rows, *behind = shape or (1,)
            runs.append(Run(start, rows, math.prod(behind)))
        return cls(runs)

    @cached_property
    def starts(self) -> list[int]:
        """The first float of every column."""
        return [run.start + row * run.width for run in self.runs for row in range(run.rows)]

    @cached_property
    def widths(self) -> list[int]:
        """The floats of every column."""
        return [run.width for run in self.runs for _ in range(run.rows)]

    def part(self, first: int, last: int, low: int) -> Columns:
        """Columns [first, last), of a stretch that begins at float `low` of this one."""
        found, at = [], 0
        for run in self.runs:
            begin, end = max(first - at, 0), min(last - at, run.rows)
            if begin < end:
                found.append(Run(run.start + begin * run.width - low, end - begin, run.width))
            at += run.rows
        return Columns(found)

    def table(self, device: torch.device) -> torch.Tensor:
        """int64 [3, C]: of every column the first float, the number of floats, the first of its words."""
        if device not in self._tables:
            parts, word = [torch.zeros((3, 0), dtype=torch.int64)], 0
            for run in self.runs:
                row = torch.arange(run.rows)
                parts.append(torch.stack([run.start + row * run.width, torch.full_like(row, run.width),
                                          word + row * run.words]))
                word += run.rows * run.words
            self._tables[device] = torch.cat(parts, 1).to(device)
        return self._tables[device]

    @property
    def end(self) -> int:
        """The float after the last column."""
        return self.runs[-1].start + self.runs[-1].rows * self.runs[-1].width if self.runs else 0


def quantize_(values: torch.Tensor, residual: torch.Tensor | None, columns: Columns, packed: torch.Tensor) -> bool:
    """Quantize values and what was left of those before; returns whether all were finite (if not, nothing is of use).

    values    [F], contiguous, unchanged
    residual  [F], contiguous: added first, then what is left of the sum, in place; None: nothing is added or kept
    columns   of this stretch
    packed    int32 [columns.packed], contiguous, overwritten

    Source: paper 002, section 3.
    """
    floats = (values,) if residual is None else (values, residual)
    assert all(t.dtype == values.dtype and t.shape == values.shape and t.is_contiguous() for t in floats)
    assert packed.shape == (columns.packed,) and packed.is_contiguous() and packed.dtype == torch.int32
    assert columns.end <= values.numel() and all(t.device == values.device for t in (*floats, packed))
    kept = 0 if residual is None else residual.data_ptr()
    if gpu.serves(values):
        bad = torch.zeros(1, dtype=torch.int32, device=values.device)
        packed[0] = 1
        floats_and_row = (values.data_ptr(), kept, packed.data_ptr())
        _launch("quantize", 1, floats_and_row, columns, (bad.data_ptr(),), values.device)
        return not bad.item()
    library = native.library()
    if library is None or values.is_cuda or values.dtype != torch.float32:
        return reference_quantize_(values, residual, columns, packed)
    table = columns.table(values.device).data_ptr()
    return not library.trireme_onebit_quantize(
        values.data_ptr(), kept, table, columns.count, packed.data_ptr(), _threads(columns)
    )


def accumulate_(out: torch.Tensor, packed: torch.Tensor, columns: Columns, *, fresh: bool = False) -> None:
    """Add what was quantized, split after split; rows that hold nothing are left out.

    out      [F], contiguous, changed in place
    packed   int32 [N, columns.packed], every row contiguous: of every split one
    columns  of this stretch
    fresh    whether sums begin at 0 instead of at what `out` holds

    Source: paper 002, section 3.1 ("summed up in unquantized form").
    """
    rows, row = packed.shape[0], packed.stride(0)
    assert out.is_contiguous() and columns.end <= out.numel() and packed.device == out.device
    assert packed.shape[1] == columns.packed and packed.stride(1) == 1 and packed.dtype == torch.int32
    if gpu.serves(out):
        longest = max((run.words for run in columns.runs), default=0)
        shares = min(-(-longest // WORDS), max(1, WARPS // max(1, columns.count)))
        sizes = (np.int64(rows), np.int64(row), np.int32(fresh))
        _launch("accumulate", shares, (out.data_ptr(), packed.data_ptr()), columns, sizes, out.device)
        return
    library = native.library()
    if library is None or out.is_cuda or out.dtype != torch.float32:
        reference_accumulate_(out, packed, columns, fresh=fresh)
        return
    table = columns.table(out.device).data_ptr()
    library.trireme_onebit_accumulate(
        out.data_ptr(), packed.data_ptr(), rows, row, table, columns.count, fresh, _threads(columns)
    )


def _threads(columns: Columns) -> int:
    enough = columns.count and columns.end - columns.runs[0].start >= ENOUGH
    return torch.get_num_threads() if enough else 1


def _launch(
    function: str, shares: int, before: Sequence[int], columns: Columns, after: Sequence[int | np.generic],
    device: torch.device,
) -> None:
    """Queue a kernel, a warp a column, or so many shares of it; its arguments are those before the table and after."""
    if columns.count:
        arguments = (*before, columns.table(device).data_ptr(), np.int64(columns.count), *after)
        blocks = -(-columns.count * LANES // THREADS)
        gpu.launch(SOURCE, f"trireme_onebit_{function}", (blocks, shares), THREADS, arguments, device)


def empty_(packed: torch.Tensor) -> None:
    """Mark a packed row, int32 [columns.packed], as one that holds nothing, in place."""
    packed[0] = 0


def reference_quantize_(
    values: torch.Tensor, residual: torch.Tensor | None, columns: Columns, packed: torch.Tensor
) -> bool:
    """The same in torch, for any type of float; levels are float32."""
    levels, words = _parts(packed, columns)
    packed[0] = 1
    finite, column, word = True, 0, 0
    for run in columns.runs:
        stretch = slice(run.start, run.start + run.rows * run.width)
        v = values[stretch].view(run.rows, run.width)
        if residual is not None:
            v = v + residual[stretch].view(run.rows, run.width)
        high = v >= 0
        above = _lane_sums(torch.where(high, v, 0)) / high.sum(1).clamp(min=1).to(v.dtype)
        below = _lane_sums(torch.where(high, 0, v)) / (~high).sum(1).clamp(min=1).to(v.dtype)
        levels[column : column + run.rows] = torch.stack([below, above], 1).float()
        below, above = levels[column : column + run.rows].to(v.dtype).unbind(1)
        finite &= bool(torch.isfinite(levels[column : column + run.rows]).all())
        words[word : word + run.rows * run.words] = _pack(high).flatten()
        if residual is not None:
            residual[stretch] = (v - torch.where(high, above[:, None], below[:, None])).flatten()
        column, word = column + run.rows, word + run.rows * run.words
    return finite


def reference_accumulate_(out: torch.Tensor, packed: torch.Tensor, columns: Columns, *, fresh: bool = False) -> None:
    """The same in torch."""
    rows = [row for row in packed if row[0]]
    column, word = 0, 0
    for run in columns.runs:
        stretch = slice(run.start, run.start + run.rows * run.width)
        total = out[stretch].view(run.rows, run.width)
        if fresh:
            total.zero_()
        for row in rows:
            levels, words = _parts(row, columns)
            below, above = levels[column : column + run.rows, :, None].unbind(1)
            high = _unpack(words[word : word + run.rows * run.words].view(run.rows, run.words), run.width)
            total.add_(torch.where(high, above, below))
        column, word = column + run.rows, word + run.rows * run.words


def _parts(packed: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """A packed row's levels, float32 [C, 2], and its words, int32 [W], as views."""
    edge = 1 + 2 * columns.count
    return packed[1:edge].view(torch.float32).view(-1, 2), packed[edge:]


def _lane_sums(values: torch.Tensor) -> torch.Tensor:
    """The sums of the rows of [rows, width], lane by lane, then folded."""
    blocks = torch.nn.functional.pad(values, (0, -values.shape[1] % LANES)).view(len(values), -1, LANES)
    lanes = torch.zeros_like(blocks[:, 0])
    for block in blocks.unbind(1):
        lanes = lanes + block
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _pack(high: torch.Tensor) -> torch.Tensor:
    """Signs, bool [rows, width], as int32 [rows, words]."""
    bits = torch.nn.functional.pad(high, (0, -high.shape[1] % LANES)).view(len(high), -1, LANES).long()
    words = (bits << torch.arange(LANES, device=high.device)).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _unpack(words: torch.Tensor, width: int) -> torch.Tensor:
    """Signs, bool [rows, width], of int32 [rows, words]."""
    bits = (words[..., None] >> torch.arange(LANES, device=words.device, dtype=torch.int32)) & 1
    return bits.flatten(1)[:, :width].bool()
