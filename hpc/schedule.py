"""Rank 0's judgement: learning-rate halving, newbob with roll-back, listed steps, replay, early stop.

A policy answers two questions: the learning rate at a point of training, and what to do after a validation. Its
attributes are plain numbers, so its state is a JSON object. `Schedule` adds where validations fall, which model is
best, and when training ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from collectives.strategy import Rate

Verdict = Literal["continue", "halve", "roll back", "stop"]
Epochs = Annotated[int, Ge(1)]
Ratio = Annotated[float, Gt(0), Lt(1)]


class Constant:
    """The same learning rate throughout."""

    def __init__(self, learning_rate: float, *, epochs: Epochs = 10, patience: Annotated[int, Ge(0)] = 0):
        """epochs: passes over the data at most; patience: validations without a new best before stopping, 0: never."""
        self.learning_rate, self.epochs, self.patience = learning_rate, epochs, patience

    def rate(self, progress: float, validations: int) -> float:
        """The learning rate after `progress` epochs and `validations` validations."""
        return self.learning_rate

    def judge(self, loss: float, best: float) -> Verdict:
        """What follows from a validation loss, `best` being the smallest before it (infinity at first)."""
        return "continue"

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Halving(Constant):
    """Halve every time once progress is small, and stop when it is small again. Paper 000, Algorithm 1.

    Algorithm 1 compares log probabilities (line 17: logp x minImprovement < preLogp); the loss here is their negative
    mean, so the test reads loss x min_improvement > previous loss.
    """

    def __init__(
        self, learning_rate: float, *, epochs: Epochs = 20, patience: Annotated[int, Ge(0)] = 0,
        min_improvement: Annotated[float, Ge(1)] = 1.003,
    ):
        super().__init__(learning_rate, epochs=epochs, patience=patience)
        self.min_improvement = min_improvement
        self.divide = False
        self.previous = math.inf

    def judge(self, loss: float, best: float) -> Verdict:
        small = loss * self.min_improvement > self.previous
        self.previous = loss
        if small and self.divide:
            return "stop"
        self.divide = self.divide or small
        if self.divide:
            self.learning_rate /= 2
            return "halve"
        return "continue"


class Newbob(Constant):
    """Halve once the relative improvement is below `start`, stop when it is below `end`; a worse model is undone.

    After a validation worse than the best one, training goes back to the best model (weights and optimizer state) and
    on through the data from where it is (with the hidden state that is carried on), with the learning rate halved.
    Source: ICSI QuickNet's newbob, with the roll-back of Kaldi's nnet1 scheduler.
    """

    def __init__(
        self, learning_rate: float, *, epochs: Epochs = 20, patience: Annotated[int, Ge(0)] = 0,
        start: Annotated[float, Ge(0)] = 0.01, end: Annotated[float, Ge(0)] = 0.001, factor: Ratio = 0.5,
        min_epochs: Annotated[int, Ge(0)] = 0,
    ):
        """min_epochs: validations before which training never stops."""
        super().__init__(learning_rate, epochs=epochs, patience=patience)
        self.start, self.end, self.factor, self.min_epochs = start, end, factor, min_epochs
        self.halving = False
        self.judged = 0

    def judge(self, loss: float, best: float) -> Verdict:
        gain = math.inf if math.isinf(best) else (best - loss) / abs(best) if best else 0.0
        self.judged += 1
        if self.halving and gain < self.end and self.judged >= self.min_epochs:
            return "stop"
        self.halving = self.halving or gain < self.start
        if self.halving:
            self.learning_rate *= self.factor
        if gain < 0:
            return "roll back"
        return "halve" if self.halving else "continue"


class Steps(Constant):
    """Listed steps: from epoch `at[i]` on, the learning rate is `rates[i]`; before the first, the optimizer's."""

    def __init__(
        self, learning_rate: float, *, at: list[float], rates: list[float], epochs: Epochs = 10,
        patience: Annotated[int, Ge(0)] = 0,
    ):
        super().__init__(learning_rate, epochs=epochs, patience=patience)
        if len(at) != len(rates) or sorted(at) != at:
            raise ValueError(
                f"schedule.at has {len(at)} epochs and schedule.rates {len(rates)} rates; give one rate each, "
                "epochs ascending"
            )
        self.at, self.rates = at, rates

    def rate(self, progress: float, validations: int) -> float:
        reached = [r for a, r in zip(self.at, self.rates, strict=True) if a <= progress]
        return reached[-1] if reached else self.learning_rate


