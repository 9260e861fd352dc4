"""Minibatch-size selection: now and then, the next stretch of data is tried with several sizes, and the largest kept
that does not hurt.

Source: paper 002, section 4: "every 24h of data, we process the next 45 minutes at different minibatch sizes and pick
the largest N that does not hurt convergence, based on training-set frame accuracy". Every size starts from the same
model, state and data; afterwards all is taken back, and training goes on through that stretch with the size chosen.
Trials delay no updates (section 5.4: double buffering made them select smaller sizes). A trial with a loss or gradient
that is not finite loses.

A size is a multiple of the recipe's batch: a turn then takes so many of them before it updates. The learning rate
means the same a frame, as in the paper's equation (1), so under SGD and momentum a larger size takes larger steps, up
to where that fails; rules that divide by the gradient's size (AdaGrad, Adam) take fewer steps instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from collectives.strategy import Strategy, Weights
from hpc.evaluate import add_up
from hpc.job import Carries, Job, turn
from hpc.schedule import Schedule
from models.task import Sums


class Selection:
    """When sizes are tried, which, and what was chosen.

    every      steps between selections, at least; they come after validations. 0: never
    stretch    steps that every size is tried on
    sizes      multiples of the recipe's batch
    metric     what is compared, smaller being better: over the stretch, by the model after it
    tolerance  by how much a larger size's metric may be above the best
    batch      items of the recipe's batch, for what is said
    """

    def __init__(
        self, *, every: int, stretch: int, sizes: Sequence[int], metric: str, tolerance: float, batch: int
    ):
        self.every, self.stretch, self.sizes = every, stretch, sorted(set(sizes))
        self.metric, self.tolerance, self.batch = metric, tolerance, batch
        self.size, self.chosen_at = 1, 0

    def due(self, at: int, schedule: Schedule) -> bool:
        """Whether sizes are to be tried at step `at`, and were not yet: after a validation, while a stretch is left."""
        if not self.every or at - self.chosen_at < self.every or at + self.stretch > schedule.steps:
            return False
        return schedule.next_judgement(at - 1) == at

    def state(self) -> dict[str, int]:
        """What a resumed run needs, as JSON values."""
        return {"size": self.size, "chosen_at": self.chosen_at}

    def restore(self, state: dict[str, int], strategy: Strategy) -> None:
        vars(self).update(state)
        strategy.batches = self.size

    def pick(self, found: dict[int, float]) -> int:
        """The largest size of those nearly as good as the best; the present one if none gave a finite metric.

        >>> selection = Selection(every=1, stretch=1, sizes=[1, 2, 4], metric="", tolerance=0.01, batch=1)
        >>> selection.pick({1: 0.3, 2: 0.305, 4: 0.4})
        2
        """
        finite = {size: value for size, value in found.items() if math.isfinite(value)}
        limit = min(finite.values(), default=math.inf) + self.tolerance
        return max((size for size, value in finite.items() if value <= limit), default=self.size)

    def choose(self, job: Job, at: int, carry: Carries) -> bool:
        """Try all sizes from step `at` on and settle on one; nothing else changes (collective).

        A copy of the strategy's state is kept in memory meanwhile. Returns False, having chosen nothing, if the run was
        asked to stop: the checkpoint of the validation at this step is where it goes on from.
        """
        strategy, meter, found = job.strategy, job.meter, dict[int, float]()
        strategy.end()
        kept = Snapshot(strategy, job.saver.flat)
        strategy.undelayed = strategy.lenient = True
        began = meter.totals["select"]
        with meter.aside("select"):
            for size in self.sizes:
                value = self._try(job, at, size, dict(carry))
                strategy.restore(kept)
                if value is None:
                    break
                found[size] = value
        strategy.undelayed = strategy.lenient = strategy.failed = False
        strategy.batches = self.size
        if len(found) < len(self.sizes):
            return False
        self.size, self.chosen_at = self.pick(found), at
        strategy.batches = self.size
        self._tell(job, at, found, meter.totals["select"] - began)
        return True

    def _tell(self, job: Job, at: int, found: dict[int, float], seconds: float) -> None:
        epoch, frames = job.meter.progress(at)
        tried = {str(size * self.batch): value if math.isfinite(value) else None for size, value in found.items()}
        job.meter.journal.write(
            "minibatch", step=at, epoch=epoch, frames=frames, metric=self.metric, tolerance=self.tolerance, tried=tried,
            chosen=self.size * self.batch, seconds=seconds,
        )
        listed = ", ".join(f"{size} {'failed' if value is None else f'{value:.4g}'}" for size, value in tried.items())
        said = f"epoch {epoch:.2f}  minibatch: {self.metric} {listed}  -> {self.size * self.batch}"
        job.meter.journal.show(at, said)

    def _try(self, job: Job, at: int, size: int, carry: Carries) -> float | None:
        """The metric after a stretch with this size, infinity if it failed; None: the run was asked to stop."""
        strategy, t = job.strategy, at
        strategy.batches, strategy.failed = size, False
        until, before = at + self.stretch, dict(carry)
        while t < until:
            t += turn(job, t, until - t, carry)
            if job.comm.agree(job.stop.requested):
                strategy.end()
                job.comm.barrier()
                return None
        strategy.end()
        value = self._measured(job, at, until, before)
        failed = any(job.comm.gather(strategy.failed))
        return value if math.isfinite(value) and not failed else math.inf

    def _measured(self, job: Job, at: int, until: int, carry: Carries) -> float:
        """The metric over the stretch, by the model as it is; a collective that every number of ranks sums alike."""
        mine: list[tuple[int, Sums]] = []
        job.model.eval()
        for split in job.comm.splits:
            held = carry[split]
            for t in range(at, until):
                batch = job.batches(split, t)
                if job.batches.begins(t):
                    held = None
                if batch is not None:
                    with torch.no_grad(), job.device.autocast(), job.meter("forward"):
                        sums, held = job.task.metrics(job.model, batch, held)
                    mine.append((split, sums))
        job.model.train()
        everyone = sorted((entry for rank in job.comm.gather(mine) for entry in rank), key=lambda entry: entry[0])
        metrics = {name: total / count for name, (total, count) in add_up([s for _, s in everyone]).items() if count}
        return (metrics | job.task.derived(metrics)).get(self.metric, math.inf)


class Snapshot:
    """A strategy's state, kept in memory to go back to; serves as its `Joined`."""

    def __init__(self, strategy: Strategy, flat: Weights):
        state = strategy.state()
        self.common: dict[str, Any] = dict(state.common)
        self._weights, self._pieces = flat.weights.clone(), state.pieces
        self._slices = {name: values.clone() for name, values in state.slices.items()}
        self._splits = {s: {name: values.clone() for name, values in held.items()} for s, held in state.splits.items()}

    def weights_into(self, weights: torch.Tensor) -> None:
        weights.copy_(self._weights)

    def slice(self, name: str, low: int, high: int) -> torch.Tensor:
        at = 0
        for first, last in self._pieces:
            if first <= low and high <= last:
                return self._slices[name][at + low - first : at + high - first]
            at += last - first
        raise AssertionError(f"floats {low} to {high} of '{name}' are not of this rank")

    def split(self, split: int) -> dict[str, torch.Tensor]:
        return self._splits.get(split, {})
