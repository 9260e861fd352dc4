"""What benchmarks that train many runs have in common: the recipe and its changes, the schedule of the rate, how rates
are chosen, finished runs kept, and numbers told."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.shards import read_manifest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "jobs" / "recipes" / "an4_frames.toml"
STEPS = {0.625: 0.25, 0.875: 0.0625}  # after this part of the epochs, the learning rate times that


def schedule(rate: float, epochs: int) -> dict[str, Any]:
    """A recipe's table: the same two steps for all runs, whatever their rate."""
    at, rates = [part * epochs for part in STEPS], [rate * factor for factor in STEPS.values()]
    return {"name": "steps", "epochs": epochs, "at": at, "rates": rates}


def toml(value: Any) -> str:
    """A value as TOML: JSON's is the same but for tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}={toml(held)}" for key, held in value.items()) + "}"
    return json.dumps(value)


def rate_of_best(found: Iterable[tuple[float, float]]) -> float | None:
    """Of pairs (learning rate, held-out accuracy) the rate of the best; None if there are none."""
    return max(found, key=lambda pair: pair[1], default=(None, 0.0))[0]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample deviation of fractions, in percent."""
    if not values:
        return "–"
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):{sign}.2f}{deviation}"


Record = dict[str, Any]  # a finished run's line


class Kept:
    """Finished runs, a JSON line each: a run that has its line is not made again.

    out    the file
    setup  what all runs that are looked at have in common ("setup" of their lines)
    said   of a record, for people; "" by default
    """

    def __init__(self, out: Path, setup: Mapping[str, Any], said: Callable[[Record], str] = lambda record: ""):
        self.out, self.setup, self.said, self.lock = out, dict(setup), said, threading.Lock()
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        self.records: list[Record] = [r for r in map(json.loads, lines) if r["setup"] == self.setup]

    def of(self, **wanted: Any) -> list[Record]:
        """The records that have these values."""
        return [r for r in self.records if all(r[key] == value for key, value in wanted.items())]

    def make(self, about: Record, train: Callable[[], Record]) -> Record:
        """The record of a run, which is trained if there is none."""
        held = self.of(**about)
        if held:
            return held[0]
        name = ", ".join(f"{key} {value}" for key, value in about.items() if value is not None)
        print(name, file=sys.stderr, flush=True)
        made = about | {"setup": self.setup} | train()
        with self.lock, open(self.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(made) + "\n")
            self.records.append(made)
        print(f"{name}: {self.said(made)}", file=sys.stderr, flush=True)
        return made


def search(start: float, tried: Iterable[float], value_of: Callable[[float], float | None]) -> float | None:
    """The learning rate with the largest value (None: the run failed), found in factors of 2 from `start` on, until the
    best is at neither edge, within a factor of 100."""
    found = {rate: value_of(rate) for rate in (*tried, start, start / 2, start * 2)}
    while True:
        best = rate_of_best((rate, value) for rate, value in found.items() if value is not None)
        if best not in (None, min(found), max(found)):
            return best
        rate = min(found) / 2 if best is None or best == min(found) else max(found) * 2
        if not start / 100 < rate < start * 100:
            return best
        found[rate] = value_of(rate)


def failure_of(run: Path, code: int, said: str) -> str:
    """Why a training that ended with `code`, in this folder, gave up; "" if it did not.

    Raises RuntimeError, with what was `said`, for any other end.
    """
    if not code:
        return ""
    cause = run / "failure.json"
    failure: str = json.loads(cause.read_text())["error"] if cause.exists() else ""
    if not failure.startswith("TrainingFailed"):
        raise RuntimeError(f"{run.name} ended with {code}:\n{said}")
    return failure


def frame_error(run: Path, data: Path) -> float:
    """Of a finished run's model on a data set. Raises RuntimeError."""
    code, _, said = trireme("evaluate", run, data, "--device", "cpu", "--json")
    if code:
        raise RuntimeError(f"{run} could not be evaluated:\n{said}")
    return float(json.loads(said.splitlines()[-1])["frame_error"])


def majority(data: Path) -> float:
    """The accuracy of always naming the most frequent class."""
    counts = read_manifest(data)["fields"]["labels"]["counts"]
    return max(counts) / sum(counts)


def trireme(*words: object, program: Sequence[str] = ("-m", "hpc")) -> tuple[int, float, str]:
    """Run a command: its exit code, its seconds of processor time, and what it printed."""
    command = [sys.executable, "-m", "mpi4py", *program, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_utime + used.ru_stime, said
