"""`bmuf.py sweep`: where a sweep's time goes, on 1 and on 2 ranks: table 4 of paper 003."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from blocks.rows import DNN, strategy
from runs import RECIPE, ROOT, toml

from hpc.bench import machine, quotient, rounded, say
from hpc.bench_crew import outside_a_job
from hpc.records import read_records
from hpc.shards import read_manifest


def measure(arguments: argparse.Namespace) -> None:
    """Every method on 1 and on 2 ranks in turn, some rounds."""
    kinds = [(method, ranks) for method in ("nbm", "ma") for ranks in (1, 2)]
    taken: dict[tuple[str, int], list[dict[str, float]]] = {kind: [] for kind in kinds}
    for round_ in range(arguments.rounds):
        for kind in kinds if round_ % 2 == 0 else kinds[::-1]:
            taken[kind].append(sweep(arguments, *kind))
            say(f"round {round_ + 1}: {kind[0]} on {kind[1]}: {taken[kind][-1]}")
    lines: list[dict[str, Any]] = [machine() | {"for": "sweep"}]
    for (method, ranks), rows in taken.items():
        spent = {f"{part}_s": statistics.median(row[part] for row in rows) for part in rows[0]}
        lines.append({
            "what": "sweep", "method": method, "ranks": ranks, "splits": arguments.splits[0], "rounds": len(rows),
            **spent, "aggregate_share": statistics.median(row["aggregate"] / row["sum"] for row in rows),
        })
    for method in ("nbm", "ma"):
        one, two = ([row["sum"] for row in taken[method, ranks]] for ranks in (1, 2))
        lines.append({"what": "sweep ratio", "method": method, **quotient(one, two)})
    with open(arguments.out, "a", encoding="utf-8") as file:
        for line in lines:
            print(json.dumps(rounded(line)))
            file.write(json.dumps({"bench": "bmuf", **rounded(line)}) + "\n")


def sweep(arguments: argparse.Namespace, method: str, ranks: int) -> dict[str, float]:
    """Seconds of a sweep by what they went into, means over ranks; the first sweep, in which files are read, apart."""
    run, splits = arguments.work / f"sweep-{method}-{ranks}", arguments.splits[0]
    shutil.rmtree(run, ignore_errors=True)
    changes = {
        **{f"task.{key}": held for key, held in DNN.task.items()}, "data.train": str(arguments.data / "train"),
        "data.validation": str(arguments.data / "validation"), "splits": splits,
        "data.batch": DNN.minibatch * splits, "schedule": {"name": "constant", "epochs": 1 + arguments.sweeps},
        "strategy": strategy(method, splits, DNN.block[splits]), "threads": 1, "device": "cpu", "log.trace": 0,
        "optim": {"name": "momentum", "momentum": 0.9, "learning_rate": 0.1}, "log.tensorboard": False,
        "log.every": steps_of(arguments.data, DNN.minibatch * splits), "checkpoint.keep": 1,
    }
    words = ["mpiexec", "-n", str(ranks), sys.executable, "-m", "mpi4py", "-m", "hpc", "train", str(RECIPE)]
    words += [f"run={run}", *(f"{key}={toml(value)}" for key, value in changes.items())]
    subprocess.run(words, cwd=ROOT, env=outside_a_job(), check=True, capture_output=True)
    # A record at the end of every sweep, before its validation: from the second on, with the validation before it.
    records = [r for r in read_records(run) if r["event"] == "train"][1:]
    assert len(records) == arguments.sweeps
    whole = sum(r["seconds"] for r in records) / len(records)
    parts = [part for r in records for part in r["by_rank"]]
    total = {phase: sum(part[phase] for part in parts) / len(parts) for phase in ("exchange", "validate", "checkpoint")}
    shutil.rmtree(run)
    return {
        "optimize": whole - sum(total.values()), "aggregate": total["exchange"], "validate": total["validate"],
        "checkpoint": total["checkpoint"], "sum": whole,
    }


def steps_of(data: Path, batch: int) -> int:
    """Steps of a sweep."""
    return math.ceil(read_manifest(data / "train")["frames"] / batch)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "an4_102", help="holds train, validation")
    parser.add_argument("--splits", type=lambda text: [int(text)], default=[8])
    parser.add_argument("--sweeps", type=int, default=2, help="of a run, after one that is not counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bmuf")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bmuf_sweep.jsonl")
