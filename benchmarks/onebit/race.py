"""Accuracy over frames and over time: runs on AN4 on two pretend hosts, from the same weights on the same batches."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from onebit.sides import RANKS, RESTARTS, SIDES, Lines, burst_kib
from onebit.tables import best, best_rate
from runs import RECIPE, ROOT, schedule, search, toml

from hpc.bench import say
from hpc.bench_crew import outside_a_job
from hpc.hosts import Hosts
from hpc.records import read_records

ATTEMPT_S = 3600.0


@dataclass(frozen=True)
class Run:
    """One run on AN4; link "none": without a throttle."""

    side: str
    rate: float
    seed: int
    link: str

    @property
    def name(self) -> str:
        return f"{self.side}-{self.rate:g}-seed{self.seed}-{self.link}"


class Race:
    """The finished runs, and how to make others."""

    def __init__(self, arguments: argparse.Namespace, lines: Lines):
        self.arguments, self.lines = arguments, lines
        self.setup = race_setup(arguments)

    def of(self, side: str, seed: int | None = None) -> list[dict[str, Any]]:
        chosen = self.lines.of("accuracy", side=side, setup=self.setup)
        return [r for r in chosen if seed in (None, r["seed"])]

    def make(self, run: Run) -> dict[str, Any]:
        """A run's record, of which it is trained if it has none."""
        held = self.lines.of("accuracy", **vars(run), setup=self.setup)
        if held:
            return held[0]
        say(run.name)
        record = {"what": "accuracy", **vars(run), "setup": self.setup, **self.train(run)}
        self.lines.add([record])
        last = record["curve"][-1] if record["curve"] else {"accuracy": 0.0, "seconds": 0.0}
        say(f"{run.name}: {last['accuracy']:.2%} after {last['seconds']:.0f} s {record['failure']}")
        return record

    def tune(self, side: str) -> None:
        """Try rates in factors of 2 until the best of them is not at an edge."""
        if SIDES[side].like:
            return
        seed = self.arguments.seeds[0]

        def value_of(rate: float) -> float | None:
            held = self.make(Run(side, rate, seed, "none"))
            return None if held["failure"] or not held["curve"] else best(held)

        search(SIDES[side].start, [r["rate"] for r in self.of(side, seed) if r["link"] == "none"], value_of)

    def race(self, side: str, seed: int) -> None:
        """At the side's best rate, on the link."""
        rate = best_rate(self.of(SIDES[side].like or side, self.arguments.seeds[0]))
        if rate is None:
            sys.exit(f"no learning rate was found for {side} yet: run 'tune' first, with the same options")
        self.make(Run(side, rate, seed, self.arguments.link))

    def train(self, run: Run) -> dict[str, Any]:
        """The curve, bytes and seconds of a run on fresh hosts; started again if its processes fall over."""
        for attempt in count(1):
            folder = self.arguments.work / run.name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with Hosts(RANKS, None if run.link == "none" else run.link, burst=burst_kib(run.link)) as hosts:
                start = self._ddp if SIDES[run.side].strategy is None else self._trireme
                code, said, read = start(run, folder, hosts)
                sent = host_sent(hosts)
            found = read()
            if found is not None:
                steps = max(found["steps"], 1)
                return found | {"link_bytes": sent / steps, "attempts": attempt}
            if attempt > RESTARTS:
                raise RuntimeError(f"{run.name} ended with {code}:\n{said}")
            say(f"{run.name} is started again: it ended with {code}: {said.splitlines()[-1:]}")
        raise AssertionError

    def overrides(self, run: Run, folder: Path) -> list[str]:
        """The recipe's keys."""
        setup, data = self.setup, self.arguments.data
        strategy = dict(SIDES[run.side].strategy or {"name": "allreduce"})
        if strategy["name"] == "onebit":
            strategy["cold_start"] = float(setup["cold"] * setup["batch"])
        tables = {
            "strategy": strategy, "optim": {"name": "momentum", "learning_rate": run.rate, "momentum": 0.9},
            "schedule": schedule(run.rate, setup["epochs"]),
        }
        return [
            f"run={folder / 'run'}", f"seed={run.seed}", f"splits={RANKS}", "threads=1", "device=cpu",
            f"data.train={data / 'train'}", f"data.validation={data / 'validation'}", f"data.batch={setup['batch']}",
            f"task.layers={setup['layers']}", f"task.width={setup['width']}", "log.tensorboard=false", "log.trace=0",
            f"validate.every={setup['every'] * setup['batch']}", "checkpoint.keep=1",
            *(f"{name}={toml(table)}" for name, table in tables.items()),
        ]

    def _trireme(self, run: Run, folder: Path, hosts: Hosts) -> tuple[int, str, Any]:
        words = [sys.executable, "-m", "mpi4py", "-m", "hpc", "train", str(RECIPE), *self.overrides(run, folder)]
        code, said = launch(hosts, words)

        def read() -> dict[str, Any] | None:
            cause = folder / "run" / "failure.json"
            failure = json.loads(cause.read_text())["error"] if cause.exists() else ""
            if code and not failure.startswith("TrainingFailed"):
                return None
            found = curve_of(folder / "run") | {"failure": failure}
            for heavy in (folder / "run" / "checkpoints", folder / "run" / "staged"):
                shutil.rmtree(heavy, ignore_errors=True)
            return found

        return code, said, read

    def _ddp(self, run: Run, folder: Path, hosts: Hosts) -> tuple[int, str, Any]:
        out = folder / "result.json"
        spec = {
            "recipe": str(RECIPE), "overrides": self.overrides(run, folder), "ranks": RANKS, "out": str(out),
            "store": str(folder / "store"), "interface": "eth0", "powersgd": SIDES[run.side].powersgd,
            "period": SIDES[run.side].period,
            "starts": max(self.setup["cold"], 2),
        }
        words = [sys.executable, "-m", "mpi4py", str(Path(__file__).with_name("ddp.py")), json.dumps(spec)]
        code, said = launch(hosts, words)
        return code, said, lambda: json.loads(out.read_text()) if out.exists() else None


