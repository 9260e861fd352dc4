"""Training block by block: every split learns for a while by itself, then what all of them learned is joined.

A block is so many minibatches of every split. Each split starts from the global model, takes its share of the block
with an update rule of its own, and leaves how far its model went; these departures, weighted by what the split counted
in the block, are summed over all splits in their tree (`exchange.py`), and owners make the new global model of the sum,
in one pass over memory (`kernels/block.py`). A rank that holds several splits trains their models one after another, so
the number of ranks changes nothing. Source: paper 003, sections 2.1 and 2.2; paper 000, section 4 (master and slaves).

A split without data in a block departs nowhere and has no weight; a block that no split had data in changes nothing. A
validation ends a block early: what is judged has learned all that was shown. Without `validate.every` that is an
epoch's end; with it a block may span two epochs. The learning rate of a block is the one at its start.

Legend: P floats of the flat buffer, S floats that this rank owns, N splits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge

from collectives.comm import Comm
from collectives.exchange import Apply, Exchange
from collectives.layout import Layout
from collectives.leaves import Leaves
from collectives.plan import Plan
from collectives.strategy import Joined, Rate, Rule, State, Strategy, Weights
from kernels.block import BlockConstants, block_, depart_

CHANGE, AVERAGE, LOCAL = "block.change", "block.average.", "block.local."
WEIGHTS, COUNTED, MADE = "weights", "block.counted", "block.made"
LocalState = Literal["reset", "kept", "averaged"]


class Joining:
    """Sums over all splits of P floats that each of them leaves, block by block; a thin Exchange of one bucket.

    common  [P]: results, one buffer for an island's ranks on CPUs
    apply   makes a result of a part of the sum
    note    told of the exchange's parts, as `Strategy.note` is
    """

    def __init__(
        self, comm: Comm, size: int, device: torch.device, apply: Apply, note: Callable[[str, int, int], None]
    ):
        memory = comm.memory
        self.common = memory.common(size) if device.type == "cpu" else memory.zeros(size, device)
        self.layout = Layout(size, comm.islands, size)
        plan = Plan(Leaves(comm, size, device=device), memory.results(self.common), self.common, self.layout)
        self.exchange = Exchange(comm, self.common, plan, apply=apply, note=note)


class Blocks(Strategy):
    """What strategies that train by blocks have in common; they settle the constants of a block's update.

    block_steps  minibatches that every split takes in a block, tau in paper 003
    turn_steps   minibatches, of every split that a rank holds, after which a run can be stopped or checkpointed amid a
                 block; takes a model and the rule's state of every split. 0: at a block's end only
    local_state  the state of every split's update rule (its momentum) at a block's start: "reset", "kept" (its own;
                 takes room for every split's), or "averaged" over all splits
    """

    operational = ("turn_steps",)

    def __init__(
        self,
        comm: Comm,
        flat: Weights,
        rule: Rule,
        batch: float,
        *,
        block_steps: Annotated[int, Ge(1)],
        turn_steps: Annotated[int, Ge(0)] = 0,
        local_state: LocalState = "reset",
    ):
        super().__init__(comm, flat, rule, batch)
        self.block_steps, self.turn_steps, self.local_state = block_steps, turn_steps or block_steps, local_state
        self.scale = comm.n_splits / batch  # of a split's gradient sum: over what its minibatch counts
        device = flat.weights.device
        self.gradient = torch.zeros(flat.size, device=device)
        self.slots = {name: torch.zeros(flat.size, device=device) for name in rule.slots}
        self.joining = Joining(comm, flat.size, device, self._apply, lambda *part: self.note(*part))
        self.start, self.exchange = self.joining.common, self.joining.exchange
        self.averages = {
            name: Joining(comm, flat.size, device, self._averaged(name), self._noted(name))
            for name in (rule.slots if local_state == "averaged" else ())
        }
        self.pieces = self.joining.layout.owned(comm.rank)
        self.low, self.high = self.pieces[0] if self.pieces else (0, 0)
        self.weights, self.change = (torch.zeros(self.high - self.low, device=device) for _ in range(2))
        self.held: dict[int, dict[str, torch.Tensor]] = {}  # by split: its model and state, amid a block
        self.kept: dict[int, dict[str, torch.Tensor]] = {}  # by split: its rule's state between blocks
        self.counted, self.made = dict.fromkeys(comm.splits, 0), dict.fromkeys(comm.splits, 0)
        self.done = 0  # minibatches of this block
        self.since = self.taken = 0  # batches since the split's last update that had data, and all of them
        self.closing = False  # whether this turn ends the block
        self.block_rate = Rate(0.0, 0)  # of the block under way, whatever its turns
        self.constants = BlockConstants(0.0)
        self.weight = 0.0  # one over what all splits counted in the block

    def block_constants(self) -> BlockConstants:
        """Of the next block's update, its scale left open."""
        raise NotImplementedError

    # -- the turn ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        super().begin()
        self.start.copy_(self.flat.weights)
        self.weights.copy_(self.flat.weights[self.low : self.high])
        self.change.zero_()
        self.held, self.kept = {}, {}
        self.comm.barrier()  # who goes on from here must find all of the start, which neighbours fill in, too

    def span(self, limit: int) -> int:
        if not self.done:
            self.block_rate = self.rate
        turn = max(self.turn_steps - self.turn_steps % self.batches, self.batches)  # whole updates
        n = min(limit, self.block_steps - self.done, turn)
        self.closing = n == limit or self.done + n == self.block_steps
        return n

    def enter(self, split: int) -> None:
        self.flat.bind_grads(self.gradient.zero_())
        held = self.held.pop(split, None)
        self.flat.weights.copy_(self.start if held is None else held[WEIGHTS])
        if not self.done:
            self.counted[split] = 0
        if held is None:
            held = self._local_state(split)
        for name, slot in self.slots.items():
            slot.copy_(held[name]) if name in held else slot.zero_()

    def _local_state(self, split: int) -> dict[str, torch.Tensor]:
        """Of a split's rule at a block's start."""
        if self.local_state == "reset":
            self.made[split] = 0
            return {}
        if self.local_state == "kept":
            return self.kept.get(split, {})
        return {name: joining.common for name, joining in self.averages.items()}

    def step(self, split: int, count: int) -> None:
        self.counted[split] += count
        self.since += count > 0
        self.taken += 1
        if self.taken == self.batches:  # whether some were empty or not: where a turn ends must change nothing
            self._learn_the_rest(split)

    def _learn(self, split: int) -> None:
        """The split's own update."""
        scale = self.scale / self.since
        finite = self.rule(self.flat.weights, self.gradient, self.slots, self.block_rate, self.made[split], scale)
        if not finite:
            arrays = [("the gradient", self.gradient)]
            arrays += [(f"the update rule's {name}", slot) for name, slot in self.slots.items()]
            self.fail_at(0, f"split {split}", arrays, "numbers overflow")
        self.made[split] += 1
        self.gradient.zero_()

    def _learn_the_rest(self, split: int) -> None:
        """From the batches since the last update, if there was anything in them."""
        if self.since:
            self._learn(split)
        self.since = self.taken = 0

    def leave(self, split: int) -> None:
        self._learn_the_rest(split)
        if not self.closing:
            self.held[split] = {WEIGHTS: self.flat.weights.clone(), **self._copied_slots()}
            return
        with self.phase("exchange"):
            self._depart(split)

    def _depart(self, split: int) -> None:
        """At a block's end: how far the split's model went, and its rule's state, to where they are summed."""
        if self.local_state == "kept":
            self.kept[split] = self._copied_slots()
        count = self.counted[split]
        leaf = self.exchange.enter(split)
        if count:
            depart_(self.flat.weights, self.start, float(count), leaf)
        self.exchange.stepped(split, count)
        for name, joining in self.averages.items():
            leaf = joining.exchange.enter(split)
            if count:
                torch.mul(self.slots[name], float(count), out=leaf)
            joining.exchange.stepped(split, count)

    def _copied_slots(self) -> dict[str, torch.Tensor]:
        return {name: slot.clone() for name, slot in self.slots.items()}

    def advance(self, n: int) -> None:
        self.done += n
        if not self.closing:
            return
        mine = [[found[split] for split in self.comm.splits] for found in (self.counted, self.made)]
        everyones = self.comm.all_values(np.array(mine).ravel()).reshape(self.comm.size, 2, -1)
        total = everyones[:, 0].sum()
        if self.local_state == "averaged":  # state that all have in common has had as many updates
            self.made = dict.fromkeys(self.comm.splits, int(everyones[:, 1].max()))
        self.weight = 1.0 / total if total else 0.0
        self.constants = self.block_constants()._replace(scale=self.weight)
        self.updates += self.exchange.finish()
        for joining in self.averages.values():
            joining.exchange.finish()
        self.done = 0

    def _apply(self, total: torch.Tensor, low: int) -> None:
        """A part of the new global model, and of where the next block starts."""
        mine = slice(low - self.low, low - self.low + len(total))
        start = self.start[low : low + len(total)]
        if not block_(total, self.weights[mine], self.change[mine], start, self.constants):
            arrays = [("what the splits departed by", total), ("the change of the global model", self.change[mine])]
            self.fail_at(low, "a block's update", arrays, "numbers overflow")

    def _noted(self, name: str) -> Callable[[str, int, int], None]:
        return lambda part, begin, end: self.note(f"{name} {part}", begin, end)

    def _averaged(self, name: str) -> Apply:
        def apply(total: torch.Tensor, low: int) -> None:
            torch.mul(total, self.weight, out=self.averages[name].common[low : low + len(total)])

        return apply

    def end(self) -> None:
        """The model becomes the global one, W(t); splits start from elsewhere (equation (6))."""
        self.flat.weights[self.low : self.high].copy_(self.weights)
        self.comm.spread_(self.flat.weights, [self.joining.layout.owned(rank) for rank in range(self.comm.size)])

    def waiting_for(self) -> str:
        exchanges = [self.exchange, *(joining.exchange for joining in self.averages.values())]
        return "; ".join(filter(None, (exchange.waiting_for() for exchange in exchanges)))

    # -- state ------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        self.end()
        slices = {CHANGE: self.change}
        for name, joining in self.averages.items():
            slices[AVERAGE + name] = joining.common[self.low : self.high]
        splits: dict[int, dict[str, torch.Tensor]] = {}
        for split in self.comm.splits:
            held = self.held.get(split) or self.kept.get(split, {})
            splits[split] = {LOCAL + name: values for name, values in held.items()}
            splits[split] |= {COUNTED: torch.tensor([self.counted[split]]), MADE: torch.tensor([self.made[split]])}
        common = {"updates": self.updates, "done": self.done, "rate": list(self.block_rate)}
        return State(self.pieces, slices, splits, common)

    def restore(self, joined: Joined) -> None:
        joined.weights_into(self.flat.weights)
        self.updates, self.done = joined.common["updates"], joined.common["done"]
        self.block_rate = Rate(*joined.common["rate"])
        self.weights.copy_(self.flat.weights[self.low : self.high])
        if self.low < self.high:
            self.change.copy_(joined.slice(CHANGE, self.low, self.high))
            mine = self.start[self.low : self.high]
            mine.copy_(self.change).mul_(self.block_constants().ahead).add_(self.weights)  # as `block_` rounds it
            for name, joining in self.averages.items():
                joining.common[self.low : self.high].copy_(joined.slice(AVERAGE + name, self.low, self.high))
        everyones = [self.joining.layout.owned(rank) for rank in range(self.comm.size)]
        for common in (self.start, *(joining.common for joining in self.averages.values())):
            self.comm.spread_(common, everyones)
        self.held, self.kept = {}, {}
        for split in self.comm.splits:
            found = dict(joined.split(split))
            self.counted[split], self.made[split] = int(found.pop(COUNTED)), int(found.pop(MADE))
            device = self.flat.weights.device
            held = {name.removeprefix(LOCAL): values.to(device) for name, values in found.items()}
            if held:
                (self.held if WEIGHTS in held else self.kept)[split] = held
