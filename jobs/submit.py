"""`trireme submit`: a job, or an array of them, on Slurm, on this workstation, or in this process. The only submitit.

On Slurm submitit writes and sends the script; what it does before and after its ranks is what `trireme sbatch` writes,
so a job goes on by itself, and submitit's own hook for preemption (on rank 0 alone, in a signal handler) is not needed.
On a workstation the job is what `trireme launch` does. What submitit pickles lies in a folder that only its user opens.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
import torch

from hpc.build import registry
from hpc.config import Recipe, RecipeError, load
from hpc.files import write_json
from hpc.records import SUBMITTED
from hpc.shards import read_manifest
from jobs.launch import keep_going_here
from jobs.listing import PRIVATE
from jobs.sbatch import AFTER, BEFORE, Resources, add_resources, minutes, resources_of, srun_options

EXAMPLES = """examples:
  trireme submit my.toml --nodes 4 --ranks-per-node 8 --time 12:00:00 --partition gpu --gpus-per-node 8
  trireme submit my.toml --ranks-per-node 8 --grid optim.learning_rate=0.1,0.2 --grid strategy.block_steps=8,16
  trireme submit my.toml --place local --ranks-per-node 2        on this machine, in the background
  trireme submit my.toml --place debug                           here and now

Then: trireme jobs; trireme logs RUN. A grid makes a job array; its runs are RUN.grid/learning_rate=0.1 and so on; its
values are without commas. To stop a job for good: scancel JOB; sent again, it goes on. The recipe, the code and the
.venv are used as they are whenever it starts, so leave them alone meanwhile.
"""
FOREVER = 60 * 24 * 365  # minutes: submitit wants a limit, a workstation has none


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("recipe", help="a recipe file (TOML)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe keys to set")
    parser.add_argument(
        "--place", choices=["slurm", "local", "debug"], help="default: slurm where there is one, else local"
    )
    parser.add_argument(
        "--grid", action="append", default=[], metavar="key=value,value", help="a job for every value; may be repeated"
    )
    add_resources(parser)


def run(arguments: argparse.Namespace) -> int:
    place = arguments.place or ("slurm" if shutil.which("sbatch") else "local")
    jobs = [_checked(arguments, overrides) for overrides in grid(arguments.recipe, arguments.overrides, arguments.grid)]
    asked = resources_of(arguments, jobs[0][1])
    if len({recipe.threads for _, recipe in jobs}) > 1:
        raise RecipeError("--grid: the jobs of an array have the same 'threads', for Slurm gives them the same cores")
    runs = [Path(recipe.run) for _, recipe in jobs]
    if len(set(runs)) < len(runs):
        raise RecipeError(f"--grid {' '.join(arguments.grid)}: a value is there twice, and would share a run folder")
    for folder in runs:
        (folder / "logs").mkdir(parents=True, exist_ok=True)  # Slurm makes no folders
    executor = submitit.AutoExecutor(folder=private_folder(runs[0].parent), cluster=place)
    executor.update_parameters(**parameters(asked, runs, place))
    work = [Work(place, ["train", arguments.recipe, *words], asked.ranks, asked.restarts) for words, _ in jobs]
    sent = executor.map_array(Work.do, work) if len(work) > 1 else [executor.submit(work[0].do)]
    for job, folder in zip(sent, runs, strict=True):
        write_json(folder / SUBMITTED, {
            "place": place, "job": str(job.job_id), "time": time.time(), "command": shlex.join(sys.argv),
            "log": str(job.paths.stdout),
        })
        print(f"{folder}: {place} job {job.job_id}, log {job.paths.stdout}")
    return 0 if place != "debug" else max(job.result() for job in sent)


def grid(recipe: str, overrides: Sequence[str], axes: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a grid, each with a run folder of its own. Raises RecipeError."""
    if not axes:
        return [list(overrides)]
    choices = []
    for axis in axes:
        key, sign, values = axis.partition("=")
        if key == "run":
            raise RecipeError(f"--grid {axis}: every job has a run folder of its own already, below RUN.grid")
        if not sign or not key or not all(values.split(",")):
            raise RecipeError(f"--grid {axis}: expected key=value,value, e.g. optim.learning_rate=0.1,0.2")
        if any(sign in values for sign in "{}[]"):
            raise RecipeError(f"--grid {axis}: values are separated by commas, so none can be a list or a table")
        choices.append([f"{key}={value}" for value in values.split(",")])
    base = load(recipe, overrides, registry()).run
    found = []
    for point in itertools.product(*choices):
        name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in (p.partition("=") for p in point))
        found.append([*overrides, *point, f"run={base}.grid/{name}"])
    return found


