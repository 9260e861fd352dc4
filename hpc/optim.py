"""Update rules as functions of flat slices: weights and gradient in, weights changed in place.

There is no `optimizer.step()`: a strategy calls a rule where its paper wants it, on the slice it owns. All operations
are element-wise, so cutting the parameters into slices changes nothing. Two kinds of decay go with every rule: `l2`
adds `l2 * w` to the gradient (it passes through momentum and normalisation), `weight_decay` is decoupled and takes
`learning_rate * weight_decay * w` off the weights directly (Loshchilov and Hutter 2019).

Legend: S floats of the slice. Slots are state tensors [S] that the strategy keeps.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt

from collectives.strategy import Rate

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Slots = dict[str, torch.Tensor]


class SGD:
    """w -= rate * g. Paper 002, equation (1)."""

    slots: tuple[str, ...] = ()

    def __init__(self, *, learning_rate: Positive, l2: NotNegative = 0.0, weight_decay: NotNegative = 0.0):
        self.learning_rate, self.l2, self.weight_decay = learning_rate, l2, weight_decay

    def __call__(self, weights: torch.Tensor, grad: torch.Tensor, slots: Slots, rate: Rate, updates: int) -> None:
        """One update.

        weights  [S], changed in place
        grad     [S], may be overwritten
        slots    name -> [S], changed in place
        rate     the learning rate now, and the epoch (0-based)
        updates  updates made before this one
        """
        if self.l2:
            grad.add_(weights, alpha=self.l2)
        if self.weight_decay:
            weights.mul_(1.0 - rate.learning_rate * self.weight_decay)
        self.apply(weights, grad, slots, rate, updates)

    def apply(self, weights: torch.Tensor, grad: torch.Tensor, slots: Slots, rate: Rate, updates: int) -> None:
        weights.add_(grad, alpha=-rate.learning_rate)


class Momentum(SGD):
    """m = momentum * m + g; w -= rate * m. With its own momentum in the first epoch."""

    slots = ("momentum",)

    def __init__(
        self,
        *,
        learning_rate: Positive,
        momentum: Fraction = 0.9,
        momentum_first_epoch: Annotated[float, Ge(-1), Lt(1)] = -1.0,
        l2: NotNegative = 0.0,
        weight_decay: NotNegative = 0.0,
    ):
        """momentum_first_epoch: the momentum in epoch 0; a negative value means `momentum` there too."""
        super().__init__(learning_rate=learning_rate, l2=l2, weight_decay=weight_decay)
        self.momentum = momentum
        self.momentum_first_epoch = momentum if momentum_first_epoch < 0 else momentum_first_epoch

    def momentum_in(self, epoch: int) -> float:
        return self.momentum if epoch else self.momentum_first_epoch

    def apply(self, weights: torch.Tensor, grad: torch.Tensor, slots: Slots, rate: Rate, updates: int) -> None:
        smoothed = slots["momentum"]
        torch.add(grad, smoothed, alpha=self.momentum_in(rate.epoch), out=smoothed)
        weights.add_(smoothed, alpha=-rate.learning_rate)


class Nesterov(Momentum):
    """m = momentum * m + g; w -= rate * (g + momentum * m). Sutskever et al. 2013, in the form of the gradient at w."""

    def apply(self, weights: torch.Tensor, grad: torch.Tensor, slots: Slots, rate: Rate, updates: int) -> None:
        momentum, smoothed = self.momentum_in(rate.epoch), slots["momentum"]
        torch.add(grad, smoothed, alpha=momentum, out=smoothed)
        weights.add_(grad.add_(smoothed, alpha=momentum), alpha=-rate.learning_rate)


class AdaGrad(SGD):
    """a += g^2; w -= rate * g / (sqrt(a) + epsilon). Duchi et al. 2011; paper 002, section 4."""

    slots = ("squares",)

    def __init__(
        self,
        *,
        learning_rate: Positive,
        epsilon: Positive = 1e-6,
        l2: NotNegative = 0.0,
        weight_decay: NotNegative = 0.0,
    ):
        super().__init__(learning_rate=learning_rate, l2=l2, weight_decay=weight_decay)
        self.epsilon = epsilon

    def apply(self, weights: torch.Tensor, grad: torch.Tensor, slots: Slots, rate: Rate, updates: int) -> None:
        squares = slots["squares"].addcmul_(grad, grad)
        weights.addcdiv_(grad, squares.sqrt().add_(self.epsilon), value=-rate.learning_rate)


class Adam(SGD):
    """Adam with bias correction. Kingma and Ba 2015, algorithm 1."""

    slots = ("mean", "squares")

    def __init__(
        self,
        *,
        learning_rate: Positive,
        beta1: Fraction = 0.9,
        beta2: Fraction = 0.999,
        epsilon: Positive = 1e-8,
        l2: NotNegative = 0.0,
        weight_decay: NotNegative = 0.0,
    ):
        super().__init__(learning_rate=learning_rate, l2=l2, weight_decay=weight_decay)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon

    def apply(self, weights: torch.Tensor, grad: torch.Tensor, slots: Slots, rate: Rate, updates: int) -> None:
        first, second = 1.0 - self.beta1 ** (updates + 1), 1.0 - self.beta2 ** (updates + 1)
        mean = slots["mean"].mul_(self.beta1).add_(grad, alpha=1.0 - self.beta1)
        squares = slots["squares"].mul_(self.beta2).addcmul_(grad, grad, value=1.0 - self.beta2)
        divisor = squares.sqrt().div_(math.sqrt(second)).add_(self.epsilon)
        weights.addcdiv_(mean, divisor, value=-rate.learning_rate / first)


class Adamax(Adam):
    """Adam with the infinity norm: u = max(beta2 * u, |g|). Kingma and Ba 2015, algorithm 2."""

    slots = ("mean", "largest")

    def apply(self, weights: torch.Tensor, grad: torch.Tensor, slots: Slots, rate: Rate, updates: int) -> None:
        first = 1.0 - self.beta1 ** (updates + 1)
        mean = slots["mean"].mul_(self.beta1).add_(grad, alpha=1.0 - self.beta1)
        largest = slots["largest"]
        torch.maximum(largest.mul_(self.beta2), grad.abs_(), out=largest)
        weights.addcdiv_(mean, largest + self.epsilon, value=-rate.learning_rate / first)
