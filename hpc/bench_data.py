"""`trireme bench data`: loading a split beside plain h5py reading, stacking batches, and waiting for data.

The page cache is warm: what is measured is this code and HDF5, not the disk. Loading is what the prefetch thread does
to get a split's frames into memory, fletcher32 checksums included, before they are checked and shuffled; the limit
reads as many rows of the same files in one stretch.

Legend: N items of a piece.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc.bench import in_turns, make_data, quotient, recipe_for, say, scratch, spread
from hpc.bench_crew import Crew
from hpc.build import registry
from hpc.hdf5 import plain_reader
from hpc.orders import SHUFFLE, Shuffled, generator
from hpc.pieces import read_piece
from hpc.shards import Dataset
from models.task import Piece

PIECE_STEPS = 16  # batches of a piece while waiting is measured: a new piece every few steps
MODELS = ({"layers": 3, "width": 512, "batch": 512}, {"layers": 7, "width": 1024, "batch": 1024})
BATCH_ROUNDS = 200  # batches stacked, at most
GIGA = 1e9


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Loading, shuffling and stacking, waiting. Raises DataError for a folder that is no data set of frames."""
    with scratch() as folder:
        data = arguments.data
        if data is None:
            data = folder / "data"
            say(f"writing {arguments.gb:g} GB of random frames")
            make_data(data, int(arguments.gb * GIGA / (40 * 4 + 4)))
        dataset = Dataset(data)
        task = registry()["task"]["frames"]({name: dataset.field(name) for name in dataset.frame_fields})
        order = Shuffled(
            dataset, task, 1, batch=arguments.batch, split_frames=arguments.split_frames, runs=8, seed=1
        )
        yield _loading(order, arguments.repeat)
        yield _stacking(order, arguments.repeat)
        dataset.close()
        for model in MODELS:
            yield _waiting(data, dataset.rows, model, arguments.steps, folder)


def _loading(order: Shuffled, repeat: int) -> dict[str, Any]:
    """read_piece of the runs a split really gets, beside h5py reading as many rows in one stretch."""
    dataset, margin = order.dataset, order.task.margin
    pieces = [order.runs_of(0, 0, block) for block in range(order.blocks)]
    rows = sum(high - low for low, high in pieces[0])
    pieces = [runs for runs in pieces if sum(high - low for low, high in runs) == rows]  # the last may be shorter
    plain = PlainReading(dataset)
    ours: list[float] = []
    limit: list[float] = []
    cpu: dict[Any, list[float]] = {read_piece: [], plain: []}
    for round_ in range(-len(pieces), repeat):  # those below 0 fill the page cache and HDF5's own
        at = round_ % len(pieces)
        sides: list[tuple[list[float], partial[Any]]] = [
            (ours, partial(read_piece, dataset, pieces[at], margin)),
            (limit, partial(plain, at * rows, at * rows + rows)),
        ]
        for taken, act in in_turns(round_, sides):
            cpu_began = time.thread_time()
            seconds = _seconds(act)
            if round_ >= 0:
                taken.append(seconds)
                cpu[act.func].append(time.thread_time() - cpu_began)
        if round_ >= 0:
            say(f"load split {round_ + 1} of {repeat}: {ours[-1]:.4f} s, h5py contiguous {limit[-1]:.4f} s")
    size = rows * sum(plain.row_bytes.values())
    speeds = {"gbps": size / statistics.median(ours) / GIGA, "limit_gbps": size / statistics.median(limit) / GIGA}
    return {
        "what": "load split", "rows": rows, "bytes": size, "runs": len(pieces[0]), "fletcher32": True,
        "data_rows": dataset.rows, **spread(ours), "limit": "h5py contiguous", **spread(limit, "limit_"), **speeds,
        **quotient(limit, ours), **quotient(cpu[plain], cpu[read_piece], "cpu_ratio"),
    }