def race_setup(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all runs on AN4 have in common."""
    keys = ("epochs", "batch", "cold", "every")
    return {key: getattr(arguments, key) for key in keys} | {
        "layers": arguments.an4_layers, "width": arguments.an4_width, "ranks": RANKS,
    }


def curve_of(run: Path) -> dict[str, Any]:
    """Held-out accuracy over frames and over seconds of training, from a run's log."""
    records = read_records(run)
    began, apart, curve = records[0]["time"], 0.0, []
    for record in records:
        if record["event"] == "validate":
            seconds = record["time"] - began - apart - record["seconds"]
            apart += record["seconds"]
            curve.append({
                "frames": record["frames"], "seconds": seconds, "loss": record["loss"],
                "accuracy": 1.0 - record["frame_error"],
            })
    frames = max((record.get("frames", 0) for record in records), default=0)
    return {"curve": curve, "steps": math.ceil(frames / records[0]["batch"])}


def launch(hosts: Hosts, words: list[str]) -> tuple[int, str]:
    """Run a rank on every host: the exit code, and what was said."""
    command, variables = hosts.mpiexec([1] * RANKS, words)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=outside_a_job() | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=ATTEMPT_S,
        )
    except subprocess.TimeoutExpired as error:
        return 124, f"{error.stdout!r}\nit did not end in {ATTEMPT_S:.0f} s"
    return done.returncode, done.stdout


def host_sent(hosts: Hosts) -> float:
    """Bytes that left a host so far, the mean over hosts."""
    look = [sys.executable, "-c", "from hpc.hosts import crossed; print(crossed()[0])"]
    told = [
        subprocess.run(hosts.command(k, look), env=outside_a_job(), capture_output=True, text=True, check=True).stdout
        for k in range(RANKS)
    ]
    return statistics.fmean(map(int, told))
