"""The batches of the splits a rank holds, step by step; the next block is read while this one is trained on.

Which items a split gets when is the order's (`orders.py`); nothing here depends on how many ranks share the splits.
Memory is bounded by the pieces of the splits a rank holds, never by the data set. Source: paper 003, section 2.2 (the
next split is loaded while the current one is processed).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from hpc.orders import DRAW, Drawn, Lanes, Order, Shuffled
from hpc.shards import Dataset
from models.task import Piece, Task


def make_order(
    dataset: Dataset, task: Task, n_splits: int, *, batch: int, split_frames: int, runs: int, seed: int,
    draw: float = 0.0,
) -> Order:
    """The order that the task's unit asks for; see the orders' own arguments."""
    common: dict[str, Any] = {"batch": batch, "split_frames": split_frames, "seed": seed}
    if task.unit == "stream":
        return Lanes(dataset, task, n_splits, draw=draw, **common)
    if draw:
        return Drawn(dataset, task, n_splits, draw=draw, runs=runs, **common)
    return Shuffled(dataset, task, n_splits, runs=runs, **common)


class Batches:
    """The training batches of the splits this rank holds: `batches(split, t)` for global step t.

    order  says what a split gets (its data set is read by a thread of its own from here on)
    seed   the recipe's seed
    place  moves a tensor to where it is trained on
    """

    def __init__(self, order: Order, seed: int, place: Callable[[torch.Tensor], torch.Tensor]):
        self.order, self.seed, self.place = order, seed, place
        self.per_epoch = order.per_epoch
        # Told of every piece that was read: split, epoch, block, begin and end in time.monotonic_ns(); set by build.py.
        self.loaded: Callable[[int, int, int, int, int], None] = lambda split, epoch, block, begin, end: None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: dict[tuple[int, int, int], Future[Piece]] = {}
        self._held: dict[int, tuple[tuple[int, int], Piece]] = {}

    def __call__(self, split: int, t: int) -> Any | None:
        """The batch of a split at global step t, or None if the split has run dry at the end of an epoch."""
        epoch, step = divmod(t, self.per_epoch)
        block, within = divmod(step, self.order.steps_per_block)
        piece = self._piece(split, epoch, block)
        low = min(within * self.order.share, len(piece))
        high = min(low + self.order.share, len(piece))
        return self.order.task.collate(piece, low, high) if low < high else None

    def progress(self, t: int) -> tuple[float, int]:
        """Epochs and what the loss counts, over all splits, from the start of training to step t."""
        epoch, step = divmod(t, self.per_epoch)
        items = epoch * self.order.total + min(step * self.order.batch, self.order.total)
        return t / self.per_epoch, round(items * self.order.counted / self.order.batch)

    def begins(self, t: int) -> bool:
        """Whether global step t is an epoch's first, where nothing is carried over from the step before."""
        return t % self.per_epoch == 0

    def seed_all(self, split: int, t: int) -> None:
        """Seed torch's global generators for a split's step (dropout reads them).

        One by one: torch.manual_seed formats its caller's stack three times where there is no GPU, up to 1 ms.
        """
        seed = int(np.random.SeedSequence([self.seed, DRAW, split, t]).generate_state(1, np.uint64)[0] >> 1)
        for generator in (torch.default_generator, *torch.cuda.default_generators):
            generator.manual_seed(seed)

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
            following = (epoch, block + 1) if block + 1 < self.order.blocks else (epoch + 1, 0)
            self._ahead_of((split, *following))
        return held[1]

    def _ahead_of(self, place: tuple[int, int, int]) -> Future[Piece]:
        if place not in self._ahead:
            self._ahead[place] = self._reader.submit(self._load, *place)
        return self._ahead[place]

    def _load(self, split: int, epoch: int, block: int) -> Piece:
        """Read one piece and put it in place (on the prefetch thread)."""
        began = time.monotonic_ns()
        piece = self.order.load(split, epoch, block)
        piece.move_(self.place)
        self.loaded(split, epoch, block, began, time.monotonic_ns())
        return piece
