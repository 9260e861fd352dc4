"""`bmuf.py accuracy`: what model averaging and BMUF do to frame error, tables 1 to 3 and figure 1 of paper 003."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks.rows import METHODS, NETWORKS, blocks_wanted, strategy
from runs import (
    RECIPE,
    Kept,
    Record,
    failure_of,
    frame_error,
    majority,
    rate_of_best,
    schedule,
    search,
    toml,
    trireme,
)

from hpc.bench_options import numbers
from hpc.records import read_records

NOWHERE = 0.02  # what ends within this of the majority class's error has learned nothing


@dataclass(frozen=True)
class Row:
    """A method with so many splits."""

    data: str
    network: str
    method: str
    splits: int

    def about(self, **more: Any) -> Record:
        return {**vars(self), **more}


class Accuracy:
    """The finished runs of one setup, and how to make others."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.kept = Kept(arguments.out, {"sweeps": arguments.sweeps}, said)

    def rows(self) -> list[Row]:
        """Those asked for."""
        a = self.arguments
        found = []
        for method in a.methods:
            for splits in [1] if method == "sgd" else a.splits:
                if splits in NETWORKS[a.network].rates[method]:
                    found.append(Row(a.data_name, a.network, method, splits))
        return found

    def tuned(self, row: Row, train: bool = False) -> float | None:
        """The rate of the best validation error on the tuning seed; `train`: after trying those that are missing."""
        held = {r["rate"]: value(r) for r in self.kept.of(**row.about(seed=self.arguments.tuning_seed))}
        if not train:
            return rate_of_best((rate, found) for rate, found in held.items() if found is not None)
        start = NETWORKS[row.network].rates[row.method][row.splits]
        return search(start, held, lambda rate: value(self.make(row, self.arguments.tuning_seed, rate)))

    def make(self, row: Row, seed: int, rate: float) -> Record:
        return self.kept.make(row.about(seed=seed, rate=rate), lambda: self.train(row, seed, rate))

    def run(
        self, name: str, changes: dict[str, Any], program: Sequence[str] = ("-m", "hpc", "train")
    ) -> tuple[Path, str]:
        """Train in a folder of this name; the folder, and why training gave up, or ""."""
        run = self.arguments.work / name
        (run / "failure.json").unlink(missing_ok=True)  # an earlier attempt's
        common = {
            "data.train": self.arguments.data / "train", "data.validation": self.arguments.data / "validation",
            "threads": 1, "device": "cpu", "log.tensorboard": False, "log.trace": 0, "checkpoint.keep": 1,
        }
        words = [f"{k}={v if isinstance(v, Path) else toml(v)}" for k, v in (common | changes).items()]
        code, _, said = trireme(RECIPE, f"run={run}", *words, program=program)
        return run, failure_of(run, code, said)

    def initial(self, network: str, seed: int) -> Path:
        """The run that all others with this seed start from: one sweep of SGD."""
        kind = NETWORKS[network]
        table = {"name": "momentum", "momentum": 0.9, "learning_rate": kind.initial}
        run, failure = self.run(f"initial-{self.arguments.data_name}-{network}-{seed}", {
            **{f"task.{key}": held for key, held in kind.task.items()}, "seed": seed, "splits": 1,
            "data.batch": kind.minibatch, "strategy": {"name": "allreduce"}, "optim": table,
            "schedule": {"name": "constant", "epochs": 1},
        })
        if failure:
            raise RuntimeError(failure)
        return run

    def train(self, row: Row, seed: int, rate: float) -> Record:
        kind, sweeps = NETWORKS[row.network], self.arguments.sweeps
        block_steps = kind.block.get(row.splits, 1)
        run, failure = self.run(
            "-".join(map(str, (row.data, row.network, row.method, row.splits, f"{rate:g}", seed))), {
                **{f"task.{key}": held for key, held in kind.task.items()},
                "seed": 100 + seed, "init_from": str(self.initial(row.network, seed)), "splits": row.splits,
                "data.batch": kind.minibatch * row.splits, "schedule": schedule(rate, sweeps),
                "strategy": strategy(row.method, row.splits, block_steps),
                "optim": {"name": "momentum", "momentum": 0.9, "learning_rate": rate},
            },
        )
        steps = next((r["step"] for r in read_records(run) if r["event"] == "validate"), 0)
        made = outcome(run, failure, self.arguments.data) | {
            "block_steps": block_steps, "blocks": sweeps * math.ceil(steps / block_steps),
            "blocks_wanted": round(blocks_wanted(row.method, row.splits), 1),
        }
        shutil.rmtree(run)
        return made

    def work(self) -> None:
        """Make what is asked for and missing."""
        seeds, rows = self.arguments.seeds, self.rows()
        for seed in {*seeds, self.arguments.tuning_seed}:
            self.initial(self.arguments.network, seed)
        with ThreadPoolExecutor(self.arguments.jobs) as crew:
            list(crew.map(lambda row: self.tuned(row, train=True), rows))
            if not self.arguments.tune:
                pairs = [(row, seed) for seed in seeds for row in rows]
                list(crew.map(lambda pair: self.make(*pair, self.tuned(pair[0])), pairs))


def outcome(run: Path, failure: str, data: Path) -> Record:
    """What came of a run: frame errors by sweep, of the best model on validation, and of that on the test set."""
    records = read_records(run)
    validations = [r for r in records if r["event"] == "validate"]
    nothing = 1 - majority(data / "train") - NOWHERE
    best = min((r for r in validations if r["best"]), key=lambda r: r["loss"], default={})
    test = None if failure else round(frame_error(run, data / "test"), 5)
    return {
        "failure": failure, "diverged": bool(failure) or validations[-1]["frame_error"] > nothing,
        "curve": [round(r["frame_error"], 5) for r in validations], "loss": [round(r["loss"], 5) for r in validations],
        "validation": best.get("frame_error"), "test": test,
        "seconds": round(sum(r["seconds"] for r in records if r["event"] in ("train", "rest")), 1),
    }


def value(record: Record) -> float | None:
    """What rates are chosen by: accuracy on the validation set, None for a run that failed."""
    return None if record["diverged"] or record["validation"] is None else 1 - record["validation"]


def said(record: Record) -> str:
    if record["failure"]:
        return record["failure"]
    error = "no model" if record["validation"] is None else f"validation {record['validation']:.2%}"
    return f"{error}, {record['seconds']:.0f} s"


def add_common(parser: argparse.ArgumentParser, folder: Path, out: str, sweeps: int) -> None:
    """What commands that train many runs have in common."""
    parser.add_argument("--data", type=Path, default=folder / "data" / "an4_102", help="holds train, validation, test")
    parser.add_argument("--data-name", default="an4", help="its name in the records (default: an4)")
    parser.add_argument("--seeds", type=numbers, default=[1, 2, 3])
    parser.add_argument("--sweeps", type=int, default=sweeps, help=f"after the initial model's one (default {sweeps})")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--work", type=Path, default=folder / "runs" / "bmuf", help="where runs are kept meanwhile")
    parser.add_argument("--out", type=Path, default=folder / "benchmarks" / "results" / out, help="finished runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--network", choices=NETWORKS, default="dnn")
    parser.add_argument("--methods", type=names, default=["sgd", *METHODS], help="default: sgd,ma,cbm,nbm")
    parser.add_argument("--splits", type=numbers, default=[8, 16, 32, 64], help="default: 8,16,32,64")
    parser.add_argument("--tune", action="store_true", help="search the learning rates only")
    parser.add_argument("--tuning-seed", type=int, default=1, help="whose runs say which rate is best, for all seeds")
