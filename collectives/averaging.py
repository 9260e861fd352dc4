"""Master and slaves: splits train copies of the master's model by themselves, those that got worse are turned away.

Source: paper 000, section 4. Algorithm 3: a slave trains one epoch on its batch of the data from the master's model.
Algorithm 2: all slaves' models are averaged, but those whose log-likelihood on the validation set is "significantly
worse" than the master's are rejected, "log s < t x log p, where t = 1.1 is the tolerance parameter"; the loss here is
the negative mean, so the test reads loss_s > t loss_p. The master's update, with V its weights and V_a the average:

    V(t) = (1 - beta) V(t-1) + alpha (V_a - V(t-1))          (19)

alpha being the master's learning rate, beta its regularization. The batches of the data, 25 x 0.1 or 50 x 0.05 of it,
are `splits` and `data.draw`; the warm start is `init_from` a run of one epoch.

The average weighs slaves by what they counted, which is the same for all where they draw; the paper's is plain.

A slave that exploded, or whose loss is no number, is rejected like others. Every slave is judged by the rank that holds
it, over the whole validation set, so a verdict does not depend on the number of ranks. When all are rejected the master
stays, and the schedule is told, which halves the rate.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from collectives.blocks import Blocks
from collectives.comm import Comm
from collectives.strategy import Joined, Rule, State, Weights
from kernels.block import BlockConstants

EPOCH = 1 << 62  # minibatches: no block is as long, so a validation ends it


class MasterSlave(Blocks):
    """Block training whose splits are judged before they count.

    block_steps            minibatches of a slave between two updates of the master; 0: up to the next validation; with
                           validate.every = 0 an epoch of its draw, as the paper has it
    rejection              whether slaves are judged; without, one that is not finite stops the run
    tolerance              t: how many times the master's validation loss a slave's may be
    master_learning_rate   alpha
    master_regularization  beta; float32 weights do not notice less than 1e-7
    turn_steps             minibatches after which a run can be stopped or checkpointed amid a block, as `Blocks` has it

    Hidden state that is carried from batch to batch stays a slave's own from block to block, rejected or not; at an
    epoch's start there is none.
    """

    def __init__(
        self,
        comm: Comm,
        flat: Weights,
        rule: Rule,
        batch: float,
        *,
        block_steps: Annotated[int, Ge(0)] = 0,
        rejection: bool = True,
        tolerance: Annotated[float, Ge(1)] = 1.1,
        master_learning_rate: Annotated[float, Gt(0), Le(1)] = 0.1,
        master_regularization: Annotated[float, Ge(0), Lt(1)] = 1e-6,
        turn_steps: Annotated[int, Ge(0)] = 100,
    ):
        super().__init__(comm, flat, rule, batch, block_steps=block_steps or EPOCH, turn_steps=turn_steps)
        self.rejection, self.tolerance = rejection, tolerance
        self.master_learning_rate, self.master_regularization = master_learning_rate, master_regularization
        self.master_loss: float | None = None  # where the block under way started; None: to be found out
        self.learning = False  # whether a slave's model is entered
        self.verdicts: list[tuple[int, bool]] = []  # in this block, of this rank's splits: whether they are rejected
        # Since the last validation, over all ranks: how many were judged, and how often each split was rejected.
        self.judged, self.turned_away = 0, Counter[int]()

    def block_constants(self) -> BlockConstants:
        return BlockConstants(0.0, rate=self.master_learning_rate, keep=1.0 - self.master_regularization)

    def prepare(self, remembered: dict[str, Any] | None = None) -> dict[str, Any]:
        every = "validation" if self.block_steps == EPOCH else f"{self.block_steps} minibatches"
        turned = f"those above {self.tolerance:g} times its loss rejected" if self.rejection else "none rejected"
        return {"said": f"every {every} the master learns from {self.comm.n_splits} slaves, {turned}, learning rate "
                        f"{self.master_learning_rate:g}"}

    def span(self, limit: int) -> int:
        if self.rejection and self.master_loss is None:
            assert self.evaluate is not None
            self.flat.weights.copy_(self.start)  # the master, for there is no look-ahead
            with self.phase("judge"):
                self.master_loss = self.evaluate(False)["loss"]
        return super().span(limit)

    def begin(self) -> None:
        super().begin()
        self.master_loss = None

    def enter(self, split: int) -> None:
        super().enter(split)
        self.learning = True

    def fail(self, message: str) -> None:
        """A slave whose numbers are not finite is lost, and will be rejected; all else stops the run."""
        self.failed = True
        if self.rejection and self.learning:
            self.flat.weights.fill_(math.nan)
        else:
            super().fail(message)

    def leave(self, split: int) -> None:
        self._learn_the_rest(split)
        self.learning = False
        if self.closing and self.rejection and self.counted[split]:
            assert self.evaluate is not None and self.master_loss is not None
            with self.phase("judge"):
                loss = self.evaluate(True)["loss"]
            rejected = not loss <= self.tolerance * self.master_loss  # or no number at all
            self.verdicts.append((split, rejected))
            if rejected:
                self.failed = True
                self.counted[split] = 0  # a model without weight
        super().leave(split)

    def advance(self, n: int) -> None:
        super().advance(n)
        if self.closing and self.rejection:
            self.master_loss = None
            everyone = sorted((split, bad) for rank in self.comm.gather(self.verdicts) for split, bad in rank)
            self.judged += len(everyone)
            self.turned_away.update(split for split, bad in everyone if bad)
            self.verdicts = []

    def told(self, metrics: dict[str, float]) -> dict[str, Any]:
        if not self.rejection:
            return {}
        self.master_loss = metrics["loss"]  # a validation ends a block
        judged, rejected = self.judged, self.turned_away
        self.judged, self.turned_away = 0, Counter()
        times = {str(split): rejected[split] for split in sorted(rejected)}  # JSON has no other keys
        stayed = 0 < judged == rejected.total()
        said = f"{rejected.total()} of {judged} slaves rejected{': the master stays' if stayed else ''}"
        return {"slaves": judged, "rejected": times, "stayed": stayed, "said": said}

    # -- state ------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        state = super().state()
        state.common |= {
            "master_loss": self.master_loss, "judged": self.judged, "turned_away": sorted(self.turned_away.items()),
        }
        return state

    def restore(self, joined: Joined) -> None:
        super().restore(joined)
        self.master_loss = joined.common["master_loss"]
        self.judged, self.turned_away = joined.common["judged"], Counter(dict(joined.common["turned_away"]))
