"""The `trireme` command. A command's module is imported when that command is called, so `--help` is quick."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from importlib import import_module
from typing import Any, NamedTuple

from hpc.failure import FAILED

EXAMPLES = """examples:
  trireme doctor                                              is this machine set up?
  trireme prepare frames --from audio VOICES data/voices      folders of wav/flac into shards
  trireme train jobs/recipes/demo.toml                        train on one rank
  mpiexec -n 4 python -m mpi4py -m hpc train jobs/recipes/demo.toml optim.learning_rate=0.05
  trireme report runs/demo                                    a picture and a page
  trireme trace runs/demo                                     what every rank did when, for a few turns
  trireme evaluate runs/demo data/demo/validation

Every command explains itself: trireme COMMAND --help
"""


class Command(NamedTuple):
    """module: where `add_arguments(parser)` and `run(arguments[, comm])` are; ranks: whether it runs under mpiexec."""

    help: str
    module: str
    ranks: bool


COMMANDS = {
    "train": Command("train the model that a recipe describes, or go on where it stopped", "hpc.training", True),
    "launch": Command("train on all of this machine; go on after a failure", "jobs.launch", False),
    "submit": Command("send a recipe, or a grid of them, to Slurm, or run it here", "jobs.submit", False),
    "sbatch": Command("write an sbatch script that trains a recipe until it is done", "jobs.sbatch", False),
    "jobs": Command("list runs, and how each is doing", "jobs.listing", False),
    "logs": Command("show what all ranks of a run said, in the order of time", "jobs.logs", False),
    "prepare": Command("make data sets from your files", "hpc.prepare.command", True),
    "evaluate": Command("measure a finished run's model on a data set", "hpc.scoring", True),
    "folds": Command("cross-validation: train on every fold, measure each model on its test set", "hpc.folds", True),
    "predict": Command("write a finished run's outputs for a data set (Kaldi ark or HDF5)", "hpc.predict", True),
    "plan": Command("measure a recipe here, and say how many nodes pay, and whether 1-bit does", "hpc.plan", True),
    "report": Command("draw a run: a picture and one self-contained page", "hpc.report", False),
    "trace": Command("draw when each rank read, computed and exchanged: a timeline", "hpc.trace", False),
    "compare": Command("lay runs side by side", "hpc.compare", False),
    "doctor": Command("say what was found on this machine, and whether it is right", "hpc.doctor", False),
    "bench": Command("measure this machine and this code beside a peer or a limit", "hpc.bench", False),
}


def build_parser(chosen: str) -> argparse.ArgumentParser:
    """The command line, with the arguments of the chosen command."""
    parser = argparse.ArgumentParser(
        prog="trireme", description="MPI-native batch training for speech and language models.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.help, description=f"{command.help[0].upper()}{command.help[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:
            _imported(command.module).add_arguments(sub)
    return parser


def _imported(module: str) -> Any:
    """A module that is imported with all that it needs, none of which is garbage: a tenth sooner if nobody looks."""
    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def main(argv: list[str] | None = None) -> int:
    """Run one command; the process's exit code. An error on one rank ends all ranks."""
    words = sys.argv[1:] if argv is None else argv
    chosen = next((w for w in words if w in COMMANDS), "")
    arguments = parse(chosen, words)
    command = COMMANDS[arguments.command]
    act = _imported(command.module).run
    return _with_ranks(act, arguments) if command.ranks else _guarded(act, arguments)


def parse(chosen: str, words: list[str]) -> argparse.Namespace:
    """The arguments of the chosen command; `key=value` may stand behind options too, which argparse does not allow."""
    parser = build_parser(chosen)
    arguments, rest = parser.parse_known_args(words)
    settings = [word for word in rest if "=" in word and not word.startswith("-") and hasattr(arguments, "overrides")]
    if settings != rest:
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in settings)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _guarded(act: Any, arguments: argparse.Namespace) -> int:
    try:
        return act(arguments)
    except BrokenPipeError:  # who reads it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"trireme {arguments.command}: {error}", file=sys.stderr)
        return 1


def _with_ranks(act: Any, arguments: argparse.Namespace) -> int:
    """Run a command on every rank. What one rank alone raises aborts the job; what all raise ends it quietly."""
    try:
        from collectives.comm import Comm, LaunchError, PeerLost, RootFailed, is_refusal
        from collectives.strategy import TrainingFailed
    except (ImportError, RuntimeError) as error:  # mpi4py found no MPI library
        print(f"trireme {arguments.command}: MPI cannot be loaded ({error}); see 'trireme doctor'", file=sys.stderr)
        return FAILED
    comm = None
    try:
        comm = Comm.start()
        code = act(arguments, comm)
        comm.finish(code)
        return code
    except RootFailed as error:
        assert comm is not None
        code = 1 if error.refused else FAILED
        comm.finish(code)
        return code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = 1 if is_refusal(error) else FAILED
        expected = isinstance(error, ValueError | OSError | LaunchError | PeerLost | TrainingFailed)
        who = comm.label if comm is not None else ""
        where = f"{error.__notes__[0]}: " if getattr(error, "__notes__", None) else ""
        text = str(error) if expected else "".join(traceback.format_exception(error))
        print(f"{who}trireme {arguments.command}: {where}{text}", file=sys.stderr, flush=True)
        if comm is not None and getattr(error, "raised_everywhere", False):
            comm.finish(code)
            return code
    if comm is not None:
        comm.abort(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
