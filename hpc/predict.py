"""`trireme predict`: a finished run's outputs for every utterance, as a Kaldi archive or HDF5."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kaldiio
import numpy as np
import torch

from collectives.comm import Comm
from hpc.build import load_run
from hpc.evaluate import batches_of, whole_pieces
from hpc.pieces import whole_utterances
from hpc.quantities import counted
from hpc.run import compare_fields, read_data
from hpc.shards import Dataset, ShardWriter, read_manifest
from models.task import Task

EXAMPLES = """examples:
  trireme predict runs/an4 data/an4/test --to ark --priors      # scaled log-likelihoods for a Kaldi decoder
  trireme predict runs/an4 data/an4/test --to h5 --out posteriors
  mpiexec -n 4 python -m mpi4py -m hpc predict runs/an4 data/an4/test --to ark --priors

writes OUT/predictions-RANK.ark with OUT/predictions.scp; or OUT/predictions-RANK.h5 with the utterances' keys [n],
predictions/values [rows, classes] and predictions/starts [n + 1]: utterance i is values[starts[i]:starts[i + 1]].
Rows are frames, or sentences (one a sentence); language models have no predictions.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("data", type=Path, help="folder of a data set")
    parser.add_argument("--to", required=True, choices=["ark", "h5"], help="Kaldi archive with scp, or HDF5")
    parser.add_argument("--out", type=Path, help="folder to write to (default: RUN/predictions-DATA)")
    parser.add_argument(
        "--priors", action="store_true",
        help="subtract the training set's log class priors: scaled log-likelihoods instead of log posteriors",
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])


def run(arguments: argparse.Namespace, comm: Comm) -> int:
    """Write a finished run's outputs for every utterance of a data set (collective)."""
    _, task, model, device = load_run(arguments.run, arguments.device, comm)
    comm.on_root(lambda: _check(arguments, task))
    shift = log_priors(read_data(arguments.run)["fields"]["labels"]) if arguments.priors else None
    dataset = Dataset(arguments.data, task.fields, task.targets)
    out = arguments.out or arguments.run / f"predictions-{arguments.data.name}"
    comm.on_root(lambda: _clear(out, arguments.to))
    write = _write_ark if arguments.to == "ark" else _write_h5
    stem = f"predictions-{comm.rank:05d}"
    lines = comm.each(lambda: write(out, stem, predictions(task, model, dataset, comm, device, shift)))
    written = [line for rank in lines for line in rank]
    if arguments.to == "ark":
        comm.on_root(lambda: (out / "predictions.scp").write_text("".join(sorted(written)), encoding="utf-8"))
    what = "scaled log-likelihoods" if arguments.priors else "log posteriors"
    comm.on_root(lambda: print(f"{counted(len(written), 'utterance')} of {what} in {out}"))
    return 0


def _check(arguments: argparse.Namespace, task: Task) -> None:
    if (task.judged or task.unit) == "stream":
        raise ValueError("this run's task predicts the words of running text; there are no outputs to write for it")
    compare_fields(read_data(arguments.run)["fields"], read_manifest(arguments.data)["fields"], str(arguments.data))


def _clear(out: Path, kind: str) -> None:
    """Remove what an earlier prediction of this kind left, perhaps by more ranks, and nothing else."""
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob(f"predictions-[0-9][0-9][0-9][0-9][0-9].{kind}"), out / "predictions.scp"]:
        if old.suffix != ".scp" or kind == "ark":
            old.unlink(missing_ok=True)


def log_priors(labels: dict[str, Any]) -> np.ndarray:
    """Log of every class's share [C] of the training frames; a class never seen counts as half a frame."""
    counts = np.maximum(np.array(labels["counts"], np.float64), 0.5)
    return np.log(counts / counts.sum()).astype(np.float32)


def predictions(
    task: Task, model: torch.nn.Module, dataset: Dataset, comm: Comm, device: Any, shift: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Key and outputs of this rank's utterances: [T, C], or [1, C] where they are sequences with one output each."""
    keys = dataset.keys()
    by_row = task.unit == "row" or task.per_row
    with torch.no_grad():
        pieces = whole_pieces(dataset)
        for index in comm.mine(len(pieces)):
            first, last = whole_utterances(dataset, *pieces[index][0])
            outputs = []
            for batch in batches_of(task, dataset, pieces[index], device.place):
                with device.autocast():
                    outputs.append(task.predict(model, batch).float().cpu().numpy())
            whole = np.concatenate(outputs)
            if shift is not None:
                whole -= shift
            edges = dataset.starts[first : last + 1] - dataset.starts[first] if by_row else range(last - first + 1)
            for key, low, high in zip(keys[first:last], edges[:-1], edges[1:], strict=True):
                yield key, whole[low:high]


def _write_ark(out: Path, stem: str, pairs: Iterator[tuple[str, np.ndarray]]) -> list[str]:
    scp = out / f"{stem}.scp"
    with kaldiio.WriteHelper(f"ark,scp:{out / stem}.ark,{scp}") as archive:
        for key, values in pairs:
            archive(key, values)
    lines = scp.read_text(encoding="utf-8").splitlines(keepends=True)
    scp.unlink()
    return lines


def _write_h5(out: Path, stem: str, pairs: Iterator[tuple[str, np.ndarray]]) -> list[str]:
    first = next(pairs, None)
    if first is None:
        return []
    keys = []
    with ShardWriter(out / f"{stem}.h5", {"predictions": (first[1].shape[1:], np.float32)}) as writer:
        writer.append(first[0], {"predictions": first[1]})
        keys.append(first[0])
        for key, values in pairs:
            writer.append(key, {"predictions": values})
            keys.append(key)
    return keys
