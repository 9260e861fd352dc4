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
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onebit.an4 import RECIPE, ROOT, rate_of_best, schedule, spread, toml

from hpc.bench_options import numbers
from hpc.records import read_records
from hpc.report_picture import LIGHT, dress, new_figure, png
from hpc.shards import read_manifest

NEAR = 0.1  # what ends within this of the majority class's accuracy has learned nothing
# Hidden layers and what the paper's tables say of them. SVD-LL (task.factored) is not among them yet.
NETWORKS = {"sigmoid": {"activation": "sigmoid", "init": "glorot"}, "relu": {"activation": "relu", "init": "he"}}
MOMENTUM: dict[str, Any] = {"name": "momentum", "momentum": 0.9}
BEFORE: dict[str, Any] = {"name": "adagrad", "momentum": 0.9, "placement": "before"}
AFTER = BEFORE | {"placement": "after"}


@dataclass(frozen=True)
class Row:
    """A row of a table, and what the paper has there.

    rates   where the search for the learning rate starts, by network; only networks named here have the row
    paper   word error rate and training-set frame accuracy (%), by network
    """

    table: int
    name: str
    text: str
    rates: dict[str, float]
    optim: dict[str, Any] = field(default_factory=lambda: MOMENTUM)
    onebit: dict[str, Any] | None = None  # options of strategy "onebit"; None: float32, "allreduce"
    paper: dict[str, str] = field(default_factory=dict)


