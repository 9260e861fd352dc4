"""Update rules: what recipes call them, and which constants of this update go into `kernels.update`.

There is no `optimizer.step()`: a strategy calls a rule where its paper wants it, on the slice it owns. All operations
are element-wise, so cutting the parameters into slices changes nothing. Two kinds of decay go with every rule: `l2`
adds `l2 * w` to the gradient (it passes through momentum and normalisation), `weight_decay` is decoupled and takes
`learning_rate * weight_decay * w` off the weights directly (Loshchilov and Hutter 2019).

Legend: S floats of the slice. Slots are state tensors [S] that the strategy keeps.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt

from collectives.strategy import Rate
from kernels.update import Constants, update_

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Slots = dict[str, torch.Tensor]


class SGD:
    """w -= rate * g. Paper 002, equation (1)."""

    slots: tuple[str, ...] = ()
    kernel = "sgd"

    def __init__(self, *, learning_rate: Positive, l2: NotNegative = 0.0, weight_decay: NotNegative = 0.0):
        self.learning_rate, self.l2, self.weight_decay = learning_rate, l2, weight_decay

    def __call__(
        self, weights: torch.Tensor, grad: torch.Tensor, slots: Slots, rate: Rate, updates: int, scale: float = 1.0
    ) -> bool:
        """One update; returns whether all of the gradient, and of the slots after it, is finite.

        weights  [S], changed in place
        grad     [S]
        slots    name -> [S], changed in place
        rate     the learning rate now, and the epoch (0-based)
        updates  updates made before this one
        scale    the gradient is multiplied by it first
        """
        decay = 1.0 - rate.learning_rate * self.weight_decay
        constants = Constants(scale=scale, l2=self.l2, keep=decay, rate=rate.learning_rate)
        held = [slots[name] for name in self.slots]
        return update_(self.kernel, weights, grad, held, constants._replace(**self.constants(rate, updates)))

    def constants(self, rate: Rate, updates: int) -> dict[str, float]:
        """The rule's own constants for this update."""
        return {}


class Momentum(SGD):
    """m = momentum * m + g; w -= rate * m. With its own momentum in the first epoch."""

    slots: tuple[str, ...] = ("momentum",)
    kernel = "momentum"

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

    def constants(self, rate: Rate, updates: int) -> dict[str, float]:
        return {"momentum": self.momentum_in(rate.epoch)}


class Nesterov(Momentum):
    """m = momentum * m + g; w -= rate * (g + momentum * m). Sutskever et al. 2013, in the form of the gradient at w."""

    kernel = "nesterov"


class AdaGrad(Momentum):
    """a += g^2; w -= rate * g / (sqrt(a) + epsilon). Duchi et al. 2011; with momentum, paper 002, sections 4 and 5.3.

    On the raw gradient, before momentum:  a += g^2;  m = momentum * m + g / (sqrt(a) + epsilon);  w -= rate * m
    On the smoothed one, after momentum:   m = momentum * m + g;  a += m^2;  w -= rate * m / (sqrt(a) + epsilon)
    """

    def __init__(
        self,
        *,
        learning_rate: Positive,
        momentum: Fraction = 0.0,
        momentum_first_epoch: Annotated[float, Ge(-1), Lt(1)] = -1.0,
        placement: Literal["before", "after"] = "before",
        epsilon: Positive = 1e-6,
        l2: NotNegative = 0.0,
        weight_decay: NotNegative = 0.0,
    ):
        """momentum, momentum_first_epoch: as `Momentum` has them; where both are 0 there is no state for them
        placement  "before": AdaGrad, then momentum (the paper's better one); "after": momentum, then AdaGrad

        Raises ValueError for a placement after a momentum that is not there.
        """
        super().__init__(
            learning_rate=learning_rate, momentum=momentum, momentum_first_epoch=momentum_first_epoch, l2=l2,
            weight_decay=weight_decay,
        )
        self.epsilon = epsilon
        if self.momentum or self.momentum_first_epoch:
            self.slots = ("squares", "momentum")
            self.kernel = "adagrad_momentum" if placement == "before" else "momentum_adagrad"
        elif placement == "before":
            self.slots, self.kernel = ("squares",), "adagrad"
        else:
            raise ValueError(
                "optim.placement = 'after' applies AdaGrad to the gradient that momentum smoothed, and optim.momentum "
                "is 0; set optim.momentum (0.9, say), or leave placement out"
            )

    def constants(self, rate: Rate, updates: int) -> dict[str, float]:
        return super().constants(rate, updates) | {"epsilon": self.epsilon}


class Adam(SGD):
    """Adam with bias correction. Kingma and Ba 2015, algorithm 1."""

    slots = ("mean", "squares")
    kernel = "adam"

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

    def constants(self, rate: Rate, updates: int) -> dict[str, float]:
        first, second = 1.0 - self.beta1 ** (updates + 1), 1.0 - self.beta2 ** (updates + 1)
        return self.means() | {"rate": rate.learning_rate / first, "correction2": 1.0 / math.sqrt(second)}

    def means(self) -> dict[str, float]:
        beta1, beta2 = self.beta1, self.beta2
        return {
            "momentum": beta1, "fresh": 1.0 - beta1, "beta2": beta2, "fresh2": 1.0 - beta2, "epsilon": self.epsilon
        }


class Adamax(Adam):
    """Adam with the infinity norm: u = max(beta2 * u, |g|). Kingma and Ba 2015, algorithm 2."""

    slots = ("mean", "largest")
    kernel = "adamax"

    def constants(self, rate: Rate, updates: int) -> dict[str, float]:
        return self.means() | {"rate": rate.learning_rate / (1.0 - self.beta1 ** (updates + 1))}
