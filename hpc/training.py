"""`trireme train`: one recipe, start to finish."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch

from collectives.comm import Comm, RootFailed, check_dealing, everywhere
from collectives.strategy import TrainingFailed
from hpc.build import Carries, finished_model, make_job, make_policy, registry
from hpc.checkpoint import step_name
from hpc.config import Recipe, load, options
from hpc.pulse import Pulse
from hpc.quantities import bytes_sent, counted, said_of_bytes
from hpc.records import MODEL, SUCCESS
from hpc.run import RunFolder
from hpc.runtime import PREEMPTED, Device, StopFlag, open_log, versions
from hpc.summary import cause_of
from hpc.train import Job, train

EXAMPLES = """examples:
  trireme train jobs/recipes/demo.toml
  mpiexec -n 2 python -m mpi4py -m hpc train jobs/recipes/demo.toml
  mpiexec -n 4 python -m mpi4py -m hpc train my.toml optim.learning_rate=0.05 splits=8 run=runs/faster

The same command started again goes on from the last checkpoint, with any number of ranks that divides 'splits', and
learns exactly what it would have learned without the interruption. SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C: checkpoint at
the next step and exit with code 75; where splits train by blocks, at the block's end or after strategy.turn_steps
minibatches.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("recipe", help="a recipe file (TOML); those that come with Trireme are in jobs/recipes/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe keys to set")


def run(arguments: argparse.Namespace, comm: Comm) -> int:
    """Train, resume, or say that the run is finished; the exit code (collective)."""
    comm.on_root(lambda: _check(load(arguments.recipe, arguments.overrides, registry()), comm))  # one complaint, not K
    recipe = load(arguments.recipe, arguments.overrides, registry())
    return run_recipe(recipe, comm)


def _check(recipe: Recipe, comm: Comm) -> None:
    """Raise ValueError for what a recipe says wrong, before a run folder is made."""
    check_dealing(recipe.splits, comm.size)
    make_policy(recipe)
    kind: Any = registry()["strategy"][recipe.strategy.name]
    kind.check(**options(recipe.strategy))
    registry()["optim"][recipe.optim.name](**options(recipe.optim))  # for what it refuses
    if recipe.init_from:
        finished_model(Path(recipe.init_from))


def run_recipe(recipe: Recipe, comm: Comm) -> int:
    """Train a resolved recipe in its run folder; 0, or PREEMPTED if it was asked to stop (collective)."""
    folder = RunFolder(recipe.run)
    stop = StopFlag().listen()
    open_log(comm.rank, comm.host, None)
    device = Device(recipe.device, recipe.precision, comm.local_rank, recipe.threads)
    pulse = Pulse(recipe.log.watchdog)
    try:
        made = make_job(recipe, comm, device, folder, pulse, stop)
        if made is None:
            comm.on_root(lambda: print(f"{folder.path} is finished ({SUCCESS} is there); nothing to do"))
            return 0
        open_log(comm.rank, comm.host, folder.logs)
        try:
            return _train(recipe, *made, folder)
        finally:
            made[0].meter.journal.close()
    except RootFailed:  # the rank that raised keeps the cause
        raise
    except Exception as error:
        where = f"while {pulse.where}"
        if pulse.step:
            error.add_note(f"{where} after step {pulse.step}")
        folder.fail(comm.rank, comm.host, pulse.step, where, error)
        raise
    finally:
        pulse.close()


def _train(recipe: Recipe, job: Job, at: int, carries: Carries, folder: RunFolder) -> int:
    comm, journal, began = job.comm, job.meter.journal, time.monotonic()
    hosts = sorted(set(comm.gather(comm.host)))
    train_frames = job.batches.progress(job.batches.per_epoch)[1]
    journal.write(
        "start", step=at, resumed_from=step_name(at) if at else None, ranks=comm.size, hosts=hosts,
        splits=comm.n_splits, noun=job.task.noun, parameters=job.saver.flat.count, train_frames=train_frames,
        validation_frames=job.validation_frames,
        batch=recipe.data.batch, steps_per_epoch=job.batches.per_epoch, device=str(job.device.torch),
        threads=recipe.threads, precision=recipe.precision, versions=versions(),
        last_failure=folder.last_failure,
    )
    log = logging.getLogger("trireme")
    log.info(
        "%s: %s parameters, %s training %s, %s on %s, %s, steps %d to %d",
        folder.path, f"{job.saver.flat.count:,}", f"{train_frames:,}", job.task.noun, counted(comm.size, "rank"),
        ", ".join(hosts), counted(comm.n_splits, "split"), at, job.schedule.steps,
    )
    if folder.last_failure:
        log.info("the job before this one failed: %s", cause_of(folder.last_failure))
    finished = train(job, at, carries)
    job.batches.close()
    comm.barrier()
    sent = bytes_sent(comm.gather(job.strategy.sent()))
    if sent["bytes"]:
        log.info("sent between ranks%s: %s", f" since step {at}" if at else "", said_of_bytes(sent))
    end: dict[str, Any] = {
        "step": job.meter.at, "frames": job.meter.progress(job.meter.at)[1], "seconds": time.monotonic() - began,
        "best_step": job.schedule.best_at, "best": {job.metric: job.schedule.best} if job.evaluate else {},
        "stopped": job.schedule.stopped if finished else "preempted", "ranks": comm.size, "sent": sent,
    }
    if finished:
        if not torch.isfinite(job.saver.flat.weights).all():
            raise everywhere(TrainingFailed("the last update left weights that are not finite; lower its rate"))
        end = comm.on_root(lambda: folder.ship(job.saver.best or step_name(job.meter.at), end))
    journal.write("end", **end)
    if not finished:
        comm.on_root(lambda: folder.stop(job.meter.at))
        log.info("asked to stop: checkpointed at step %d; start the same command to go on", job.meter.at)
        return PREEMPTED
    comm.on_root(lambda: print(f"model: {Path(folder.path, MODEL)}  sha256 {end['sha256'][:16]}"))
    return 0
