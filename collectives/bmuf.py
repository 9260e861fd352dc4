"""Blockwise model-update filtering: models are averaged block by block, and the averages' updates are smoothed.

Source: paper 003, section 2.1.3. With W(t) the global model, W_g(t) where splits start from, and W_bar(t) the average
of the splits' models after block t:

    G(t) = W_bar(t) - W_g(t-1)                                              (2)
    Delta(t) = eta Delta(t-1) + zeta G(t)                                   (3)
    W(t) = W(t-1) + Delta(t)                                                (4)
    W_g(t) = W(t)                      under classical block momentum       (5)
    W_g(t) = W(t) + eta Delta(t)       under Nesterov block momentum        (6)

What is judged, saved and shipped is W(t), never W_g(t). eta = 0 and zeta = 1 is model averaging.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from collectives.blocks import Blocks, LocalState
from collectives.comm import Comm
from collectives.strategy import Rule, Weights
from kernels.block import BlockConstants

C = 1.1  # "a constant slightly larger than 1", paper 003, equation (10)


def block_momentum_of(splits: int, block_learning_rate: float = 1.0) -> float:
    """eta of equation (10), zeta / (N (1 - eta)) = C.

    >>> [round(block_momentum_of(n), 3) for n in (8, 16, 32, 64)]
    [0.886, 0.943, 0.972, 0.986]
    """
    return max(0.0, 1.0 - block_learning_rate / (C * splits))


class BMUF(Blocks):
    """Block training with filtered updates of the global model.

    scheme               "nesterov" (NBM), "classical" (CBM), or "averaging" (MA: no block momentum)
    block_momentum       eta; -1: equation (10) with C = 1.1, 1 - zeta / (1.1 N) for N splits
    block_learning_rate  zeta
    block_steps, turn_steps, local_state  as `Blocks` has them
    """

    def __init__(
        self,
        comm: Comm,
        flat: Weights,
        rule: Rule,
        batch: float,
        *,
        block_steps: Annotated[int, Ge(1)],
        scheme: Literal["nesterov", "classical", "averaging"] = "nesterov",
        block_momentum: Annotated[float, Ge(-1), Lt(1)] = -1.0,
        block_learning_rate: Annotated[float, Gt(0)] = 1.0,
        turn_steps: Annotated[int, Ge(0)] = 0,
        local_state: LocalState = "reset",
    ):
        super().__init__(
            comm, flat, rule, batch, block_steps=block_steps, turn_steps=turn_steps, local_state=local_state
        )
        if scheme == "averaging":
            block_momentum = 0.0
        elif block_momentum < 0:
            block_momentum = block_momentum_of(comm.n_splits, block_learning_rate)
        self.scheme, self.block_momentum, self.block_learning_rate = scheme, block_momentum, block_learning_rate

    @staticmethod
    def check(**options: Any) -> None:
        if -1 < options["block_momentum"] < 0:
            raise ValueError(
                f"strategy.block_momentum = {options['block_momentum']}: expected 0 or more and less than 1, or -1, "
                "from the number of splits"
            )
        if options["scheme"] == "averaging" and options["block_momentum"] > 0:
            raise ValueError(
                f"strategy.block_momentum = {options['block_momentum']} goes with strategy.scheme 'nesterov' or "
                "'classical'; model averaging has none"
            )

    def block_constants(self) -> BlockConstants:
        ahead = self.block_momentum if self.scheme == "nesterov" else 0.0
        return BlockConstants(0.0, self.block_momentum, self.block_learning_rate, 1.0, ahead)

    def doubt(self, steps: int) -> str:
        blocks, wanted = steps // self.block_steps, math.ceil(3 / (1 - self.block_momentum))
        if not self.block_momentum or blocks >= wanted:
            return ""
        return (
            f"{blocks} blocks in all, and block momentum {self.block_momentum:.3g} wants 3 / (1 - "
            f"{self.block_momentum:.3g}) = {wanted}: train longer, or lower strategy.block_steps or block_momentum"
        )

    def prepare(self, remembered: dict[str, Any] | None = None) -> dict[str, Any]:
        how = {"nesterov": "Nesterov block momentum", "classical": "classical block momentum"}.get(self.scheme)
        momentum = f"{how} {self.block_momentum:.3g}, " if how else "models averaged, "
        said = f"every {self.block_steps} minibatches of {self.comm.n_splits} splits, {momentum}"
        return {"said": f"{said}block learning rate {self.block_learning_rate:g}"}
