"""A job: everything that a training run is made of, and one turn of it. Design, section 2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from collectives.comm import Comm
from collectives.strategy import Strategy
from hpc.batches import Batches
from hpc.checkpoint import Saver
from hpc.meter import Meter
from hpc.runtime import Device, StopFlag
from hpc.schedule import Schedule
from models.task import Carry, Task

if TYPE_CHECKING:
    from hpc.minibatch import Selection

Carries = dict[int, Carry]  # by split: what its next batch starts from (hidden state belongs to the split)


@dataclass
class Job:
    """Everything a training run is made of (`build.py` puts it together).

    selection         of minibatch sizes
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
    selection: Selection
    saver: Saver
    meter: Meter
    stop: StopFlag
    evaluate: Callable[[], dict[str, float]] | None
    metric: str
    checkpoint_every: int
    validation_frames: int


def turn(job: Job, at: int, limit: int, carry: Carries) -> int:
    """From step `at` on, every split that this rank holds learns some batches, at most `limit`; then the exchange.

    carry  changed in place

    Returns how many batches a split took. Raises TrainingFailed on a loss or gradient that is not finite.
    """
    strategy, meter = job.strategy, job.meter
    strategy.rate = job.schedule.rate(at)
    n = strategy.span(limit)
    for split in job.comm.splits:  # the splits this rank holds, ascending
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
                if t == at + n - 1:
                    strategy.leave(split)
    with meter("exchange"):
        strategy.advance(n)
    return n


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
        job.strategy.fail(
            f"the loss is {loss} at step {t} (rank {job.comm.rank}, split {split}, utterances "
            f"{', '.join(some)} among others); {job.strategy.remedy}"
        )
        carry = None  # where the run goes on, it is without what this came from
    return count, carry
