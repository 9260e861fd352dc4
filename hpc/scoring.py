"""`trireme evaluate`: a finished run's metrics on a data set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from collectives.comm import Comm
from hpc.build import load_run
from hpc.evaluate import count_of, evaluate
from hpc.quantities import is_fraction
from hpc.run import compare_fields, read_data
from hpc.shards import Dataset, read_manifest
from models.task import Task

EXAMPLES = """examples:
  trireme evaluate runs/demo data/demo/validation
  mpiexec -n 4 python -m mpi4py -m hpc evaluate runs/demo data/demo/validation --json

What is measured is the task's: frames: frame_error and loss (nats a frame); sentences: error and loss; lm: loss (nats a
word) and perplexity.
"""

def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("data", type=Path, help="folder of a data set")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")


def run(arguments: argparse.Namespace, comm: Comm) -> int:
    """Print a finished run's metrics on a data set (collective)."""
    _, task, model, device = load_run(arguments.run, arguments.device, comm)
    comm.on_root(lambda: _check(arguments))
    dataset = Dataset(arguments.data, task.fields, task.targets)
    metrics = evaluate(task, model, dataset, comm, device.place, device.autocast)
    comm.on_root(lambda: _print_metrics(arguments, task, dataset, metrics))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    compare_fields(read_data(arguments.run)["fields"], read_manifest(arguments.data)["fields"], str(arguments.data))


def _print_metrics(
    arguments: argparse.Namespace, task: Task, dataset: Dataset, metrics: dict[str, float]
) -> None:
    if arguments.json:
        about = {"run": str(arguments.run), "data": str(arguments.data), task.noun: count_of(task, dataset)}
        print(json.dumps(about | metrics))
        return
    size = f"{count_of(task, dataset):,} {task.noun}"
    table = Table(title=f"{arguments.run} on {arguments.data}: {size}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    counts = dataset.field("labels").get("counts") if "labels" in dataset.manifest["fields"] else None
    if counts:
        error = next((name for name in metrics if is_fraction(name)), "error")
        table.add_row(f"{error} of the majority class", f"{1 - max(counts) / sum(counts):.4f}")
    Console().print(table)