@dataclass(frozen=True)
class Work:
    """What a job does, where submitit starts it: on Slurm in every rank, elsewhere once.

    words  of the `trireme` command that ranks run
    """

    place: str
    words: list[str]
    ranks: int
    restarts: int

    def do(self) -> int:
        """The job's exit code. Raises RuntimeError if it failed in the background: then submitit says so, too."""
        if self.place == "slurm":
            from hpc.__main__ import main

            code = main(self.words)
            if code:
                sys.stdout.flush()
                os._exit(code)  # as it is: the script looks into the run folder
            return 0
        outcome = keep_going_here(self.words, self.ranks, self.restarts)
        if outcome.state in ("failed", "refused") and self.place == "local":
            raise RuntimeError(outcome.said or f"exit code {outcome.code}; what it said is above")
        return outcome.code


def parameters(asked: Resources, runs: Sequence[Path], place: str) -> dict[str, Any]:
    """What the executor is told; times in minutes."""
    if place != "slurm":
        gpus = torch.cuda.device_count()  # all of them: without, submitit hides them
        return {"name": runs[0].name, "timeout_min": FOREVER, "tasks_per_node": 1, "gpus_per_node": gpus}
    folders = " ".join(shlex.quote(str(folder)) for folder in runs)
    ours = f"runs=({folders})\nrun=${{runs[${{SLURM_ARRAY_TASK_ID:-0}}]}}"
    extra: dict[str, Any] = {"requeue": True}
    for option in asked.options:
        name, sign, value = option.removeprefix("--").partition("=")
        extra[name] = value if sign else True
    return {
        "name": runs[0].name, "nodes": asked.nodes, "tasks_per_node": asked.ranks_per_node,
        "cpus_per_task": asked.threads, "slurm_time": minutes(asked.time), "slurm_signal_delay_s": asked.grace,
        "slurm_srun_args": srun_options(asked), "stderr_to_stdout": True,
        "slurm_setup": [ours, f"export OMP_NUM_THREADS={asked.threads}", *asked.setup, BEFORE],
        "slurm_teardown": ["code=$?", AFTER.format(restarts=asked.restarts)], "slurm_additional_parameters": extra,
        **({"slurm_partition": asked.partition} if asked.partition else {}),
        **({"gpus_per_node": asked.gpus_per_node} if asked.gpus_per_node else {}),
    }


def private_folder(beside: Path) -> Path:
    """Where submitit may pickle: a folder of this user's that nobody else can open. Raises PermissionError."""
    folder = beside / PRIVATE
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or folder.is_symlink():
        raise PermissionError(f"'{folder}' is not this user's own folder; what lies in it would be run. Remove it")
    folder.chmod(0o700)
    return folder / "%j"


def _checked(arguments: argparse.Namespace, overrides: list[str]) -> tuple[list[str], Recipe]:
    recipe = load(arguments.recipe, overrides, registry())
    resources_of(arguments, recipe)
    for folder in filter(None, (recipe.data.train, recipe.data.validation)):
        read_manifest(Path(folder))  # what is missing is said now, and not when a queue has been waited for
    return overrides, recipe
