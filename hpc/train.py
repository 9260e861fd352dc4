"""The loop: everything a job does, once through, for one rank or many, on CPU or GPU. Design, section 2."""

from __future__ import annotations

import math

from collectives.comm import everywhere
from collectives.strategy import TrainingFailed
from hpc.checkpoint import Checkpoint, check_own
from hpc.job import Carries, Job, turn


def train(job: Job, at: int = 0, carry: Carries | None = None) -> bool:
    """Train from step `at` to the schedule's end.

    carry  split -> what its next batch starts from (hidden state belongs to the split)

    Returns whether the run came to its end; False: it was asked to stop, and wrote a checkpoint to go on from.
    Raises TrainingFailed on a loss or gradient that is not finite.
    """
    comm, schedule, meter, selection = job.comm, job.schedule, job.meter, job.selection
    carry = carry or dict.fromkeys(comm.splits)
    job.model.train()
    while at < schedule.steps and not schedule.stopped:
        if selection.due(at, schedule) and not selection.choose(job, at, carry):
            break  # asked to stop amid it: the checkpoint of this step is there
        judged = schedule.next_judgement(at)
        n = turn(job, at, judged - at, carry)
        at += n
        stopping = comm.agree(job.stop.requested, now=n > 1)  # one turn later, where turns are short
        meter.turn(at, job.strategy.rate.learning_rate)
        job.saver.poll()
        best = judge(job, at) if at == judged else False
        due = job.checkpoint_every and at // job.checkpoint_every != (at - n) // job.checkpoint_every
        if at == judged or due or stopping:
            with meter("checkpoint"):
                record = {"schedule": schedule.state(), "minibatch": selection.state()}
                job.saver.save(at, job.strategy.state(), carry, record, best)
        if stopping and at < schedule.steps and not schedule.stopped:
            break
    comm.settle()
    with meter("checkpoint"):
        job.saver.close()
    meter.finish()
    return bool(schedule.stopped) or at >= schedule.steps


def judge(job: Job, at: int) -> bool:
    """Validate on all ranks, let rank 0 decide, and follow; whether this is the best model so far (collective)."""
    comm, schedule, meter = job.comm, job.schedule, job.meter
    with meter("exchange"):
        job.strategy.end()
    if job.evaluate is None:
        schedule.stopped = "epochs" if at >= schedule.steps else ""
        return False
    seconds = meter.totals["validate"]
    with meter("validate"):
        metrics = job.evaluate()
    if not math.isfinite(metrics[job.metric]):
        raise everywhere(TrainingFailed(f"validation {job.metric} is {metrics[job.metric]} at step {at}"))
    rate, told = job.strategy.rate.learning_rate, job.strategy.told(metrics)
    stayed = told.get("stayed", False)
    verdict, state = comm.on_root(lambda: [schedule.judge(at, metrics[job.metric], stayed), schedule.state()])
    schedule.restore(state)
    best = schedule.best_at == at
    epoch, frames = meter.progress(at)
    meter.journal.write(
        "validate", step=at, epoch=epoch, frames=frames, learning_rate=rate, verdict=verdict, best=best,
        seconds=meter.totals["validate"] - seconds, **metrics, **({"told": told} if told else {}),
    )
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    numbers += f"  {told['said']}" if told else ""
    meter.journal.show(at, f"epoch {epoch:.2f}  validation: {numbers}  -> {verdict}{', best so far' if best else ''}")
    if verdict == "roll back":
        job.saver.wait()
        comm.barrier()
        best_checkpoint = job.saver.folder / str(job.saver.best)
        comm.on_root(lambda: check_own(best_checkpoint))
        job.strategy.restore(Checkpoint(best_checkpoint, job.saver.flat))
    return best
