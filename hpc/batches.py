"""Who reads what when: blocks and splits over the data, order from (seed, epoch, split), prefetch.

An epoch is one pass over all items (frames). The data set is cut into contiguous runs; a permutation of the runs, drawn
from (seed, epoch), gives a stream of items. The stream is cut into blocks, each block evenly into the recipe's splits:
what a split gets in a block is its piece. A piece is read as contiguous runs, shuffled in memory by (seed, epoch,
block, split) and cut into batches; the next block's pieces are read by a thread while this block's are trained on.
Every step takes exactly `batch` items over all splits, the last of an epoch what is left. Nothing here depends on how
many ranks share the splits. Memory is bounded by the pieces of the splits a rank holds, never by the data set.

Source: design, section 4; paper 003, section 2.2 (blocks and splits; the next split is loaded while the current one is
processed).

Legend: R rows in memory, N items of a piece, M blocks an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from hpc.shards import Dataset
from models.task import Piece, Task

ORDER, SHUFFLE, DRAW = 0, 1, 2  # what a random stream is for; the first word of its key after the seed


def generator(seed: int, purpose: int, *key: int) -> np.random.Generator:
    """The random generator of one purpose and place: the same for every number of ranks."""
    return np.random.default_rng([seed, purpose, *key])


def read_piece(dataset: Dataset, runs: Iterable[tuple[int, int]], margin: int) -> Piece:
    """Read row ranges [low, high) of a data set, with up to `margin` rows more on either side within the utterance.

    Items are the ranges' rows, in order. Raises DataError, naming the file, if anything cannot be read.
    """
    starts = dataset.starts
    wide = []  # of every run: its items' rows, the rows to read, the edges of the utterances they lie in
    for low, high in runs:
        edges = starts[dataset.utterance_at(low) : dataset.utterance_at(high - 1) + 2]
        wide.append((low, high, max(low - margin, int(edges[0])), min(high + margin, int(edges[-1])), edges))
    rows = sum(last - first for _, _, first, last, _ in wide)
    heads = np.cumsum([0] + [high - low for low, high, *_ in wide])  # where every run's items begin
    fields = {}
    for name in dataset.frame_fields:
        about = dataset.field(name)
        shape = (rows, about["width"]) if "width" in about else (rows,)
        fields[name] = np.empty(shape, about["dtype"])
    items, firsts, lasts = (np.empty(heads[-1], np.int64) for _ in range(3))
    at = 0
    for (low, high, first, last, edges), head in zip(wide, heads[:-1], strict=True):
        for name, values in fields.items():
            dataset.read(name, first, last, values[at : at + last - first])
        here, shift = slice(head, head + high - low), at - first
        lengths: Any = np.diff(np.clip(edges, low, high))  # items of every utterance
        items[here] = np.arange(low + shift, high + shift)
        firsts[here] = np.repeat(np.maximum(edges[:-1], first) + shift, lengths)
        lasts[here] = np.repeat(np.minimum(edges[1:], last) - 1 + shift, lengths)
        at += last - first

    def key_of(position: int) -> str:
        run = int(np.searchsorted(heads, position, side="right")) - 1
        return dataset.key(dataset.utterance_at(wide[run][0] + position - int(heads[run])))

    return Piece(
        {name: torch.from_numpy(values) for name, values in fields.items()},
        torch.from_numpy(items), torch.from_numpy(firsts), torch.from_numpy(lasts), key_of,
    )


def shuffle_(piece: Piece, random: np.random.Generator) -> None:
    """Put a piece's items in random order, in place."""
    order = torch.from_numpy(random.permutation(len(piece)))
    piece.items, piece.first, piece.last = piece.items[order], piece.first[order], piece.last[order]
    key_of, positions = piece.key_of, order
    piece.key_of = lambda position: key_of(int(positions[position]))


