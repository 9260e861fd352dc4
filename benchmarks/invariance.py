"""The law, shown: one recipe run with several numbers of ranks, and once killed and resumed, gives the same bytes.

    python benchmarks/invariance.py                         a small recipe on data made here
    python benchmarks/invariance.py --splits 12 --ranks 1,2,3,4,6
    python benchmarks/invariance.py --recipe jobs/recipes/an4_frames.toml schedule.epochs=2
    python benchmarks/invariance.py --hosts 1+1,2+2,2+1+1    over pretend hosts too, so many ranks on each (as root)

Prints one JSON line a strategy: {"strategy", "hashes": {"1": ..., "2": ..., "resumed": ...}, "killed", "equal": true};
exits with 1 if any differ that must not. "resumed": started with the most ranks, all of them killed with SIGKILL at a
random moment, and finished with the fewest ("killed": false would say that it was too quick to be killed). The ring
does not promise the same bytes ("promised": false): it is shown, not judged.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from material import RECIPE, write_recipe  # noqa: E402

from hpc.bench_crew import outside_a_job  # noqa: E402
from hpc.files import sha256_of  # noqa: E402
from hpc.hosts import Hosts  # noqa: E402
from jobs.demo import ranks_command  # noqa: E402

STRATEGIES = {
    "allreduce": 'strategy={name="allreduce"}',
    "allreduce, clipped": 'strategy={name="allreduce", clip_norm=0.5}',
    "allreduce, owners in small buckets": 'strategy={name="allreduce", algorithm="owners", bucket_mib=0.004}',
    "allreduce, everyone": 'strategy={name="allreduce", algorithm="everyone"}',
    "allreduce, after backward": 'strategy={name="allreduce", overlap="off", bucket_mib=0.004}',
    "allreduce, bfloat16 on the wire": 'strategy={name="allreduce", wire="bfloat16"}',
    "allreduce, float16 on the wire": 'strategy={name="allreduce", wire="float16"}',
    "allreduce, ring": 'strategy={name="allreduce", algorithm="ring"}',
    "1-bit": 'strategy={name="onebit"}',
    "1-bit, double buffering after a cold start": 'strategy={name="onebit", double_buffering=true, cold_start=1000}',
    "1-bit, local AdaGrad, clipped": 'strategy={name="onebit", local_adagrad=true, clip_norm=1.0}',
    "BMUF": 'strategy={name="bmuf", block_steps=5}',
    "BMUF, stopped amid blocks": 'strategy={name="bmuf", block_steps=7, turn_steps=2, local_state="kept"}',
    "elastic": 'strategy={name="elastic", block_steps=7, turn_steps=2}',
    "master and slaves": 'strategy={name="master_slave", block_steps=5, tolerance=1.01}',
}
NOT_PROMISED = ("allreduce, ring",)


def command(recipe: Path, run: Path, ranks: int, overrides: list[str]) -> list[str]:
    return [*ranks_command(ranks), "train", str(recipe), f"run={run}", *overrides]


def finish(words: list[str], run: Path, environment: dict[str, str] | None = None) -> str:
    """Run a training to its end; the SHA-256 of its model."""
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr}")
    return sha256_of(run / "model.safetensors")


def on_hosts(layout: str, recipe: Path, run: Path, overrides: list[str]) -> str:
    """The SHA-256 of a model trained on pretend hosts, e.g. "2+1+1": two ranks on the first, one on each other."""
    ranks = [int(word) for word in layout.split("+")]
    with Hosts(len(ranks)) as hosts:
        words = [sys.executable, "-m", "mpi4py", "-m", "hpc", "train", str(recipe), f"run={run}", *overrides]
        started, variables = hosts.mpiexec(ranks, words)
        return finish(started, run, outside_a_job() | variables)


def kill_midway(words: list[str], run: Path, seconds: float) -> bool:
    """Start a training, SIGKILL all its processes some time after its first checkpoint; whether it was running."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(run.glob("checkpoints/step-*")):
        time.sleep(0.01)
    time.sleep(random.uniform(0, seconds))
    running = process.poll() is None
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        pid, _, arguments = line.strip().partition(" ")
        if f"run={run}" in arguments and int(pid) != os.getpid():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
    process.wait()
    return running


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks, e.g. 1,2,4")
    parser.add_argument("--splits", type=int, default=4, help="of the small recipe")
    parser.add_argument("--hosts", default="", help="ranks on pretend hosts, e.g. 1+1,2+1+1")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    ranks = [int(k) for k in arguments.ranks.split(",")]
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe, splits = arguments.recipe, ["checkpoint.every=500"]
        if recipe is None:
            recipe, splits = write_recipe(folder, splits=arguments.splits, text=RECIPE), ["schedule.epochs=30"]
        for strategy, chosen in STRATEGIES.items():
            overrides = [*splits, chosen, *arguments.overrides]
            hashes, seconds = {}, 1.0
            for k in ranks:
                run = folder / f"{strategy}-{k}"
                began = time.monotonic()
                hashes[str(k)] = finish(command(recipe, run, k, overrides), run)
                seconds = time.monotonic() - began
            for layout in filter(None, arguments.hosts.split(",")):
                hashes[layout] = on_hosts(layout, recipe, folder / f"{strategy}-{layout}", overrides)
            run = folder / f"{strategy}-resumed"
            killed = kill_midway(command(recipe, run, max(ranks), overrides), run, seconds / 4)
            hashes["resumed"] = finish(command(recipe, run, min(ranks), overrides), run)
            equal, promised = len(set(hashes.values())) == 1, strategy not in NOT_PROMISED
            failed |= promised and not equal
            short = {k: digest[:16] for k, digest in hashes.items()}
            told = {"strategy": strategy, "hashes": short, "killed": killed, "equal": equal}
            print(json.dumps(told if promised else told | {"promised": False}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