BOTH, SIGMOID = {"sigmoid": 0.2, "relu": 0.025}, {"sigmoid": 0.005}
ROWS = {row.name: row for row in (
    Row(2, "baseline", "baseline, float32", BOTH, paper={"sigmoid": "16.5 (55.6)", "relu": "16.5 (62.8)"}),
    Row(2, "onebit", "1-bit", BOTH, onebit={}, paper={"sigmoid": "16.3 (55.5)", "relu": "16.6 (61.7)"}),
    Row(2, "onebit-db", "1-bit, double buffering", BOTH, onebit={"double_buffering": True},
        paper={"sigmoid": "16.5 (55.3)", "relu": "16.6 (62.4)"}),
    Row(2, "onebit-no-feedback", "1-bit without error feedback", BOTH, onebit={"error_feedback": False},
        paper={"sigmoid": "diverges", "relu": "diverges"}),
    Row(3, "smoothed", "AdaGrad on the momentum-smoothed gradient, float32", SIGMOID, AFTER,
        paper={"sigmoid": "16.5 (57.4)"}),
    Row(3, "raw", "AdaGrad on the raw gradient, float32", SIGMOID, BEFORE, paper={"sigmoid": "16.2 (58.2)"}),
    Row(3, "partial", "AdaGrad on partial gradients, 1-bit", SIGMOID, MOMENTUM, {"local_adagrad": True},
        paper={"sigmoid": "16.1 (57.4)"}),
    Row(3, "aggregate", "AdaGrad on the aggregate gradient, 1-bit", SIGMOID, BEFORE, {},
        paper={"sigmoid": "15.8 (59.1)"}),
    Row(3, "aggregate-db", "the same, double buffering", SIGMOID, BEFORE, {"double_buffering": True},
        paper={"sigmoid": "15.8 (59.4)"}),
)}
REFERENCE = {2: "baseline", 3: "raw"}  # what a table's other rows are compared with, seed by seed


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
        self.arguments, self.lock = arguments, threading.Lock()
        self.setup = {key: getattr(arguments, key) for key in ("layers", "width", "batch", "splits", "epochs")}
        self.setup["strategy"] = json.loads(arguments.strategy)  # of the rows that quantize
        lines = arguments.out.read_text(encoding="utf-8").splitlines() if arguments.out.exists() else []
        self.records = [r for r in map(json.loads, lines) if r["setup"] == self.setup]

    def found(self, setting: Setting) -> dict[str, Any] | None:
        wanted = setting.about()
        return next((r for r in self.records if all(r[key] == value for key, value in wanted.items())), None)

    def of(self, row: Row, network: str, seed: int | None = None) -> list[dict[str, Any]]:
        """A row's records, those of another cold start left out."""
        cold = self.arguments.cold_start if row.onebit is not None else None
        return [
            r for r in self.records
            if (r["row"], r["network"], r["cold_start"]) == (row.name, network, cold) and seed in (None, r["seed"])
        ]

    def make(self, setting: Setting) -> dict[str, Any]:
        """A run's record, of which it is trained if it has none."""
        held = self.found(setting)
        if held is None:
            print(setting.name, file=sys.stderr, flush=True)
            held = self.train(setting)
            with self.lock, open(self.arguments.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(held) + "\n")
                self.records.append(held)
            print(f"{setting.name}: {said(held)}", file=sys.stderr, flush=True)
        return held

    def train(self, setting: Setting) -> dict[str, Any]:
        run = self.arguments.work / "-".join([setting.name, *(f"{k[0]}{v}" for k, v in self.setup.items() if v)])
        (run / "failure.json").unlink(missing_ok=True)  # an earlier attempt's
        train, validation = (self.arguments.data / part for part in ("train", "validation"))
        words = ["train", RECIPE, f"run={run}", f"data.train={train}", f"data.validation={validation}"]
        code, cpu_s, said = trireme(*words, *setting.overrides(self.setup))
        failure = ""
        if code:
            cause = run / "failure.json"
            failure = json.loads(cause.read_text())["error"] if cause.exists() else ""
            if not failure.startswith("TrainingFailed"):
                raise RuntimeError(f"{setting.name} ended with {code}:\n{said}")
        records = read_records(run)
        validations = [r for r in records if r["event"] == "validate"]
        curve = [1 - r["frame_error"] for r in validations]
        best = max((k for k, r in enumerate(validations) if r["best"]), default=None)
        training = None
        if not failure:
            code, _, said = trireme("evaluate", run, train, "--device", "cpu", "--json")
            if code:
                raise RuntimeError(f"{setting.name} could not be evaluated:\n{said}")
            training = 1 - json.loads(said.splitlines()[-1])["frame_error"]
        nothing = majority(validation) + NEAR
        exchange = run / "exchange.json"
        held = {
            "bench": "onebit_accuracy", **setting.about(), "setup": self.setup,
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

    def tune(self, row: Row, network: str, seed: int) -> None:
        """Try rates in factors of 2 until the best of them is not at an edge."""
        start, cold = row.rates[network], self.arguments.cold_start
        if REFERENCE[row.table] != row.name and row.table == 2:
            start = best_rate(self.of(ROWS["baseline"], network, seed)) or start
        held = {r["rate"]: r for r in self.of(row, network, seed)}
        for rate in (start, start / 2, start * 2):
            held[rate] = self.make(Setting(row, network, seed, rate, cold))
        while (best := best_rate(held.values())) in (None, min(held), max(held)):
            rate = min(held) / 2 if best is None or best == min(held) else max(held) * 2
            if not start / 100 < rate < start * 100:
                break
            held[rate] = self.make(Setting(row, network, seed, rate, cold))


def best_rate(records: Iterable[dict[str, Any]]) -> float | None:
    """The rate of the best held-out accuracy, among runs that did not diverge."""
    return rate_of_best((r["rate"], r["held_out"]) for r in records if not r["diverged"])


def trireme(*words: object) -> tuple[int, float, str]:
    """Run a command: its exit code, its seconds of processor time, and what it printed."""
    command = [sys.executable, "-m", "mpi4py", "-m", "hpc", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_utime + used.ru_stime, said


def majority(data: Path) -> float:
    """The accuracy of always naming the most frequent class."""
    counts = read_manifest(data)["fields"]["labels"]["counts"]
    return max(counts) / sum(counts)


def said(record: dict[str, Any]) -> str:
    parts = [f"{name} {record[name]:.2%}" for name in ("held_out", "training") if record[name] is not None]
    parts += [f"best in epoch {record['best_epoch']:g}" if record["best_epoch"] else "", f"{record['seconds']:.0f} s"]
    return ", ".join(filter(None, parts)) + (f", DIVERGED {record['failure']}" if record["diverged"] else "")


# -- what came of it ------------------------------------------------------------------------------------------------


def chosen(bench: Bench, row: Row, network: str) -> list[dict[str, Any]]:
    """A row's records at its rate, by seed; if all of the tuning seed's diverged, those of the smallest rate."""
    if bench.arguments.rates:
        rates = [float(rate) for rate in bench.arguments.rates.split(",")]
    else:
        tuned = bench.of(row, network, bench.arguments.tuning_seed)
        rate = best_rate(tuned)
        rates = [rate if rate is not None else min((r["rate"] for r in tuned), default=row.rates[network])]
    return sorted((r for r in bench.of(row, network) if r["rate"] == rates[0]), key=lambda r: r["seed"])


def listed(records: list[dict[str, Any]], name: str) -> str:
    """Every seed's number, in percent; a run that diverged is marked."""
    return ", ".join(
        ("–" if r[name] is None else f"{100 * r[name]:.2f}") + ("†" if r["diverged"] else "") for r in records
    )


def cpu_seconds(records: list[dict[str, Any]]) -> str:
    known = [r["cpu_s"] for r in records if r["cpu_s"] is not None]
    return f"{statistics.median(known):.0f}" if known else "–"


def gaps(bench: Bench, row: Row, network: str, name: str) -> list[float]:
    """What a row has more than its table's reference, seed by seed, where both have a number."""
    reference = {r["seed"]: r[name] for r in chosen(bench, ROWS[REFERENCE[row.table]], network) if r[name] is not None}
    return [r[name] - reference[r["seed"]] for r in chosen(bench, row, network) if r["seed"] in reference and r[name]]


def panels(row_names: list[str], networks: list[str]) -> list[tuple[int, str, list[Row]]]:
    """(table, network, its rows): what is shown together."""
    found: dict[tuple[int, str], list[Row]] = {}
    for network in networks:
        for row in map(ROWS.__getitem__, row_names):
            if network in row.rates:
                found.setdefault((row.table, network), []).append(row)
    return [(table, network, found[table, network]) for table, network in sorted(found, key=lambda key: key[0])]


def markdown(bench: Bench, row_names: list[str], networks: list[str]) -> str:
    """Both tables, and the rates that were tried."""
    out = []
    for table, network, rows in panels(row_names, networks):
        if not any(bench.of(row, network) for row in rows):
            continue
        reference = ROWS[REFERENCE[table]].text
        out += [
            f"**Table {table}, {network}.** Frame accuracy (%), mean ± sample deviation; gaps to \"{reference}\", seed "
            "by seed. Paper: Hub-5'00 WER (training-set frame accuracy). † diverged.", "",
            "| | rate | held out | gap | last epoch | training set | gap | held out, every seed "
            "| training set, every seed | CPU s | paper |", "|---" * 11 + "|",
        ]
        for row in rows:
            runs = chosen(bench, row, network)
            if not runs:
                out.append(f"| {row.text} |" + " – |" * 9 + f" {row.paper.get(network, '–')} |")
                continue
            good = [r for r in runs if r["held_out"] is not None]
            gap = {
                name: spread(gaps(bench, row, network, name), "+") if row.name != REFERENCE[table] else ""
                for name in ("held_out", "training")
            }
            out.append(
                f"| {row.text} | {runs[0]['rate']:g} | {spread([r['held_out'] for r in good])} | {gap['held_out']} | "
                f"{spread([r['held_out_last'] for r in good])} | "
                f"{spread([r['training'] for r in good if r['training'] is not None])} | {gap['training']} | "
                f"{listed(runs, 'held_out')} | {listed(runs, 'training')} | "
                f"{cpu_seconds(runs)} | {row.paper.get(network, '–')} |"
            )
        seed = bench.arguments.tuning_seed
        out += ["", f"Rates tried, with seed {seed}'s held-out accuracy (%):", "", "| | rates |", "|---|---|"]
        for row in rows:
            tried = sorted(bench.of(row, network, seed), key=lambda r: r["rate"])
            said = ", ".join(f"{r['rate']:g}: {listed([r], 'held_out')}" for r in tried)
            out.append(f"| {row.text} | {said or '–'} |")
        out.append("")
    return "\n".join(out)


def draw(bench: Bench, row_names: list[str], networks: list[str]) -> bytes:
    """Every seed a dot, mean and deviation of every row; held out above, the training set below."""
    shown = panels(row_names, networks)
    figure = new_figure(7.5, LIGHT)
    grid = figure.subplots(2, len(shown), squeeze=False)
    for column, (table, network, rows) in enumerate(shown):
        for line, (name, text) in enumerate((("held_out", "held-out"), ("training", "training-set"))):
            axes = grid[line][column]
            dress(axes, LIGHT, f"Table {table}, {network}", f"{text} frame accuracy (%)")
            for place, row in enumerate(rows):
                colour = LIGHT.series[0 if row.onebit is None else 1]
                runs = chosen(bench, row, network)
                values = [100 * r[name] for r in runs if r[name] is not None]
                if not values:
                    axes.text(
                        0.5, place, "diverged" if runs else "not run yet", transform=axes.get_yaxis_transform(),
                        color=LIGHT.muted, ha="center", va="center", fontsize=9,
                    )
                    continue
                axes.scatter(values, [place + 0.15] * len(values), s=22, color=colour, alpha=0.6, linewidths=0)
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                mean = statistics.fmean(values)
                axes.errorbar(mean, place - 0.15, xerr=deviation, fmt="D", markersize=5, capsize=3, color=colour)
            axes.set_yticks(range(len(rows)), [wrapped(row.text) for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
    for marker, colour, text in (
        ("o", LIGHT.muted, "a seed"), ("D", LIGHT.muted, "mean and deviation"), ("s", LIGHT.series[0], "float32"),
        ("s", LIGHT.series[1], "1-bit"),
    ):
        grid[0][0].plot([], [], marker, color=colour, label=text)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9.5, labelcolor=LIGHT.ink)
    return png(figure, LIGHT)


def wrapped(text: str) -> str:
    """A label in lines of about 20 characters."""
    lines = [""]
    for word in text.split():
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < 22 else [lines[-1], word]
    return "\n".join(lines)


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
            list(crew.map(lambda pair: bench.tune(*pair, arguments.tuning_seed), pairs))
            return 0
        settings = []
        for row, network in pairs:
            rates = [float(rate) for rate in (arguments.rates or "").split(",") if rate]
            if not rates:
                tuned = bench.of(row, network, arguments.tuning_seed)
                best = best_rate(tuned)
                rates = [min((r["rate"] for r in tuned), default=row.rates[network]) if best is None else best]
            cold = arguments.cold_start
            settings += [Setting(row, network, seed, rate, cold) for seed in arguments.seeds for rate in rates]
        list(crew.map(bench.make, sorted(settings, key=lambda setting: arguments.seeds.index(setting.seed))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