class PlainReading:
    """Global rows [low, high) of all frame fields by h5py's own slicing, files opened beforehand."""

    def __init__(self, dataset: Dataset):
        self.edges = dataset.shard_rows
        self.row_bytes: dict[str, int] = {}
        self.readers: dict[tuple[int, str], Callable[[int, int], np.ndarray]] = {}
        for shard, entry in enumerate(dataset.manifest["shards"]):
            for field in dataset.frame_fields:
                name = next(file["name"] for file in entry["files"] if field in file["rows"])
                reader = plain_reader(dataset.folder / name, field)
                self.readers[shard, field] = reader
                self.row_bytes[field] = reader(0, 1).nbytes

    def __call__(self, low: int, high: int) -> list[np.ndarray]:
        found = []
        for field in self.row_bytes:
            for shard, (base, end) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
                if low < end and base < high:
                    found.append(self.readers[shard, field](max(low - base, 0), min(high, end) - base))
        return found


def _stacking(order: Shuffled, repeat: int) -> dict[str, Any]:
    """Collating a batch of a shuffled piece, beside a copy of the stacked batch; shuffling, by the batch."""
    piece = read_piece(order.dataset, order.runs_of(0, 0, 0), order.task.margin)
    shuffles = []
    for round_ in range(repeat):
        part = Piece(piece.fields, piece.items, piece.first, piece.last, piece.key_of)
        shuffles.append(_seconds(partial(_shuffle_, part, round_)))
    _shuffle_(piece, 0)
    share = min(order.share, len(piece))
    count = len(piece) // share
    collates: list[float] = []
    copies: list[float] = []
    for i in range(min(count, BATCH_ROUNDS)):
        low = i * share
        stacked = order.task.collate(piece, low, low + share).inputs
        collate = partial(order.task.collate, piece, low, low + share)
        for taken, act in in_turns(i, [(collates, collate), (copies, stacked.clone)]):
            taken.append(_seconds(act))
    say(f"stack a batch: {statistics.median(collates) * 1e3:.3f} ms, copy it {statistics.median(copies) * 1e3:.3f} ms")
    return {
        "what": "shuffle and stack", "rows": len(piece), "batch": share, "window": 2 * order.task.margin + 1,
        "bytes": stacked.nbytes, **spread(collates), "shuffle_s_per_batch": statistics.median(shuffles) / count,
        "limit": "copy of the stacked batch", **spread(copies, "limit_"), **quotient(collates, copies, "times_limit"),
    }


def _shuffle_(piece: Piece, round_: int) -> None:
    piece.take_(torch.from_numpy(generator(1, SHUFFLE, round_).permutation(len(piece))))


def _waiting(data: Path, rows: int, model: dict[str, int], steps: int, folder: Path) -> dict[str, Any]:
    """The share of a training run's time that goes into getting the next batch, on one rank."""
    batch = model["batch"]
    steps = min(steps, -(-rows // batch) - 2)
    if steps < 1:
        raise ValueError(f"the data set has {rows} frames; waiting needs {3 * batch} at least")
    recipe = recipe_for(
        data, folder / f"waiting-{model['width']}", device="cpu", task={k: model[k] for k in ("layers", "width")},
        data={"batch": batch, "split_frames": PIECE_STEPS * batch},
    )
    label = f"waiting {model['layers']}x{model['width']}"
    say(f"{label}: {steps} training steps")
    with Crew(label, 1, "hpc.bench_worker", {"recipe": recipe}, folder=folder) as crew:
        first = crew.take(1)[0][0]  # nothing to read it behind
        taken = crew.take(steps)[0]
        parameters = crew.hello[0]["parameters"]
    reads, all_seconds = [step["read"] for step in taken], [step["seconds"] for step in taken]
    return {
        "what": "waiting", **model, "parameters": parameters,
        "split_frames": PIECE_STEPS * batch, "pieces": -(-steps // PIECE_STEPS),
        "share": sum(reads) / sum(all_seconds), "read_s": sum(reads), "longest_read_s": max(reads),
        "first_read_s": first["read"], **spread(all_seconds),
    }


def _seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    kept = act()  # freeing the result is not part of getting it
    seconds = time.perf_counter() - began
    del kept
    return seconds
