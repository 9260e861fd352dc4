"""What checkpoints cost: how long training waits for them, how fast a job goes on from one.

    python benchmarks/checkpoints.py                        45 M parameters, a checkpoint a minute, 6 minutes
    python benchmarks/checkpoints.py --minutes 12 --ranks 2 --out FILE

The network is the 1-bit paper's, 7 x 2048 and 9,304 classes, trained with momentum on generated frames. Prints JSON
lines: "waits": the share of training in which it waited for checkpoints (the phase "checkpoint" of the slowest rank),
how long writing one took beside training, and frames a second while one was being written beside those while none was.
"resumes": seconds from the start of the process to the first step that a job going on from such a checkpoint has done,
and of that what Python and its libraries take to start, medians of some rounds.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import tomli_w  # noqa: E402

from hpc.bench import make_data, recipe_for, scratch, show  # noqa: E402
from hpc.bench_crew import mpiexec, outside_a_job  # noqa: E402
from hpc.records import read_attempts  # noqa: E402

NETWORK = {"layers": 7, "width": 2048, "context": 5}
CLASSES, BATCH = 9304, 256
ROUNDS = 5  # of resuming


def command(ranks: int, recipe: Path) -> list[str]:
    python = [sys.executable, "-m", "mpi4py", "-m", "hpc", "train", str(recipe)]
    return [mpiexec(), "-n", str(ranks), *python]


def start(ranks: int, recipe: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(ranks, recipe), env=outside_a_job() | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )


def records(run: Path) -> list[dict[str, Any]]:
    return read_attempts(run)[-1] if (run / "metrics.jsonl").exists() else []


def end(process: subprocess.Popen[str], number: int) -> None:
    os.killpg(process.pid, number)
    process.communicate()


def waits(ranks: int, minutes: float, recipe: Path, run: Path, every: int) -> dict[str, Any]:
    """Train for so long; what the log says of checkpoints."""
    process = start(ranks, recipe)
    time.sleep(60 * minutes)
    end(process, signal.SIGTERM)
    log = records(run)
    trained = [r for r in log if r["event"] == "train"][1:]  # the first has what only a start has
    written = [r for r in log if r["event"] == "checkpoint"]
    spans = [(r["time"] - r["seconds"], r["time"]) for r in written]
    speeds: dict[bool, list[float]] = {True: [], False: []}
    for record in trained:
        low, high = record["time"] - record["seconds"], record["time"]
        speeds[any(low < e and b < high for b, e in spans)].append(record["frames_per_s"])
    seconds = sum(r["seconds"] for r in trained)
    waited = sum(max(part["checkpoint"] for part in r["by_rank"]) for r in trained)
    return {
        "what": "waits", "ranks": ranks, "parameters": log[0]["parameters"], "checkpoints": len(written),
        "bytes": written[-1]["bytes"], "seconds_between": round(seconds / max(1, len(written)), 1),
        "waited_share": waited / seconds, "waited_s_each": waited / max(1, len(written)),
        "writing_s": statistics.median(r["seconds"] for r in written),
        "frames_per_s": statistics.median(speeds[False]),
        "frames_per_s_while_writing": statistics.median(speeds[True]) if speeds[True] else None, "every": every,
    }


def resumes(ranks: int, recipe: Path, run: Path) -> dict[str, Any]:
    """Killed and started again, some times."""
    whole, python = [], []
    for _ in range(ROUNDS):
        began, attempts = time.time(), len(read_attempts(run))
        words = [sys.executable, "-m", "mpi4py", "-c", "import hpc.training, hpc.build"]
        subprocess.run([mpiexec(), "-n", str(ranks), *words], env=outside_a_job(), cwd=ROOT, check=True)
        python.append(time.time() - began)
        began = time.time()
        process = start(ranks, recipe)
        while len(read_attempts(run)) == attempts or not any(r["event"] == "train" for r in records(run)):
            time.sleep(0.02)
        first = next(r for r in records(run) if r["event"] == "train")
        whole.append(first["time"] - began)
        end(process, signal.SIGKILL)
        time.sleep(3)
    return {
        "what": "resumes", "ranks": ranks, "to_first_step_s": statistics.median(whole),
        "python_s": statistics.median(python), "beyond_python_s": statistics.median(
            one - other for one, other in zip(whole, python, strict=True)
        ), "rounds": ROUNDS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--frames-per-s", type=float, default=700.0, help="about what this machine does")
    parser.add_argument("--out", type=Path, help="append the lines here, too")
    arguments = parser.parse_args()
    with scratch() as folder:
        make_data(folder / "data", 400_000, classes=CLASSES)
        run, recipe, every = folder / "run", folder / "recipe.toml", int(60 * arguments.frames_per_s)
        tables = {
            "task": NETWORK, "data": {"batch": BATCH}, "splits": arguments.ranks, "checkpoint": {"every": every},
            "optim": {"name": "momentum", "learning_rate": 0.001}, "schedule": {"name": "constant", "epochs": 1000},
            "log": {"every": 1, "tensorboard": False, "trace": 0},
        }
        recipe.write_text(tomli_w.dumps(recipe_for(folder / "data", run, **tables)))
        waited = waits(arguments.ranks, arguments.minutes, recipe, run, every)
        for found in (waited, resumes(arguments.ranks, recipe, run)):
            show(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
