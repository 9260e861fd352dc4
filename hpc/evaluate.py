"""Additive metrics: every rank adds up its pieces, all sums are joined in piece order and divided once.

The pieces are a function of the data set alone, and the join is exact (`math.fsum`), so a metric is the same number for
every number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from collectives.comm import Comm, everywhere
from hpc.batches import read_piece
from hpc.shards import DataError, Dataset
from models.task import Sums, Task

PIECE_ROWS = 4096
BATCH_ROWS = 2048


def evaluate(
    task: Task, model: torch.nn.Module, dataset: Dataset, comm: Comm, place: Callable[[torch.Tensor], torch.Tensor],
    autocast: Callable[[], AbstractContextManager], beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Every metric of a task over a whole data set, computed by all ranks (collective).

    place     moves a tensor to where the model is
    autocast  the precision to compute in
    beat      called now and then, to show that the rank is alive

    Returns metric -> sum / count. Raises DataError for a data set without items.
    """
    training = model.training
    model.eval()
    mine = []
    with torch.no_grad():
        for index in comm.mine(math.ceil(dataset.rows / PIECE_ROWS)):
            sums: list[Sums] = []
            rows = index * PIECE_ROWS, min((index + 1) * PIECE_ROWS, dataset.rows)
            for batch in batches_of(task, dataset, rows, place):
                with autocast():
                    sums.append(task.metrics(model, batch))
            mine.append([index, _add(sums)])
            beat()
    model.train(training)
    everyone = sorted(entry for rank in comm.gather(mine) for entry in rank)
    total = _add([sums for _, sums in everyone])
    empty = [name for name, (_, count) in total.items() if not count]
    if empty or not total:
        raise everywhere(DataError(f"data set '{dataset.folder}' has nothing to evaluate ({empty or 'no items'})"))
    return {name: value / count for name, (value, count) in total.items()}


def batches_of(
    task: Task, dataset: Dataset, rows: tuple[int, int], place: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[Any]:
    """The batches of a stretch of rows [low, high), in order."""
    piece = read_piece(dataset, [rows], task.margin)
    task.check(piece)
    piece.fields = {name: place(values) for name, values in piece.fields.items()}
    piece.items, piece.first, piece.last = place(piece.items), place(piece.first), place(piece.last)
    for at in range(0, len(piece), BATCH_ROWS):
        yield task.collate(piece, at, min(at + BATCH_ROWS, len(piece)))


def _add(sums: list[Sums]) -> Sums:
    names = sorted({name for s in sums for name in s})
    return {
        name: (math.fsum(s[name][0] for s in sums if name in s), math.fsum(s[name][1] for s in sums if name in s))
        for name in names
    }
