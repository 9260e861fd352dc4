"""Which items a split gets in which block, and in which order: a function of (seed, epoch, block, split) alone.

Rows and sequences: the data set is cut into contiguous runs of items; a permutation of the runs, drawn from (seed,
epoch), gives a stream of items. The stream is cut into blocks, each block evenly into the recipe's splits: what a split
gets in a block is its piece. A piece is read as contiguous runs and shuffled by (seed, epoch, block, split). Sequences
are then grouped into batches of like lengths; the batches' order is the same in all splits, so that ranks have about
the same to do at every step.

Running text: the text is cut into as many lanes as a step has over all splits; every split holds a stretch of
neighbouring lanes and reads them from their beginning to their end.

Every step takes exactly `batch` items over all splits, the last of an epoch what is left. Source: design, section 4;
paper 003, section 2.2 (blocks and splits); paper 001, section 3.3 (a long sequence, split into a few chunks).

Legend: N items of a piece.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from hpc.pieces import empty_piece, item_starts, read_for
from hpc.shards import DataError, Dataset
from models.task import Piece, Task

ORDER, SHUFFLE, DRAW, LENGTHS = 0, 1, 2, 3  # what a random stream is for; the first word of its key after the seed


def generator(seed: int, purpose: int, *key: int) -> np.random.Generator:
    """The random generator of one purpose and place: the same for every number of ranks."""
    return np.random.default_rng([seed, purpose, *key])


class Order:
    """How an epoch is cut into steps and blocks.

    dataset       the training set
    task          says what an item is
    total         items of an epoch
    n_splits      the recipe's splits; must divide `batch`
    batch         items of a step over all splits
    split_frames  rows of a split's piece, about; one step's at least
    rows          that an item has, on average

    share            items of a split's step
    per_epoch        steps
    steps_per_block  steps that a piece lasts
    counted          what the loss counts in a whole step, on average: what gradients are divided by

    Raises ValueError if `n_splits` does not divide `batch`.
    """

    def __init__(
        self, dataset: Dataset, task: Task, total: int, n_splits: int, batch: int, split_frames: int, rows: float = 1.0
    ):
        if batch % n_splits:
            raise ValueError(f"data.batch = {batch} is no multiple of splits = {n_splits}; use one that is")
        self.dataset, self.task, self.total, self.n_splits, self.batch = dataset, task, total, n_splits, batch
        self.share = batch // n_splits
        self.per_epoch = math.ceil(total / batch)
        # No longer than an even cut of the data: a small set is still many runs, dealt to all splits.
        self.steps_per_block = max(1, min(int(split_frames / rows) // self.share, self.per_epoch))
        self.blocks = math.ceil(self.per_epoch / self.steps_per_block)
        self.counted: float = batch * rows if task.per_row else batch

    def load(self, split: int, epoch: int, block: int) -> Piece:
        """Read, check and order one piece."""
        raise NotImplementedError


class Shuffled(Order):
    """Rows or sequences, shuffled.

    runs  contiguous runs that a piece is read from
    seed  the recipe's seed
    """

    def __init__(
        self, dataset: Dataset, task: Task, n_splits: int, *, batch: int, split_frames: int, runs: int, seed: int
    ):
        self._starts = item_starts(dataset, task.unit, task.steps)
        self.items = dataset.rows if self._starts is None else len(self._starts) - 1
        super().__init__(
            dataset, task, self._of_an_epoch(n_splits), n_splits, batch, split_frames, dataset.rows / self.items
        )
        self.seed = seed
        self.run_items = max(1, math.ceil(min(self.steps_per_block * self.share, self.total / n_splits) / runs))
        self._drawn: tuple[tuple[int, ...], np.ndarray, np.ndarray] | None = None

    def _of_an_epoch(self, n_splits: int) -> int:
        """Items of an epoch over all splits."""
        return self.items

    def load(self, split: int, epoch: int, block: int) -> Piece:
        runs = self.runs_of(split, epoch, block)
        if not runs:
            return empty_piece()
        piece = read_for(self.task, self.dataset, runs, starts=self._starts)
        self.task.check(piece)
        piece.take_(torch.from_numpy(generator(self.seed, SHUFFLE, epoch, block, split).permutation(len(piece))))
        if self.task.unit == "sequence":
            whole = self._share_of(block, self.n_splits - 1) // self.share  # batches that every split has
            self._group_by_length(piece, generator(self.seed, LENGTHS, epoch, block).permutation(whole))
        return piece

    def _group_by_length(self, piece: Piece, order: np.ndarray) -> None:
        """As many batches of like lengths as `order` has, in place and in this order; the rest stays last."""
        grouped = len(order) * self.share
        lengths = (piece.last - piece.first)[:grouped]
        batches = torch.argsort(lengths, stable=True).view(len(order), self.share)[torch.from_numpy(order)]
        piece.take_(torch.cat([batches.flatten(), torch.arange(grouped, len(piece))]))

    def runs_of(self, split: int, epoch: int, block: int) -> list[tuple[int, int]]:
        """The row ranges of a split's piece."""
        found = self._ranges(split, epoch, block)
        if self._starts is None:
            return found
        return [(int(self._starts[first]), int(self._starts[last])) for first, last in found]

    def _ranges(self, split: int, epoch: int, block: int) -> list[tuple[int, int]]:
        """The ranges of items of a split's piece."""
        low = block * self.steps_per_block * self.batch
        begin = low + sum(self._share_of(block, s) for s in range(split))
        return self._stream((epoch,), begin, begin + self._share_of(block, split))

    def _share_of(self, block: int, split: int) -> int:
        """How many of a block's items a split gets; no split gets fewer than the last."""
        items = min(self.total - block * self.steps_per_block * self.batch, self.steps_per_block * self.batch)
        whole, rest = divmod(items, self.batch)
        return whole * self.share + rest // self.n_splits + (split < rest % self.n_splits)

    def _stream(self, key: tuple[int, ...], low: int, high: int) -> list[tuple[int, int]]:
        """Ranges of items at positions [low, high) of the stream that is drawn by this key: an epoch, say."""
        if self._drawn is None or self._drawn[0] != key:
            count = math.ceil(self.items / self.run_items)
            order = generator(self.seed, ORDER, *key).permutation(count)
            sizes = np.minimum((order + 1) * self.run_items, self.items) - order * self.run_items
            self._drawn = (key, order, np.concatenate([[0], np.cumsum(sizes)]))
        _, order, edges = self._drawn
        found = []
        at = low
        while at < high:
            i = int(np.searchsorted(edges, at, side="right")) - 1
            end = min(high, int(edges[i + 1]))
            base = int(order[i]) * self.run_items - int(edges[i])
            found.append((at + base, end + base))
            at = end
        return sorted(found)


