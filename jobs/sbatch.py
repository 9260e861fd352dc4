"""`trireme sbatch`: a plain sbatch script that does what `submit` does, with no Python between Slurm and the ranks.

What the script relies on: Slurm sends SIGTERM to a job's steps when it is preempted, and `--signal` has it sent before
the time limit; the ranks checkpoint and leave. The script outlives them, looks into the run folder, and requeues the
job. Ranks of an mpirun may be in no step: there the script is told of the time limit, and mpirun passes SIGUSR1 on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from collectives.launch import check_dealing
from hpc.build import registry
from hpc.config import Recipe, load
from hpc.doctor import launchers, mpi_here, slurm_type
from hpc.shards import MANIFEST

EXAMPLES = """examples:
  trireme sbatch my.toml --nodes 4 --ranks-per-node 8 --time 12:00:00 > job.sh; sbatch job.sh
  trireme sbatch my.toml --nodes 2 --ranks-per-node 4 --time 2:00:00 --partition gpu --gpus-per-node 4 \\
      --setup 'module load cuda' optim.learning_rate=0.05 run=runs/faster > job.sh
  trireme sbatch my.toml --nodes 1 --ranks-per-node 8 --time 1:00:00 --launcher mpirun > job.sh

The job goes on by itself after preemption, its time limit, or (--restarts) a failure, until RUN/success is there. To
stop it for good: scancel JOB; sent again, it goes on. The recipe, the code and the .venv are used as they are whenever
it starts, so leave them alone meanwhile. Makes RUN/logs, which Slurm needs.
"""


@dataclass(frozen=True)
class Resources:
    """What a job asks Slurm for.

    time      as Slurm writes it: "12:00:00", "90" (minutes), "2-00:00:00"
    grace     seconds before the time limit at which ranks are told to checkpoint and leave
    restarts  how often it goes on after a failure (after preemption and time limits: always)
    mpi       srun's --mpi; "" what the MPI library here needs
    options   further sbatch options, as they stand in a script: "--exclusive"
    setup     shell lines before the ranks start
    """

    nodes: int
    ranks_per_node: int
    time: str
    threads: int
    partition: str = ""
    gpus_per_node: int = 0
    grace: int = 120
    restarts: int = 3
    mpi: str = ""
    options: Sequence[str] = field(default_factory=list)
    setup: Sequence[str] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def add_resources(parser: argparse.ArgumentParser) -> None:
    """The options that say what a job asks for, changed in place."""
    ask = parser.add_argument_group("what the job asks for")
    ask.add_argument("--nodes", type=int, default=1, metavar="N", help="(default: 1)")
    ask.add_argument("--ranks-per-node", type=int, default=1, metavar="N", help="a rank a GPU, say (default: 1)")
    ask.add_argument(
        "--time", default="1:00:00", metavar="H:MM:SS", help="Slurm's limit; or MINUTES, D-HH:MM:SS (default: an hour)"
    )
    ask.add_argument("--partition", default="", metavar="NAME", help="default: the cluster's")
    ask.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="(default: 0)")
    ask.add_argument(
        "--grace", type=int, default=120, metavar="S", help="seconds before the time limit to checkpoint (default: 120)"
    )
    ask.add_argument(
        "--restarts", type=int, default=3, metavar="R", help="how often to go on after a failure (default: 3)"
    )
    ask.add_argument("--mpi", default="", metavar="TYPE", help="srun's --mpi; default: what this MPI library needs")
    ask.add_argument(
        "--option", action="append", default=[], metavar="--LONG=VALUE",
        help="a further sbatch option, with '=': --option=--account=NAME; may be repeated",
    )
    ask.add_argument(
        "--setup", action="append", default=[], metavar="LINE",
        help="a line of shell for the script, before ranks start; what it exports reaches them; may be repeated",
    )


def resources_of(arguments: argparse.Namespace, recipe: Recipe) -> Resources:
    """What was asked for. Raises ValueError if the recipe's splits cannot be dealt to so many ranks."""
    a = arguments
    asked = Resources(
        a.nodes, a.ranks_per_node, a.time, recipe.threads, a.partition, a.gpus_per_node, a.grace, a.restarts, a.mpi,
        a.option, a.setup,
    )
    if min(a.nodes, a.ranks_per_node) < 1:
        raise ValueError(f"--nodes {a.nodes} --ranks-per-node {a.ranks_per_node}: expected 1 or more of each")
    try:
        check_dealing(recipe.splits, asked.ranks)
    except ValueError as error:
        raise ValueError(f"--nodes {a.nodes} x --ranks-per-node {a.ranks_per_node}: {error}") from None
    if not 0 < a.grace <= 60 * minutes(a.time) - 45:  # Slurm may tell half a minute early, once; ranks must be there
        raise ValueError(f"--grace {a.grace}: expected at least 45 seconds less than --time {a.time}")
    return asked