class Batches:
    """The training batches of the splits this rank holds: `batches(split, t)` for global step t.

    dataset       the training set (read by a thread of its own from here on)
    task          says what a piece must hold and how a batch is collated
    splits        the splits this rank holds, ascending
    n_splits      the recipe's splits; must divide `batch`
    batch         items of a step over all splits
    split_frames  items of a split's piece at most
    runs          contiguous runs that a piece is read from
    seed          the recipe's seed
    place         moves a tensor to where it is trained on

    Raises ValueError if `n_splits` does not divide `batch`.
    """

    def __init__(
        self, dataset: Dataset, task: Task, splits: Sequence[int], n_splits: int, *, batch: int, split_frames: int,
        runs: int, seed: int, place: Callable[[torch.Tensor], torch.Tensor],
    ):
        if batch % n_splits:
            raise ValueError(f"data.batch = {batch} is no multiple of splits = {n_splits}; use one that is")
        self.dataset, self.task, self.splits, self.n_splits = dataset, task, splits, n_splits
        self.batch, self.seed, self.place = batch, seed, place
        self.share = batch // n_splits
        total = dataset.rows
        self.per_epoch = math.ceil(total / batch)
        # No longer than an even cut of the data: a small set is still many runs, dealt to all splits.
        self.steps_per_block = max(1, min(split_frames // self.share, self.per_epoch))
        self.blocks = math.ceil(self.per_epoch / self.steps_per_block)
        self.run_rows = max(1, math.ceil(min(self.steps_per_block * self.share, total / n_splits) / runs))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: dict[tuple[int, int, int], Future[Piece]] = {}
        self._held: dict[int, tuple[tuple[int, int], Piece]] = {}
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def __call__(self, split: int, t: int) -> Any | None:
        """The batch of a split at global step t, or None if the split has run dry at the end of an epoch."""
        epoch, step = divmod(t, self.per_epoch)
        block, within = divmod(step, self.steps_per_block)
        piece = self._piece(split, epoch, block)
        low = min(within * self.share, len(piece))
        high = min(low + self.share, len(piece))
        return self.task.collate(piece, low, high) if low < high else None

    def progress(self, t: int) -> tuple[float, int]:
        """Epochs and items, over all splits, from the start of training to step t."""
        epoch, step = divmod(t, self.per_epoch)
        return t / self.per_epoch, epoch * self.dataset.rows + min(step * self.batch, self.dataset.rows)

    def seed_all(self, split: int, t: int) -> None:
        """Seed torch's global generators for a split's step (dropout reads them)."""
        torch.manual_seed(int(np.random.SeedSequence([self.seed, DRAW, split, t]).generate_state(1, np.uint64)[0] >> 1))

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _piece(self, split: int, epoch: int, block: int) -> Piece:
        held = self._held.get(split)
        if held is None or held[0] != (epoch, block):
            self._held.pop(split, None)
            held = ((epoch, block), self._ahead_of((split, epoch, block)).result())
            self._ahead.pop((split, epoch, block))
            self._held[split] = held
            following = (epoch, block + 1) if block + 1 < self.blocks else (epoch + 1, 0)
            self._ahead_of((split, *following))
        return held[1]

    def _ahead_of(self, place: tuple[int, int, int]) -> Future[Piece]:
        if place not in self._ahead:
            self._ahead[place] = self._reader.submit(self._load, *place)
        return self._ahead[place]

    def _load(self, split: int, epoch: int, block: int) -> Piece:
        """Read, check and shuffle one piece (on the prefetch thread)."""
        runs = self.runs_of(split, epoch, block)
        piece = read_piece(self.dataset, runs, self.task.margin) if runs else _empty(self.dataset)
        if runs:
            self.task.check(piece)
        shuffle_(piece, generator(self.seed, SHUFFLE, epoch, block, split))
        piece.fields = {name: self.place(values) for name, values in piece.fields.items()}
        piece.items, piece.first, piece.last = (self.place(x) for x in (piece.items, piece.first, piece.last))
        return piece

    def runs_of(self, split: int, epoch: int, block: int) -> list[tuple[int, int]]:
        """The row ranges of a split's piece."""
        low = block * self.steps_per_block * self.batch
        items = min(self.dataset.rows - low, self.steps_per_block * self.batch)
        whole, rest = divmod(items, self.batch)
        shares = [whole * self.share + rest // self.n_splits + (s < rest % self.n_splits) for s in range(split + 1)]
        begin = low + sum(shares[:-1])
        return self._stream(epoch, begin, begin + shares[-1])

    def _stream(self, epoch: int, low: int, high: int) -> list[tuple[int, int]]:
        """Row ranges of the epoch's stream positions [low, high)."""
        if self._order is None or self._order[0] != epoch:
            count = math.ceil(self.dataset.rows / self.run_rows)
            order = generator(self.seed, ORDER, epoch).permutation(count)
            sizes = np.minimum((order + 1) * self.run_rows, self.dataset.rows) - order * self.run_rows
            self._order = (epoch, order, np.concatenate([[0], np.cumsum(sizes)]))
        _, order, edges = self._order
        found = []
        at = low
        while at < high:
            i = int(np.searchsorted(edges, at, side="right")) - 1
            end = min(high, int(edges[i + 1]))
            base = int(order[i]) * self.run_rows - int(edges[i])
            found.append((at + base, end + base))
            at = end
        return sorted(found)


def _empty(dataset: Dataset) -> Piece:
    nothing = torch.zeros(0, dtype=torch.int64)
    return Piece({}, nothing, nothing, nothing, lambda position: "")
