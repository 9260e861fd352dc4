"""Pieces of a data set in memory: row ranges, read as contiguous runs.

Legend: R rows in memory, U utterances in memory, N items of a piece.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from hpc.shards import Dataset
from models.chunks import chunk_starts
from models.task import Piece, Task, Unit


def read_piece(dataset: Dataset, runs: Iterable[tuple[int, int]], margin: int = 0) -> Piece:
    """Read row ranges [low, high) of a data set, with up to `margin` rows more on either side within the utterance.

    Items are the ranges' rows, in order. Where the data set has targets, the ranges must hold whole utterances. Raises
    DataError, naming the file, if anything cannot be read.
    """
    starts = dataset.starts
    wide = []  # of every run: its items' rows, the rows to read, the edges of the utterances they lie in
    for low, high in runs:
        edges = starts[dataset.utterance_at(low) : dataset.utterance_at(high - 1) + 2]
        wide.append((low, high, max(low - margin, int(edges[0])), min(high + margin, int(edges[-1])), edges))
    fields = _rows(dataset, dataset.frame_fields, [(first, last) for _, _, first, last, _ in wide])
    heads = np.cumsum([0] + [high - low for low, high, *_ in wide])  # where every run's items begin
    items, firsts, lasts = (np.empty(heads[-1], np.int64) for _ in range(3))
    at = 0
    for (low, high, first, last, edges), head in zip(wide, heads[:-1], strict=True):
        here, shift = slice(head, head + high - low), at - first
        lengths: Any = np.diff(np.clip(edges, low, high))  # items of every utterance
        items[here] = np.arange(low + shift, high + shift)
        firsts[here] = np.repeat(np.maximum(edges[:-1], first) + shift, lengths)
        lasts[here] = np.repeat(np.minimum(edges[1:], last) - 1 + shift, lengths)
        at += last - first

    def key_of(position: int) -> str:
        run = int(np.searchsorted(heads, position, side="right")) - 1
        return dataset.key(dataset.utterance_at(wide[run][0] + position - int(heads[run])))

    piece = Piece(fields, torch.from_numpy(items), torch.from_numpy(firsts), torch.from_numpy(lasts), key_of)
    if dataset.targets:
        _add_targets(piece, dataset, [(low, high) for low, high, *_ in wide])
    return piece


def read_sequences(dataset: Dataset, runs: Iterable[tuple[int, int]]) -> Piece:
    """Read the utterances that these row ranges hold whole; every utterance is an item."""
    piece = read_piece(dataset, runs)
    piece.take_(torch.nonzero(piece.items == piece.first).flatten())
    piece.unit = "sequence"
    return piece


def read_chunks(dataset: Dataset, runs: Iterable[tuple[int, int]], begins: np.ndarray, margin: int) -> Piece:
    """Read row ranges that hold whole chunks, with rows on either side; every chunk is an item, its first row.

    begins  the first row of every chunk of the data set, as `item_starts` has them
    """
    runs = list(runs)
    at, positions = 0, []
    for low, high in runs:
        first, last = np.searchsorted(begins, [low, high])
        positions.append(begins[first:last] - low + at)
        at += high - low
    piece = read_piece(dataset, runs, margin)
    piece.take_(torch.from_numpy(np.concatenate(positions)))
    piece.unit = "chunk"
    return piece


def read_lanes(dataset: Dataset, runs: Iterable[tuple[int, int]], margin: int) -> Piece:
    """Read row ranges of one length, a lane each, with rows on either side; items are [steps, lanes], flat."""
    runs = list(runs)
    piece = read_piece(dataset, runs, margin)
    piece.take_(torch.arange(len(piece)).view(len(runs), -1).T.flatten())
    piece.unit, piece.lanes = "stream", len(runs)
    return piece


def item_starts(dataset: Dataset, unit: Unit, steps: int) -> np.ndarray | None:
    """The row that every item begins at, and where the last one ends, int64 [N + 1]; None: every row is an item.

    steps  rows of a chunk; an utterance's last may be shorter
    """
    if unit == "sequence":
        return dataset.starts
    if unit != "chunk":
        return None
    return chunk_starts(torch.from_numpy(np.asarray(dataset.starts, np.int64)), steps).numpy()


def read_stream(dataset: Dataset, runs: Iterable[tuple[int, int]]) -> Piece:
    """Read ranges of text of one length, a lane each, and the row after each; items are [steps, lanes], flat."""
    runs = list(runs)
    fields = _rows(dataset, dataset.frame_fields, [(low, high + 1) for low, high in runs])
    steps = runs[0][1] - runs[0][0]
    lanes = torch.arange(len(runs)) * (steps + 1)
    items = (torch.arange(steps)[:, None] + lanes).flatten()
    whole = (lanes.repeat(steps), (lanes + steps).repeat(steps))

    def key_of(position: int) -> str:
        step, lane = divmod(position, len(runs))
        return dataset.key(dataset.utterance_at(runs[lane][0] + step))

    return Piece(fields, items, *whole, key_of, lanes=len(runs), unit="stream")


def empty_piece() -> Piece:
    nothing = torch.zeros(0, dtype=torch.int64)
    return Piece({}, nothing, nothing, nothing, lambda position: "")


def whole_utterances(dataset: Dataset, low: int, high: int) -> tuple[int, int]:
    """The utterances [first, last) that begin in rows [low, high)."""
    first, last = np.searchsorted(dataset.starts[:-1], [low, high])
    return int(first), int(last)


def read_for(
    task: Task, dataset: Dataset, runs: Iterable[tuple[int, int]], unit: Unit | None = None,
    starts: np.ndarray | None = None,
) -> Piece:
    """Read row ranges as the task's items, or as items of another unit.

    starts  unit "chunk": where the data set's items begin
    """
    unit = unit or task.unit
    if unit == "row":
        return read_piece(dataset, runs, task.margin)
    if unit == "chunk":
        assert starts is not None
        return read_chunks(dataset, runs, starts, task.margin)
    if unit == "stream" and task.margin:
        return read_lanes(dataset, runs, task.margin)
    return (read_sequences if unit == "sequence" else read_stream)(dataset, runs)


def _rows(
    dataset: Dataset, names: Iterable[str], ranges: list[tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """Row ranges of fields, one after another: field -> [R, ...]."""
    found = {}
    for name in names:
        about = dataset.field(name)
        shape = (sum(high - low for low, high in ranges), *([about["width"]] if "width" in about else []))
        values = np.empty(shape, about["dtype"])
        at = 0
        for low, high in ranges:
            dataset.read(name, low, high, values[at : at + high - low])
            at += high - low
        found[name] = torch.from_numpy(values)
    return found


def _add_targets(piece: Piece, dataset: Dataset, runs: list[tuple[int, int]]) -> None:
    """Read the targets of the utterances in these row ranges, and say which utterance each item belongs to."""
    utterances = [whole_utterances(dataset, low, high) for low, high in runs]
    for name in dataset.targets:
        starts = dataset.target_starts[name]
        values = _rows(dataset, [name], [(int(starts[low]), int(starts[high])) for low, high in utterances])[name]
        lengths: Any = np.concatenate([np.diff(starts[low : high + 1]) for low, high in utterances])
        piece.targets[name] = (values, torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])))
    lengths = np.concatenate([np.diff(dataset.starts[low : high + 1]) for low, high in utterances])
    piece.sequence = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
