"""`bmuf.py rejection`: master and slaves of paper 000 on real data, one slave of eight being wrong."""

from __future__ import annotations

import argparse
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blocks.accuracy import Accuracy, outcome
from blocks.rows import NETWORKS
from runs import Record

from hpc.records import read_records

SLAVES, BAD = 8, 3  # the slave that is wrong, where one is
FAULTY = Path(__file__).with_name("faulty.py")
WITHOUT = "without it"
# case: (slaves, fault of one of them, whether slaves are judged)
CASES: dict[str, tuple[int, str, bool]] = {
    "all well": (SLAVES, "", True), WITHOUT: (SLAVES - 1, "", True), "all well, not judged": (SLAVES, "", False),
    "permuted labels": (SLAVES, "permuted", True), "permuted labels, not judged": (SLAVES, "permuted", False),
    "exploding": (SLAVES, "exploding", True), "exploding, not judged": (SLAVES, "exploding", False),
    "NaN": (SLAVES, "nan", True), "NaN, not judged": (SLAVES, "nan", False),
}
TOO_HIGH = "all rejected"  # a case of its own: a learning rate at which every slave is lost at first
FAULTS = ["none", "permuted", "exploding", "nan", TOO_HIGH]


class Rejection(Accuracy):
    """The cases, each with every seed."""

    def case(self, name: str, seed: int) -> Record:
        a = self.arguments
        about = {
            "case": name, "seed": seed, "tolerance": a.tolerance, "rate": a.rate * (1000 if name == TOO_HIGH else 1),
            "master_rate": a.master_rate, "draw": a.draw,
        }
        return self.kept.make(about, lambda: self.learn(about))

    def learn(self, about: Record) -> Record:
        a, kind = self.arguments, NETWORKS["dnn"]
        slaves, fault, judged = CASES.get(about["case"], (SLAVES, "", True))
        program = [str(FAULTY), str(BAD), fault] if fault else ["-m", "hpc", "train"]
        changes: dict[str, Any] = {
            **{f"task.{key}": held for key, held in kind.task.items()},
            "seed": 100 + about["seed"], "init_from": str(self.initial("dnn", about["seed"])), "splits": slaves,
            "data.batch": kind.minibatch * slaves, "data.draw": a.draw,
            "schedule": {"name": "halving", "epochs": a.sweeps}, "checkpoint.keep": 1,
            "strategy": {
                "name": "master_slave", "rejection": judged, "tolerance": a.tolerance,
                "master_learning_rate": a.master_rate,
            },
            "optim": {"name": "momentum", "momentum": 0.9, "learning_rate": about["rate"]},
        }
        run, failure = self.run("-".join(map(str, about.values())).replace(" ", "_").replace(",", ""), changes, program)
        judgements = [r for r in read_records(run) if r["event"] == "validate"]
        tellings = [r.get("told", {}) for r in judgements]
        found = outcome(run, failure, a.data) | {
            "slaves": sum(told.get("slaves", 0) for told in tellings),
            "rejected": [told.get("rejected", {}) for told in tellings],
            "rates": [r["learning_rate"] for r in judgements], "stayed": [t.get("stayed", False) for t in tellings],
            "phases": phases_of(run),
        }
        shutil.rmtree(run)
        return found

    def work(self) -> None:
        with ThreadPoolExecutor(self.arguments.jobs) as crew:
            for seed in self.arguments.seeds:
                self.initial("dnn", seed)
            faults = {name: fault or "none" for name, (_, fault, _) in CASES.items()} | {TOO_HIGH: TOO_HIGH}
            names = [name for name, fault in faults.items() if fault in self.arguments.faults]
            pairs = [(name, seed) for seed in self.arguments.seeds for name in names]
            list(crew.map(lambda pair: self.case(*pair), pairs))


def phases_of(run: Path) -> dict[str, float]:
    """Seconds by phase over a run's records of all ranks."""
    found: dict[str, float] = {}
    for record in read_records(run):
        for part in record.get("by_rank", ()):
            for phase in ("read", "forward", "backward", "exchange", "judge", "validate"):
                found[phase] = round(found.get(phase, 0.0) + part.get(phase, 0.0), 2)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Beside those that `accuracy` has, too."""
    parser.add_argument("--tolerance", type=float, default=1.1)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--master-rate", type=float, default=1.0)
    parser.add_argument(
        "--faults", type=lambda text: text.split(","), default=FAULTS, help=f"default: {','.join(FAULTS)}"
    )
    parser.add_argument("--draw", type=float, default=0.125, help="part of the data that a slave draws an epoch")
