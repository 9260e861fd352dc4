"""Elastic averaging SGD: every split keeps a model of its own, which a spring pulls to a common centre and it to them.

The intra-block alternative that paper 003, section 2.1.2, names: "an elastic forced problem, it can be solved by an
elastic averaging SGD (EASGD) method [36]". Source: Zhang, Choromanska and LeCun 2015, the synchronous form. With x_i
the model of split i, x the centre, N splits and beta the moving rate, every block_steps minibatches:

    x_i <- x_i - (beta / N) (x_i - x)          x <- x + beta (mean of all x_i - x)

both with x as it was before, the mean weighted by what the splits counted; one that had no data neither pulls nor is
pulled. What is judged, saved and shipped is the centre. Momentum and the like stay a split's own.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le

from collectives.blocks import WEIGHTS, Blocks
from collectives.comm import Comm
from collectives.strategy import Rule, Weights
from kernels.block import BlockConstants


class Elastic(Blocks):
    """Block training without a common start.

    moving_rate  beta: the part of the way to the mean that the centre goes, and N times what a split comes to meet it
    block_steps, turn_steps  as `Blocks` has them

    Takes a model and the rule's state of every split that a rank holds.
    """

    def __init__(
        self,
        comm: Comm,
        flat: Weights,
        rule: Rule,
        batch: float,
        *,
        block_steps: Annotated[int, Ge(1)],
        moving_rate: Annotated[float, Gt(0), Le(1)] = 0.9,
        turn_steps: Annotated[int, Ge(0)] = 0,
    ):
        super().__init__(comm, flat, rule, batch, block_steps=block_steps, turn_steps=turn_steps)
        self.moving_rate = moving_rate

    def block_constants(self) -> BlockConstants:
        return BlockConstants(0.0, rate=self.moving_rate)

    def leave(self, split: int) -> None:
        if not self.closing:
            super().leave(split)
            return
        self._learn_the_rest(split)
        pull = self.moving_rate / self.comm.n_splits if self.counted[split] else 0.0
        own = torch.lerp(self.flat.weights, self.start, pull)  # before the centre moves
        super().leave(split)
        self.held[split] = {WEIGHTS: own, **self._copied_slots()}

    def prepare(self, remembered: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"said": f"every {self.block_steps} minibatches of {self.comm.n_splits} splits, elastic averaging with "
                        f"moving rate {self.moving_rate:g}"}
