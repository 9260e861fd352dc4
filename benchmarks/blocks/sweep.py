"""`bmuf.py sweep` and `bmuf.py chunks`: where a sweep's time goes, on 1 and on 2 ranks (table 4 of paper 003), and by
context-sensitive chunks beside whole utterances."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from blocks.rows import NETWORKS, Network, strategy
from runs import RECIPE, ROOT, toml

from hpc.batches import make_order
from hpc.bench import in_turns, machine, quotient, rounded, say
from hpc.bench_crew import outside_a_job
from hpc.records import read_records
from hpc.shards import Dataset, read_manifest
from models.frames import Frames


class Kind(NamedTuple):
    """What is timed: `runs` of them at once, which exchange nothing, say what the machine has to give."""

    network: str
    method: str
    ranks: int
    runs: int = 1


# command: what is timed in pairs, the second beside the first
PAIRS = {
    "sweep": [
        (Kind("dnn", "nbm", 1), Kind("dnn", "nbm", 2)), (Kind("dnn", "ma", 1), Kind("dnn", "ma", 2)),
        (Kind("dnn", "nbm", 1), Kind("dnn", "nbm", 1, runs=2)),
    ],
    "chunks": [(Kind("blstm-whole", "sgd", 1), Kind("blstm", "sgd", 1))],
}


def measure(arguments: argparse.Namespace) -> None:
    """Every kind in turn, some rounds; of every pair how many times as fast the second is."""
    pairs = PAIRS[arguments.command]
    kinds = list(dict.fromkeys(kind for pair in pairs for kind in pair))
    taken: dict[Kind, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for round_ in range(arguments.rounds):
        for kind in in_turns(round_, kinds):
            taken[kind].append(sweep(arguments, kind))
            say(f"round {round_ + 1}: {kind}: {rounded(taken[kind][-1])}")
    frames = read_manifest(arguments.data / "train")["frames"]
    lines: list[dict[str, Any]] = [machine() | {"for": arguments.command}]
    for kind, rows in taken.items():
        spent = {f"{part}_s": statistics.median(row[part] for row in rows) for part in rows[0]}
        lines.append({
            "what": arguments.command, **kind._asdict(), "splits": splits_of(arguments, kind), "rounds": len(rows),
            "block_steps": arguments.block_steps, **spent, "frames_per_s": kind.runs * frames / spent["sum_s"],
            "aggregate_share": statistics.median(row["aggregate"] / row["sum"] for row in rows),
        })
    for one, other in pairs:
        times = ([row["sum"] / kind.runs for row in taken[kind]] for kind in (one, other))
        lines.append({
            "what": f"{arguments.command} ratio", **other._asdict(), "beside": one._asdict(), **quotient(*times)
        })
    with open(arguments.out, "a", encoding="utf-8") as file:
        for line in lines:
            print(json.dumps(rounded(line)))
            file.write(json.dumps({"bench": "bmuf", **rounded(line)}) + "\n")


def splits_of(arguments: argparse.Namespace, kind: Kind) -> int:
    return 1 if kind.method == "sgd" else arguments.splits


def sweep(arguments: argparse.Namespace, kind: Kind) -> dict[str, float]:
    """Seconds of a sweep by what they went into, means over ranks and runs; the first sweep, in which files are read,
    apart."""
    network, splits = NETWORKS[kind.network], splits_of(arguments, kind)
    changes = {
        **{f"task.{key}": held for key, held in network.task.items()}, "data.train": str(arguments.data / "train"),
        "data.validation": str(arguments.data / "validation"), "splits": splits,
        "data.batch": network.minibatch * splits, "schedule": {"name": "constant", "epochs": 1 + arguments.sweeps},
        "strategy": strategy(kind.method, splits, arguments.block_steps), "threads": 1, "device": "cpu",
        "optim": {"name": "momentum", "momentum": 0.9, "learning_rate": 0.1}, "log.tensorboard": False,
        "log.every": steps_of(arguments.data, network, splits), "log.trace": 0, "checkpoint.keep": 1,
    }
    words = ["mpiexec", "-n", str(kind.ranks), sys.executable, "-m", "mpi4py", "-m", "hpc", "train", str(RECIPE)]
    words += [f"{key}={toml(value)}" for key, value in changes.items()]
    runs = [arguments.work / f"sweep-{number}" for number in range(kind.runs)]
    with ThreadPoolExecutor(kind.runs) as crew:
        found = list(crew.map(lambda run: timed(run, [*words, f"run={run}"], arguments.sweeps), runs))
    return {part: statistics.fmean(row[part] for row in found) for part in found[0]}


def timed(run: Path, words: list[str], sweeps: int) -> dict[str, float]:
    """The same of one run. Raises RuntimeError."""
    shutil.rmtree(run, ignore_errors=True)
    done = subprocess.run(words, cwd=ROOT, env=outside_a_job(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{run} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    # A record at the end of every sweep, before its validation: from the second on, with the validation before it.
    records = [r for r in read_records(run) if r["event"] == "train"][1:]
    assert len(records) == sweeps
    whole = sum(r["seconds"] for r in records) / len(records)
    parts = [part for r in records for part in r["by_rank"]]
    total = {phase: sum(part[phase] for part in parts) / len(parts) for phase in ("exchange", "validate", "checkpoint")}
    shutil.rmtree(run)
    return {
        "optimize": whole - sum(total.values()), "aggregate": total["exchange"], "validate": total["validate"],
        "checkpoint": total["checkpoint"], "sum": whole,
    }


def steps_of(data: Path, network: Network, splits: int) -> int:
    """Steps of a sweep."""
    dataset = Dataset(data / "train")
    task = Frames(dataset.manifest["fields"], **network.task)
    batch = network.minibatch * splits
    return make_order(dataset, task, splits, batch=batch, split_frames=1, runs=1, seed=0).per_epoch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "an4_102", help="holds train, validation")
    parser.add_argument("--splits", type=int, default=8)
    parser.add_argument("--block-steps", type=int, default=109, help="default: 4 blocks a sweep of AN4 with 8 splits")
    parser.add_argument("--sweeps", type=int, default=2, help="of a run, after one that is not counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bmuf")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bmuf_sweep.jsonl")
