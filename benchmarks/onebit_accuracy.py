"""Tables 2 and 3 of paper 002 on AN4's senones: what 1-bit SGD, double buffering and AdaGrad do to accuracy.

    python benchmarks/onebit_accuracy.py --tune              the learning rate of every row, on seed 1
    python benchmarks/onebit_accuracy.py                     every row with every seed, each at its best rate
    python benchmarks/onebit_accuracy.py --tables 2 --networks relu --rows baseline,onebit --seeds 1,2 --jobs 2
    python benchmarks/onebit_accuracy.py --rows onebit --rates 0.4,0.8 --cold-start 0       at these rates instead
    python benchmarks/onebit_accuracy.py --summary --plot docs/onebit_accuracy.png          trains nothing

AN4 is prepared as benchmarks/RESULTS.md says, with CNTK's 132 states. A run is one process with one thread and four
splits, the paper's K = 4; on four ranks it would learn the same bits. All runs have the same number of epochs and the
same two steps of the learning rate (the paper's are fixed, too), so what they learned on the training set can be
compared. The rate of a row is the one with the best held-out accuracy of seed 1 (--tuning-seed): factors of 2, one more
wherever the best is at an edge.

A finished run is a JSON line of --out; a run that has its line is not made again, and an interrupted one is gone on
with: {"bench": "onebit_accuracy", "table", "row", "network", "seed", "rate", "cold_start" (frames), "setup" (what all
runs have in common), "held_out" (frame accuracy of the model that is best by held-out loss), "held_out_last",
"training" (frame accuracy of the best model on the training set), "curve" (held-out accuracy by epoch), "best_epoch",
"epochs", "seconds", "cpu_s" (processor time, starting included; null for a run that was interrupted), "exchange" (what
the run said of it), "diverged", "failure"}. A run that training gives up on, or that ends near the majority class, is a
result: it diverged.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebit.accuracy_tables import draw, markdown, rates_of
from onebit.rows import NETWORKS, REFERENCE, ROWS, Row, best_rate
from runs import RECIPE, ROOT, Kept, Record, failure_of, frame_error, majority, schedule, search, toml, trireme

from hpc.bench_options import numbers
from hpc.records import read_records

NEAR = 0.1  # what ends within this of the majority class's accuracy has learned nothing


@dataclass(frozen=True)
class Setting:
    """One run."""

    row: Row
    network: str
    seed: int
    rate: float
    cold_start: int

    @property
    def name(self) -> str:
        cold = f"-cold{self.cold_start}" if self.row.onebit is not None else ""
        return f"{self.row.name}-{self.network}-{self.rate:g}{cold}-seed{self.seed}"

    def about(self) -> dict[str, Any]:
        cold = self.cold_start if self.row.onebit is not None else None
        return {
            "table": self.row.table, "row": self.row.name, "network": self.network, "seed": self.seed,
            "rate": self.rate, "cold_start": cold,
        }

    def overrides(self, setup: dict[str, Any]) -> list[str]:
        """The recipe's keys."""
        if self.row.onebit is None:
            strategy: dict[str, Any] = {"name": "allreduce"}
        else:
            strategy = {"name": "onebit", "cold_start": float(self.cold_start), **self.row.onebit, **setup["strategy"]}
        tables = {
            "strategy": strategy, "optim": self.row.optim | {"learning_rate": self.rate},
            "schedule": schedule(self.rate, setup["epochs"]),
        }
        network = NETWORKS[self.network] | {"layers": setup["layers"], "width": setup["width"]}
        return [
            f"seed={self.seed}", f"splits={setup['splits']}", f"data.batch={setup['batch']}", "threads=1", "device=cpu",
            *(f"task.{key}={toml(value)}" for key, value in network.items()),
            *(f"{name}={toml(table)}" for name, table in tables.items()),
            "log.tensorboard=false", "log.trace=0", "checkpoint.keep=1",
        ]