def minutes(text: str) -> int:
    """Slurm's way to write a time ("90", "12:00:00", "2-00:00:00"), in minutes, rounded up. Raises ValueError."""
    days, dash, rest = text.rpartition("-")
    try:
        if dash and not days:
            raise ValueError("a negative time")
        parts = [int(part) for part in rest.split(":")]
        if dash:  # days-hours[:minutes[:seconds]]
            hours, mins, seconds = (*parts, 0, 0)[:3]
        elif len(parts) < 3:  # minutes[:seconds]
            hours, (mins, seconds) = 0, (*parts, 0)[:2]
        else:
            hours, mins, seconds = parts
        return (int(days or 0) * 24 + hours) * 60 + mins + (seconds > 0)
    except ValueError:
        raise ValueError(f"--time {text}: expected minutes, H:MM:SS or D-H:MM:SS, e.g. 12:00:00") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("recipe", help="a recipe file (TOML)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe keys to set")
    parser.add_argument("--launcher", choices=["srun", "mpirun"], default="srun", help="what starts the ranks")
    add_resources(parser)


def run(arguments: argparse.Namespace) -> int:
    recipe = load(arguments.recipe, arguments.overrides, registry())
    asked = resources_of(arguments, recipe)
    for folder in filter(None, (recipe.data.train, recipe.data.validation)):
        if not (Path(folder) / MANIFEST).is_file():  # the job may see other file systems
            print(f"trireme sbatch: '{folder}' is not a data set here; the job will need it", file=sys.stderr)
    (Path(recipe.run) / "logs").mkdir(parents=True, exist_ok=True)  # Slurm makes no folders
    words = [sys.executable, "-P", "-m", "mpi4py", "-m", "hpc", "train", arguments.recipe, *arguments.overrides]
    print(script(asked, Path(recipe.run), words, arguments.launcher), end="")
    return 0


def srun_options(asked: Resources) -> list[str]:
    """What srun is told; cores are not what sbatch was told (since Slurm 22.05)."""
    kind = asked.mpi or slurm_type(mpi_here()[0])
    return [f"--mpi={kind}", "--kill-on-bad-exit=1", f"--cpus-per-task={asked.threads}"]


def script(asked: Resources, run: Path, words: Sequence[str], launcher: str = "srun") -> str:
    """The sbatch script that runs `words` as ranks until the run in this folder is finished."""
    version, library = mpi_here()
    directives = [
        f"--job-name={shlex.quote(run.name)}", f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--output={shlex.quote(f'{run}/logs/slurm-%j.log')}", f"--nodes={asked.nodes}",
        f"--ntasks-per-node={asked.ranks_per_node}", f"--cpus-per-task={asked.threads}", f"--time={asked.time}",
        "--open-mode=append", "--requeue", f"--signal={'TERM' if launcher == 'srun' else 'B:USR1'}@{asked.grace}",
        *([f"--partition={asked.partition}"] if asked.partition else []),
        *([f"--gpus-per-node={asked.gpus_per_node}"] if asked.gpus_per_node else []), *asked.options,
    ]
    if launcher == "srun":
        start = f"srun {' '.join(srun_options(asked))}"
    else:
        found = next(iter(launchers("", library)), "mpiexec")
        start = f"{'' if 'Open MPI' in version else 'SLURM_MPI_TYPE=none '}{found} -n {asked.ranks}"
    return SCRIPT.format(
        written=shlex.join(["trireme", *sys.argv[1:]]).replace("\n", " "),
        directives="\n".join(f"#SBATCH {directive}" for directive in directives),
        run=shlex.quote(str(run)), threads=asked.threads, setup="".join(f"{line}\n" for line in asked.setup),
        before=BEFORE, start=start, command=shlex.join(words), forward="" if launcher == "srun" else FORWARD,
        after=AFTER.format(restarts=asked.restarts),
    )


