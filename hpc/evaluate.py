"""Additive metrics: every rank adds up its pieces, all sums are joined in piece order and divided once.

The pieces are a function of the data set alone, and the join is exact (`math.fsum`), so a metric is the same number for
every number of ranks. Sequences are evaluated whole. Running text is cut into stretches, evaluated side by side, each
from nothing: only a stretch's first words miss what came before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from collectives.comm import Comm, everywhere
from hpc.pieces import read_for, whole_utterances
from hpc.shards import DataError, Dataset
from models.task import Carry, Piece, Sums, Task

PIECE_ROWS = 4096
BATCH_ROWS = 2048
STRETCH, STRETCHES = 2048, 4  # rows of running text; stretches of a piece, evaluated side by side


def evaluate(
    task: Task, model: torch.nn.Module, dataset: Dataset, comm: Comm, place: Callable[[torch.Tensor], torch.Tensor],
    autocast: Callable[[], AbstractContextManager], beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Every metric of a task over a whole data set, computed by all ranks (collective).

    place     moves a tensor to where the model is
    autocast  the precision to compute in
    beat      called now and then, to show that the rank is alive

    Returns metric -> sum / count, and what the task derives from them. Raises DataError for a data set without items.
    """
    training = model.training
    model.eval()
    mine = []
    with torch.no_grad():
        pieces = pieces_of(task, dataset)
        if not pieces:
            raise everywhere(DataError(f"data set '{dataset.folder}' has nothing to evaluate"))
        for index in comm.mine(len(pieces)):
            sums: list[Sums] = []
            carry: Carry = None
            for batch in batches_of(task, dataset, pieces[index], place):
                with autocast():
                    found, carry = task.metrics(model, batch, carry)
                sums.append(found)
                beat()
            mine.append([index, add_up(sums)])
    model.train(training)
    everyone = sorted(entry for rank in comm.gather(mine) for entry in rank)
    total = add_up([sums for _, sums in everyone])
    empty = [name for name, (_, count) in total.items() if not count]
    if empty or not total:
        raise everywhere(DataError(f"data set '{dataset.folder}' has nothing to evaluate ({empty or 'no items'})"))
    metrics = {name: value / count for name, (value, count) in total.items()}
    return metrics | task.derived(metrics)


def count_of(task: Task, dataset: Dataset) -> int:
    """What the task's metrics count in a data set: frames, sentences, words."""
    unit = task.judged or task.unit
    if unit == "stream":
        return dataset.rows - 1
    return dataset.rows if unit == "row" or task.per_row else dataset.utterances


Runs = list[tuple[int, int]]  # row ranges [low, high)


def pieces_of(task: Task, dataset: Dataset) -> list[Runs]:
    """The row ranges of every piece of a data set, in order."""
    unit = task.judged or task.unit
    if unit == "stream":
        return _stretches(dataset.rows - 1)  # every row but the first is predicted
    edges = range(0, dataset.rows, PIECE_ROWS)
    windows = [(low, min(low + PIECE_ROWS, dataset.rows)) for low in edges]
    return [[window] for window in windows] if unit == "row" else whole_pieces(dataset)


def whole_pieces(dataset: Dataset) -> list[Runs]:
    """A data set cut between utterances, every PIECE_ROWS rows or so; always one range a piece."""
    found = []
    for low in range(0, dataset.rows, PIECE_ROWS):
        first, last = whole_utterances(dataset, low, low + PIECE_ROWS)
        if first < last:
            found.append([(int(dataset.starts[first]), int(dataset.starts[last]))])
    return found


def _stretches(rows: int) -> list[Runs]:
    """Pieces of stretches of one length each; what is left of the last is a piece of one shorter stretch."""
    whole = [(low, low + STRETCH) for low in range(0, rows - STRETCH + 1, STRETCH)]
    pieces = [whole[at : at + STRETCHES] for at in range(0, len(whole), STRETCHES)]
    rest = len(whole) * STRETCH
    return [*pieces, *([[(rest, rows)]] if rest < rows else [])]


def batches_of(
    task: Task, dataset: Dataset, runs: Runs, place: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[Any]:
    """The batches of a piece, in order."""
    piece = read_for(task, dataset, runs, task.judged)
    task.check(piece)
    share = _items_of_a_batch(task, piece)
    piece.move_(place)
    for at in range(0, len(piece), share):
        yield task.collate(piece, at, min(at + share, len(piece)))


def _items_of_a_batch(task: Task, piece: Piece) -> int:
    if piece.unit == "stream":
        return task.steps * piece.lanes
    if piece.unit == "row":
        return BATCH_ROWS
    longest = int((piece.last - piece.first).max()) + 1
    return max(1, BATCH_ROWS // longest)


def add_up(sums: list[Sums]) -> Sums:
    """Sums and counts, metric by metric, exactly: in whatever order, they are the same."""
    names = sorted({name for s in sums for name in s})
    return {
        name: (math.fsum(s[name][0] for s in sums if name in s), math.fsum(s[name][1] for s in sums if name in s))
        for name in names
    }
