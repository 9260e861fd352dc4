"""The loop: everything a job does, once through, for one rank or many, on CPU or GPU. Design, section 2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from collectives.comm import Comm, everywhere
from collectives.strategy import Strategy, TrainingFailed
from hpc.batches import Batches
from hpc.checkpoint import Checkpoint, Saver, check
from hpc.meter import Meter
from hpc.runtime import Device, StopFlag
from hpc.schedule import Schedule
from models.task import Carry, Task


@dataclass
class Job:
    """Everything a training run is made of (`build.py` puts it together).

    evaluate          validation metrics over all ranks, or None without a validation set
    metric            the metric that is judged
    checkpoint_every  steps between checkpoints beside those at validations; 0: none
    """

    comm: Comm
    device: Device
    task: Task
    model: torch.nn.Module
    batches: Batches
    strategy: Strategy
    schedule: Schedule
    saver: Saver
    meter: Meter
    stop: StopFlag
    evaluate: Callable[[], dict[str, float]] | None
    metric: str
    checkpoint_every: int
    validation_frames: int


def train(job: Job, at: int = 0, carry: dict[int, Carry] | None = None) -> bool:
    """Train from step `at` to the schedule's end.

    carry  split -> what its next batch starts from (hidden state belongs to the split)

    Returns whether the run came to its end; False: it was asked to stop, and wrote a checkpoint to go on from.
    Raises TrainingFailed on a loss or gradient that is not finite.
    """
    comm, strategy, schedule, meter = job.comm, job.strategy, job.schedule, job.meter
    carry = carry or dict.fromkeys(comm.splits)
    job.model.train()
    while at < schedule.steps and not schedule.stopped:
        judged = schedule.next_judgement(at)
        strategy.rate = schedule.rate(at)
        n = strategy.span(judged - at)
        for split in comm.splits:  # the splits this rank holds, ascending
            strategy.enter(split)
            for t in range(at, at + n):
                with meter("read"):
                    batch, count = job.batches(split, t), 0  # None: this split has run dry
                if job.batches.begins(t):
                    carry[split] = None
                if batch is not None:
                    count, carry[split] = learn(job, batch, split, t, carry[split])
                with meter("backward"):  # adding it up, or handing it on, is its last part
                    strategy.step(split, count)
            strategy.leave(split)
        with meter("exchange"):
            strategy.advance(n)
        at += n
        stopping = comm.agree(job.stop.requested)  # all ranks learn of it one turn later, at the same step
        meter.turn(at, strategy.rate.learning_rate)
        job.saver.poll()
        if at == judged:
            best = judge(job, at)
        due = job.checkpoint_every and at // job.checkpoint_every != (at - n) // job.checkpoint_every
        if at == judged or due or stopping:
            with meter("checkpoint"):
                job.saver.save(at, strategy.state(), carry, {"schedule": schedule.state()}, best=at == judged and best)
        if stopping and at < schedule.steps and not schedule.stopped:
            break
    comm.settle()
    with meter("checkpoint"):
        job.saver.close()
    meter.finish()
    return bool(schedule.stopped) or at >= schedule.steps


def learn(job: Job, batch: Any, split: int, t: int, carry: Carry) -> tuple[int, Carry]:
    """Forward and backward of one batch; its count of items, and what the split's next batch starts from."""
    with job.meter("forward"):
        job.batches.seed_all(split, t)
        with job.device.autocast():
            total, count, carry = job.task.loss(job.model, batch, carry)
    if not count:
        return 0, carry  # nothing to learn from in this batch: as if the split were dry
    with job.meter("backward"):
        total.backward()
        loss = job.meter.add(split, total, count)  # a GPU is done with both only where the number is asked for
    if not math.isfinite(loss):
        some = sorted({batch.key_of(i) for i in range(min(count, 5))})
        raise TrainingFailed(
            f"the loss is {loss} at step {t} (rank {job.comm.rank}, split {split}, utterances "
            f"{', '.join(some)} among others); lower optim.learning_rate or set strategy.clip_norm"
        )
    return count, carry


def judge(job: Job, at: int) -> bool:
    """Validate on all ranks, let rank 0 decide, and follow; whether this is the best model so far (collective)."""
    comm, schedule, meter = job.comm, job.schedule, job.meter
    job.strategy.end()
    if job.evaluate is None:
        schedule.stopped = "epochs" if at >= schedule.steps else ""
        return False
    seconds = meter.totals["validate"]
    with meter("validate"):
        metrics = job.evaluate()
    if not math.isfinite(metrics[job.metric]):
        raise everywhere(TrainingFailed(f"validation {job.metric} is {metrics[job.metric]} at step {at}"))
    rate = job.strategy.rate.learning_rate
    verdict, state = comm.on_root(lambda: [schedule.judge(at, metrics[job.metric]), schedule.state()])
    schedule.restore(state)
    best = schedule.best_at == at
    epoch, frames = meter.progress(at)
    meter.journal.write(
        "validate", step=at, epoch=epoch, frames=frames, learning_rate=rate, verdict=verdict, best=best,
        seconds=meter.totals["validate"] - seconds, **metrics,
    )
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    meter.journal.show(at, f"epoch {epoch:.2f}  validation: {numbers}  -> {verdict}{', best so far' if best else ''}")
    if verdict == "roll back":
        job.saver.wait()
        comm.barrier()
        best_checkpoint = job.saver.folder / str(job.saver.best)
        comm.on_root(lambda: check(best_checkpoint))
        job.strategy.restore(Checkpoint(best_checkpoint, job.saver.flat))
    return best