SCRIPT = """#!/bin/bash
# Written by: {written}
# For another run folder or other numbers write it anew: they stand here several times, and Slurm needs RUN/logs before.
{directives}

run={run}
export OMP_NUM_THREADS={threads}
{setup}{before}
[ -e "$run/job.lock" ] || printf '{{"place": "slurm", "job": "%s", "log": ""}}' "$SLURM_JOB_ID" > "$run/submitted.json"
{start} {command} &
{forward}while :; do
    wait $!; code=$?
    kill -0 $! 2>/dev/null || break  # a signal ends 'wait' early: wait again, until the ranks are gone
done
{after}
"""
FORWARD = """# Slurm tells this script (B:USR1), which tells mpirun, which passes it on to the ranks.
trap 'kill -USR1 $! 2>/dev/null' TERM USR1 USR2
"""
# What a script does before and after its ranks, in lines of bash; $run is the run's folder.
BEFORE = """
began="$run/logs/slurm-$SLURM_JOB_ID.began"
mkdir -p "$run/logs" && touch "$began" || exit 1
# Slurm tells the ranks to stop (preemption, time limit): they checkpoint and leave. This script outlives them.
trap : TERM USR1 USR2
# MPICH names memory that ranks share by job and step, and killed ranks leave theirs: empty steps first, another number
# of them at each start.
for ((i = ${SLURM_RESTART_COUNT:-0} % 10; i > 0; i--)); do srun --nodes=1 --ntasks=1 --mpi=none true; done
early='^(15|138|143)$'  # exit codes of ranks that are told to stop before they can listen
# A launcher may wait for ever for a node that is lost: soon after the job has come to its end, it is ended, too.
while sleep 1 || exit; do
    [ "$run/failure.json" -nt "$began" ] && sleep 1 && break
    { [ "$run/success" -nt "$began" ] || [ "$run/stopped" -nt "$began" ]; } && sleep 8 && break
done && pkill -9 -P $$ 'srun|mpi|prte' &
watch=$!; disown"""
AFTER = """kill $watch 2>/dev/null
# What counts is what the job wrote into its folder, not the launcher's exit code.
again() {{
    job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
    job=${{job:-$SLURM_JOB_ID}}
    state=$(squeue --noheader --job "$job" --format=%T)
    if [ "${{state:-RUNNING}}" = RUNNING ]; then  # nobody has cancelled it
        if scontrol requeue "$job"; then
            echo "$1: job $job goes on"
            sleep 300  # until Slurm ends this script
            exit 1
        fi
        echo "$1, and job $job could not be requeued: send it again"
    fi
    exit 1
}}
if [ -e "$run/success" ] && {{ [ $code = 0 ] || [ "$run/success" -nt "$began" ]; }}; then
    exit 0
elif [ "$run/stopped" -nt "$began" ]; then
    again "asked to stop"
elif [ $code = 1 ] && [ ! "$run/failure.json" -nt "$began" ]; then
    exit 1  # it would be refused again, and has said why
elif [[ $code =~ $early ]] && [ ! "$run/recipe.toml" -nt "$began" ]; then
    echo "exit code $code" >> "$run/logs/slurm-$SLURM_JOB_ID.early"
    [ "$(wc -l < "$run/logs/slurm-$SLURM_JOB_ID.early")" -le 10 ] && again "asked to stop before it began"
fi
sleep 3  # whoever found what failed writes it down
if [ ! "$run/failure.json" -nt "$began" ] && grep -qs "\\"job\\": \\"$SLURM_JOB_ID\\"" "$run/job.lock"; then
    said="the ranks ended with exit code $code, and no rank and no guard said why"
    printf '{{"time": %s, "kind": "unknown", "rank": null, "host": "", "where": "", "error": "%s"}}\\n' \\
        "$(date +%s)" "$said" > "$run/.failure.$SLURM_JOB_ID" &&
        mv "$run/.failure.$SLURM_JOB_ID" "$run/failure.json"
fi
[ "$run/failure.json" -nt "$began" ] && cat "$run/failure.json"
echo "exit code $code" >> "$run/logs/slurm-$SLURM_JOB_ID.failures"
if [ "$(wc -l < "$run/logs/slurm-$SLURM_JOB_ID.failures")" -le {restarts} ] &&
    ! {{ [ "$run/failure.json" -nt "$began" ] && grep -qs '"final": true' "$run/failure.json"; }}; then
    again "failed"
fi
exit 1"""
