"""`trireme launch`: a recipe on all of one machine, started again from its last checkpoint when a rank dies."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from collectives.launch import check_dealing
from hpc.bench_crew import outside_a_job
from hpc.build import registry
from hpc.config import Recipe, load
from hpc.doctor import launchers, mpi_here
from hpc.failure import FAILURE
from hpc.processes import cores
from hpc.quantities import counted
from hpc.runtime import STOP_SIGNALS
from jobs.attempt import Attempt, Outcome

EXAMPLES = """examples:
  trireme launch jobs/recipes/demo.toml                           a rank a GPU, or a rank a core
  trireme launch -n 8 my.toml optim.learning_rate=0.05 run=runs/faster
  trireme launch -n 4 --restarts 10 my.toml                       a night on a machine that is not to be trusted
  trireme launch -n 4 --show my.toml                              the command that would be run

Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2: checkpoint at the next step, and end with exit code 75; the same command goes on. A
second Ctrl-C ends it at once. Exit code: 0 finished, 75 stopped, another one: failed, and RUN/failure.json says why.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("recipe", help="a recipe file (TOML)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe keys to set")
    parser.add_argument(
        "-n", "--ranks", type=int, metavar="N", help="ranks; default: as many as GPUs, or cores, that divide 'splits'"
    )
    parser.add_argument(
        "--restarts", type=int, default=3, metavar="R", help="how often to go on after a failure (default: 3)"
    )
    parser.add_argument("--show", action="store_true", help="print the command and its environment; start nothing")


def run(arguments: argparse.Namespace) -> int:
    words = ["train", arguments.recipe, *arguments.overrides]
    if arguments.ranks is not None and arguments.ranks < 1:
        raise ValueError(f"-n {arguments.ranks}: expected 1 or more ranks")
    if arguments.show:
        recipe = load(arguments.recipe, arguments.overrides, registry())
        command, additions = launch_command(words, recipe, arguments.ranks or fitting_ranks(recipe))
        print(" ".join([*(f"{name}={value}" for name, value in additions.items()), shlex.join(command)]))
        return 0
    return keep_going_here(words, arguments.ranks, arguments.restarts).code


def keep_going_here(words: Sequence[str], ranks: int | None, restarts: int) -> Outcome:
    """`trireme train` with these words on this machine's ranks, as `keep_going` does it; None: as many as fit."""
    recipe = load(words[1], words[2:], registry())
    command, additions = launch_command(words, recipe, ranks or fitting_ranks(recipe))
    return keep_going(command, outside_a_job() | additions, Path(recipe.run), restarts)


def keep_going(command: Sequence[str], environment: dict[str, str], run: Path, restarts: int) -> Outcome:
    """Attempts at a job until it is finished, asked to stop, or has failed once more often than `restarts`.

    Main thread only: signals ask it to stop.
    """
    if restarts < 0:
        raise ValueError(f"--restarts {restarts}: expected 0 or more")
    asked: list[int] = []
    handlers = {n: signal.signal(n, lambda number, frame: asked.append(number)) for n in (*STOP_SIGNALS, signal.SIGHUP)}
    try:
        return _keep_going(command, environment, run, restarts, asked)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _keep_going(
    command: Sequence[str], environment: dict[str, str], run: Path, restarts: int, asked: list[int]
) -> Outcome:
    def times() -> int:
        return 2 if asked.count(signal.SIGINT) > 1 else min(len(asked), 1)

    job = secrets.token_hex(8)
    for left in range(restarts, -1, -1):
        outcome = Attempt(command, environment, run, job).make(times)
        if outcome.state in ("finished", "stopped", "refused") or times():
            break
        end = "" if outcome.again and left else "no restart is left" if outcome.again else "it would fail again"
        then = f"{end}; {run / FAILURE} has the rest" if end else f"going on, {counted(left - 1, 'restart')} left"
        print(f"trireme launch: {outcome.said}: {then}", file=sys.stderr, flush=True)
        if end:
            break
    return outcome


def fitting_ranks(recipe: Recipe) -> int:
    """The most ranks that divide the recipe's splits and have a GPU, or cores for their threads, to themselves."""
    import torch

    room = torch.cuda.device_count() if recipe.device != "cpu" else 0
    room = room or max(1, cores() // recipe.threads)
    return max(n for n in range(1, min(room, recipe.splits) + 1) if recipe.splits % n == 0)


def launch_command(words: Sequence[str], recipe: Recipe, ranks: int) -> tuple[list[str], dict[str, str]]:
    """The command line that starts `trireme` with these words on so many ranks here, and additions to the environment.

    With a core for each of their threads ranks are bound to so many cores each; else they are not bound.
    Raises ValueError if the splits cannot be dealt to the ranks, FileNotFoundError if there is no launcher.
    """
    check_dealing(recipe.splits, ranks)
    version, library = mpi_here()
    found = next(iter(launchers(os.environ.get("PATH", ""), library)), None)
    if found is None:
        raise FileNotFoundError(f"no mpiexec belongs to {version} ({library}); 'trireme doctor' says what to install")
    bound = ranks > 1 and ranks * recipe.threads <= cores()
    additions = {"OMP_NUM_THREADS": str(recipe.threads)}
    options = ["-n", str(ranks)]
    if "Open MPI" in version:
        options += ["--map-by", f"slot:PE={recipe.threads}" if bound else "slot:oversubscribe"]
        options += ["--bind-to", "core" if bound else "none"]
        if os.geteuid() == 0:
            additions |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    elif "MPICH" in version or "Intel" in version:
        options += ["-launcher", "fork", *(["-bind-to", f"core:{recipe.threads}"] if bound else [])]
    return [found, *options, sys.executable, "-P", "-m", "mpi4py", "-m", "hpc", *words], additions