class Bench:
    """The finished runs, and how to make others."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.tuning_seed = arguments, arguments.tuning_seed
        self.rates = [float(rate) for rate in (arguments.rates or "").split(",") if rate]
        self.setup = {key: getattr(arguments, key) for key in ("layers", "width", "batch", "splits", "epochs")}
        self.setup["strategy"] = json.loads(arguments.strategy)  # of the rows that quantize
        self.kept = Kept(arguments.out, self.setup, said)

    def of(self, row: Row, network: str, seed: int | None = None) -> list[dict[str, Any]]:
        """A row's records, those of another cold start left out."""
        cold = self.arguments.cold_start if row.onebit is not None else None
        return [
            r for r in self.kept.records
            if (r["row"], r["network"], r["cold_start"]) == (row.name, network, cold) and seed in (None, r["seed"])
        ]

    def make(self, setting: Setting) -> Record:
        """A run's record, of which it is trained if it has none."""
        return self.kept.make(setting.about(), lambda: self.train(setting))

    def train(self, setting: Setting) -> dict[str, Any]:
        run = self.arguments.work / "-".join([setting.name, *(f"{k[0]}{v}" for k, v in self.setup.items() if v)])
        (run / "failure.json").unlink(missing_ok=True)  # an earlier attempt's
        train, validation = (self.arguments.data / part for part in ("train", "validation"))
        words = ["train", RECIPE, f"run={run}", f"data.train={train}", f"data.validation={validation}"]
        code, cpu_s, said = trireme(*words, *setting.overrides(self.setup))
        failure = failure_of(run, code, said)
        records = read_records(run)
        validations = [r for r in records if r["event"] == "validate"]
        curve = [1 - r["frame_error"] for r in validations]
        best = max((k for k, r in enumerate(validations) if r["best"]), default=None)
        training = None if failure else 1 - frame_error(run, train)
        nothing = majority(validation) + NEAR
        exchange = run / "exchange.json"
        held = {
            "bench": "onebit_accuracy",
            "held_out": None if best is None else curve[best], "held_out_last": curve[-1] if curve else None,
            "training": training, "curve": [round(a, 5) for a in curve],
            "best_epoch": None if best is None else validations[best]["epoch"], "epochs": len(curve),
            "seconds": sum(r["seconds"] for r in records if r["event"] in ("train", "rest")),
            "cpu_s": cpu_s if sum(r["event"] == "start" for r in records) == 1 else None,
            "exchange": json.loads(exchange.read_text()).get("said") if exchange.exists() else None,
            "diverged": bool(failure) or curve[-1] < nothing, "failure": failure,
        }
        for heavy in ("checkpoints", "model.safetensors"):
            path = run / heavy
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return held

    def tune(self, row: Row, network: str) -> None:
        """Try rates in factors of 2 until the best of them is not at an edge."""
        start, cold, seed = row.rates[network], self.arguments.cold_start, self.tuning_seed
        if REFERENCE[row.table] != row.name and row.table == 2:
            start = best_rate(self.of(ROWS["baseline"], network, seed)) or start
        def value_of(rate: float) -> float | None:
            held = self.make(Setting(row, network, seed, rate, cold))
            return None if held["diverged"] else held["held_out"]

        search(start, [r["rate"] for r in self.of(row, network, seed)], value_of)


def said(record: dict[str, Any]) -> str:
    parts = [f"{name} {record[name]:.2%}" for name in ("held_out", "training") if record[name] is not None]
    parts += [f"best in epoch {record['best_epoch']:g}" if record["best_epoch"] else "", f"{record['seconds']:.0f} s"]
    return ", ".join(filter(None, parts)) + (f", DIVERGED {record['failure']}" if record["diverged"] else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "an4", help="prepared AN4: train, validation")
    parser.add_argument("--tables", type=numbers, default=[2, 3])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rows", default=",".join(ROWS), help="of those tables (default: all)")
    parser.add_argument("--seeds", type=numbers, default=[1, 2, 3, 4, 5], metavar="1,2,3")
    parser.add_argument("--tune", action="store_true", help="search the learning rates, with the tuning seed")
    parser.add_argument("--tuning-seed", type=int, default=1, help="whose runs say which rate is best, for all seeds")
    parser.add_argument("--rates", help="run at these rates, whatever is best")
    # 24 of the paper's 309 hours are 8% of a pass; 87 minibatches are 10% of one.
    parser.add_argument("--cold-start", type=int, default=87 * 256, help="frames before quantization (default 22,272)")
    parser.add_argument("--strategy", default="{}", help="more options for the rows that quantize, as JSON")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "onebit_accuracy", help="where runs are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "onebit_accuracy.jsonl")
    parser.add_argument("--summary", action="store_true", help="print the tables from --out; train nothing")
    parser.add_argument("--plot", type=Path, help="draw them (PNG); train nothing")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    networks = arguments.networks.split(",")
    row_names = [name for name in arguments.rows.split(",") if ROWS[name].table in arguments.tables]
    if arguments.plot:
        arguments.plot.write_bytes(draw(bench, row_names, networks))
    if arguments.summary:
        print(markdown(bench, row_names, networks))
    if arguments.summary or arguments.plot:
        return 0
    pairs = [(ROWS[name], n) for name in row_names for n in networks if n in ROWS[name].rates]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as crew:
        if arguments.tune:
            list(crew.map(lambda pair: bench.tune(*pair), pairs))
            return 0
        settings = [
            Setting(row, network, seed, rate, arguments.cold_start)
            for row, network in pairs for seed in arguments.seeds for rate in rates_of(bench, row, network)
        ]
        list(crew.map(bench.make, sorted(settings, key=lambda setting: arguments.seeds.index(setting.seed))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