class Drawn(Shuffled):
    """Rows or sequences of which every split draws a part of its own in every epoch, as if there were no other split.

    Paper 000, section 4: "we partition the entire training data to batches, with possible overlapping between batches",
    anew in each epoch; 25 x 0.1 and 50 x 0.05 of it in section 5.

    draw  the part of all items that a split draws, none of them twice
    """

    def __init__(
        self, dataset: Dataset, task: Task, n_splits: int, *, batch: int, split_frames: int, runs: int, seed: int,
        draw: float,
    ):
        self.draw = draw
        super().__init__(dataset, task, n_splits, batch=batch, split_frames=split_frames, runs=runs, seed=seed)

    def _of_an_epoch(self, n_splits: int) -> int:
        return n_splits * max(1, round(self.draw * self.items))

    def _ranges(self, split: int, epoch: int, block: int) -> list[tuple[int, int]]:
        low = block * self.steps_per_block * self.share
        return self._stream((epoch, split), low, low + self._share_of(block, split))


class Lanes(Order):
    """Running text, or frames, in their own order; the last rows, fewer than there are lanes, are left out.

    draw  the part of the text that every split draws in an epoch, a stretch for each of its lanes that begins anywhere,
          as paper 000's batches; 0: lanes share the text

    Raises ValueError if the task's steps and the splits do not divide `batch`, DataError if the text is too short.
    """

    def __init__(
        self, dataset: Dataset, task: Task, n_splits: int, *, batch: int, split_frames: int, seed: int = 0,
        draw: float = 0.0,
    ):
        lanes, rest = divmod(batch, task.steps)
        noun = task.noun
        if rest or lanes % n_splits:
            raise ValueError(
                f"data.batch = {batch} {noun} are no whole number of lanes of {task.steps} {noun} for each of "
                f"{n_splits} splits; use a multiple of {task.steps * n_splits}"
            )
        self.seed, self.draw = seed, draw
        rows = dataset.rows - (not task.margin)  # every word has one after it, to be predicted
        drawn = int(draw * rows) * n_splits if draw else rows
        self.length = drawn // lanes  # of a lane
        if not self.length:
            raise DataError(
                f"data set '{dataset.folder}' has {dataset.rows} {noun}, too few for {lanes} lanes; lower data.batch"
            )
        super().__init__(dataset, task, lanes * self.length, n_splits, batch, split_frames)

    def load(self, split: int, epoch: int, block: int) -> Piece:
        lanes = self.share // self.task.steps
        low = block * self.steps_per_block * self.task.steps
        high = min(low + self.steps_per_block * self.task.steps, self.length)
        begins = [lane * self.length for lane in range(split * lanes, (split + 1) * lanes)]
        if self.draw:
            anywhere = generator(self.seed, ORDER, epoch, split)
            begins = anywhere.integers(max(1, self.dataset.rows - self.length), size=lanes).tolist()
        piece = read_for(self.task, self.dataset, [(begin + low, begin + high) for begin in begins])
        self.task.check(piece)
        return piece