class Decay(Constant):
    """The learning rate times `factor` once an epoch, from epoch `after` on. Paper 001, section 3.3: 0.98 after 175."""

    def __init__(
        self, learning_rate: float, *, factor: Ratio = 0.98, after: Annotated[int, Ge(1)] = 1, epochs: Epochs = 10,
        patience: Annotated[int, Ge(0)] = 0,
    ):
        """after: epochs at the full rate."""
        super().__init__(learning_rate, epochs=epochs, patience=patience)
        self.factor, self.after = factor, after

    def rate(self, progress: float, validations: int) -> float:
        return self.learning_rate * self.factor ** max(0, int(progress) + 1 - self.after)


class Replay(Constant):
    """The learning rates of another run, validation by validation (`of`: its folder; `build.py` reads them)."""

    def __init__(
        self, learning_rate: float, rates: Sequence[float] = (), *, of: str, epochs: Epochs = 10,
        patience: Annotated[int, Ge(0)] = 0,
    ):
        super().__init__(learning_rate, epochs=epochs, patience=patience)
        self.of, self.rates = of, list(rates)

    def rate(self, progress: float, validations: int) -> float:
        if not self.rates:
            return self.learning_rate
        return self.rates[min(validations, len(self.rates) - 1)]


POLICIES: dict[str, type] = {
    "constant": Constant, "halving": Halving, "newbob": Newbob, "steps": Steps, "decay": Decay, "replay": Replay,
}


class Schedule:
    """Where validations fall, the rate of the next turn, the best model so far, and when training ends.

    policy     one of POLICIES
    per_epoch  steps an epoch
    every      steps between validations; 0: at the end of each epoch
    """

    def __init__(self, policy: Constant, per_epoch: int, every: int = 0):
        self.policy, self.per_epoch, self.every = policy, per_epoch, every
        self.steps = policy.epochs * per_epoch
        self.validations = 0
        self.damping = 1.0  # of the policy's rates
        self.best, self.best_at, self.since_best = math.inf, -1, 0
        self.stopped = ""

    def rate(self, at: int) -> Rate:
        """What the turn that begins at step `at` uses."""
        rate = self.damping * self.policy.rate(at / self.per_epoch, self.validations)
        return Rate(rate, at // self.per_epoch)

    def next_judgement(self, at: int) -> int:
        """The next step at which rank 0 judges: a multiple of `every`, or an epoch's end; the last step always."""
        period = self.every or self.per_epoch
        return min((at // period + 1) * period, self.steps)

    def judgements(self) -> Iterator[int]:
        """All of them, if training is not ended early."""
        at = 0
        while at < self.steps:
            at = self.next_judgement(at)
            yield at

    def judge(self, at: int, loss: float, stayed: bool = False) -> Verdict:
        """Take in the judged metric at step `at`; `best_at == at` afterwards means that it is the best so far.

        stayed  whether the model is the one of the last judgement, as all that was learned was thrown away: the rate is
                halved, whatever the policy, which is not asked (paper 000, Algorithm 2, would ask it, and stop)
        """
        if stayed:
            self.damping /= 2
        verdict: Verdict = "halve" if stayed else self.policy.judge(loss, self.best)
        self.validations += 1
        if loss < self.best:
            self.best, self.best_at, self.since_best = loss, at, 0
        elif not stayed:
            self.since_best += 1
        if verdict == "stop":
            self.stopped = "schedule"
        elif self.policy.patience and self.since_best >= self.policy.patience:
            verdict, self.stopped = "stop", "early stop"
        elif at >= self.steps:
            self.stopped = "epochs"
        return verdict

    def forget_best(self) -> None:
        """As if there had been no best model yet: its checkpoint is lost."""
        self.best, self.best_at, self.since_best = math.inf, -1, 0

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as JSON values (infinity as null)."""
        own = {k: getattr(self, k) for k in ("validations", "damping", "best", "best_at", "since_best", "stopped")}
        return _without_infinity(own | {"policy": _without_infinity(self.policy.state())})

    def restore(self, state: dict[str, Any]) -> None:
        state = _with_infinity(state)
        self.policy.restore(_with_infinity(state.pop("policy")))
        vars(self).update(state)


def _without_infinity(state: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in state.items()}


def _with_infinity(state: dict[str, Any]) -> dict[str, Any]:
    return {k: math.inf if v is None else v for k, v in state.items()}
