"""1-bit SGD: gradients quantized to one bit a value with error feedback, aggregated by owners, quantized again.

Every split's gradient and its residual are quantized column by column; owners add the splits up unquantized, in their
order, apply the update rule (AdaGrad, momentum), quantize what the weights are to grow by, with a residual of their
own, and send that to all ranks, which add it to their weights (`packed.py`). Source: paper 002, sections 2.2 to 4.

Departures. What the owner quantizes is the rule's change of the weights, learning rate included: a residual of it
then means the same before and after the rate is changed. Columns are rows of what torch stores, and vectors cross
exactly (`kernels/onebit.py`).
The cold start exchanges float32 on all ranks; the paper's runs on one node, which learns the same.

Legend: P floats of the flat buffer, S floats that this rank owns, N splits.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt

from collectives.comm import Comm
from collectives.packed import Block, Codec, Float32, OneBit, PackedExchange
from collectives.strategy import Joined, Rate, Rule, State, Strategy, Weights
from kernels import onebit
from kernels.onebit import Columns
from kernels.update import Constants, update_

RESIDUAL, PENDING, SQUARES = "onebit.residual", "onebit.pending", "onebit.squares"
OVERFLOW = "the sum over a column of a block that begins here overflows"


class Turn(NamedTuple):
    """What an owner needs to know of the turn that it makes an update for, by value: it may run on a thread."""

    rate: Rate
    updates: int
    scale: float


class OneBitSGD(Strategy):
    """Synchronous SGD whose gradients and updates cross as one bit a value.

    cold_start        what the loss counts, from the start of training, before quantization begins: until then values
                      cross as float32, every split's by themselves, and nothing is delayed. So a rank that holds n
                      splits sends n whole gradients a turn, and has room for as many more
    double_buffering  whether a minibatch is cut into halves, of which one is exchanged while the other is computed: on
                      a model that lacks the half before it. Paper 002, section 2.2
    error_feedback    whether what quantization leaves out is added to the next gradient; without, training goes wrong,
                      as it is there to show
    clip_norm         the norm above which a split's estimate of the mean gradient is scaled down to it, before it is
                      quantized; 0: never
    local_adagrad     whether every split's gradient is divided by the root of the sum of its squares so far, before it
                      is quantized (paper 002, section 4, the first of three places; for the other two: optim)
    adagrad_epsilon   added to that root
    """

    remedy = "lower optim.learning_rate or set strategy.clip_norm"

    def __init__(
        self,
        comm: Comm,
        flat: Weights,
        rule: Rule,
        batch: float,
        *,
        cold_start: Annotated[float, Ge(0), Lt(math.inf)] = 0.0,
        double_buffering: bool = False,
        error_feedback: bool = True,
        clip_norm: Annotated[float, Ge(0)] = 0.0,
        local_adagrad: bool = False,
        adagrad_epsilon: Annotated[float, Gt(0)] = 1e-6,
    ):
        if 0 < cold_start < 1:
            raise ValueError(
                f"strategy.cold_start = {cold_start} is no part of an epoch: it counts what the loss counts (frames, "
                "words), from the start of training; give a number of them"
            )
        super().__init__(comm, flat, rule, batch)
        self.halves = self.parts_of_a_batch(double_buffering=double_buffering)
        self.double_buffering, self.error_feedback = double_buffering, error_feedback
        self.clip_norm, self.local_adagrad, self.adagrad_epsilon = clip_norm, local_adagrad, adagrad_epsilon
        self.cold_batches = cold_start * self.halves / batch  # the loop's batches, of which a half is one
        self.taken = 0  # the loop's batches so far
        self.taking = self.halves  # in this turn
        self.columns = Columns.of(flat.shapes)
        self.exchanges = [self._exchange(OneBit(), k) for k in range(self.halves)]
        self.cold: PackedExchange | None = None
        self.exchange = self.exchanges[0]
        mine = self.exchange.mine
        self.low, self.high = mine.low, mine.high
        self.gradient = self._zeros(flat.size)
        self.residuals = {split: self._zeros(flat.size) for split in comm.splits} if error_feedback else {}
        self.squares = {split: self._zeros(flat.size) for split in comm.splits} if local_adagrad else {}
        self.normalised = self._zeros(flat.size if local_adagrad else 0)
        self.slices = {name: self._zeros(self.high - self.low) for name in (*rule.slots, *self._own_slices())}
        largest = max((block.high - block.low for block in mine.blocks), default=0)
        self.total, self.change = self._zeros(largest), self._zeros(largest)
        self.flying: PackedExchange | None = None  # what is on its way, or has landed and is not applied yet
        self.landed = False
        self.pending: torch.Tensor | None = None  # [P]: what a checkpoint found on its way, not applied yet
        self.turn = Turn(Rate(0.0, 0), 0, 1.0)
        self.beside = False

    @staticmethod
    def parts_of_a_batch(double_buffering: bool = False, **options: Any) -> int:
        return 2 if double_buffering else 1

    def prepare(self, remembered: dict[str, Any] | None = None) -> dict[str, Any]:
        first, again = self.traffic()
        said = f"a bit a value; to owners {first:.1f}, back {again:.1f} times fewer bytes than float32"
        if self.cold_batches:
            first = self.cold_batches * self.batch / self.halves
            said += f"; float32 for the first {first:,.0f} (frames, words: what the loss counts)"
        if self.double_buffering and not self.comm.threads:
            said += "; this MPI lets one thread call it only, so little of an exchange hides behind the next half batch"
        return {"said": said}

    def traffic(self) -> tuple[float, float]:
        """How many times fewer bytes a turn sends to the owners, and back from them, than float32 sums would.

        Of sums of quantized splits there is no 1-bit form: what goes to the owners grows with the splits a rank holds.
        """
        share = sum(part.high - part.low for part in self.exchange.parts)
        packed = sum(part.packed for part in self.exchange.parts)
        return share / (packed * len(self.comm.splits)), share / packed

    def _own_slices(self) -> tuple[str, ...]:
        return (RESIDUAL,) if self.error_feedback else ()

    def _zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, device=self.flat.weights.device)  # nobody else reads it

    def _exchange(self, codec: Codec, number: int) -> PackedExchange:
        return PackedExchange(
            self.comm, self.columns, self.flat.size, codec, self.flat.weights.device, 2 * number, self._make,
            lambda name, begin, end: self.note(name, begin, end),
        )

    # -- the turn ---------------------------------------------------------------------------------------------------

    def span(self, limit: int) -> int:
        is_cold = self.taken < self.cold_batches
        self.beside = self.double_buffering and not is_cold and not self.undelayed
        if self.cold is not None and not is_cold:
            self.cold.close()
        self.cold = (self.cold or self._exchange(Float32(), self.halves)) if is_cold else None
        self.exchange = self.cold or next(e for e in self.exchanges if e is not self.flying)
        self.taking = min(limit, self.batches * (1 if self.beside else self.halves))
        return self.taking

    def enter(self, split: int) -> None:
        self.flat.bind_grads(self.gradient.zero_())
        self.counted = 0

    def step(self, split: int, count: int) -> None:
        self.counted += count

    def leave(self, split: int) -> None:
        rows = self.exchange.rows(split)
        if not self.counted:
            for _, row in rows:
                onebit.empty_(row)
            return
        values, residuals = self._prepared(split), self.residuals.get(split)
        for block, row in rows:
            cut = slice(block.low, block.high)
            residual = None if residuals is None else residuals[cut]
            if not self.exchange.codec.pack_(values[cut], residual, block.columns, row):
                # What is left is not finite where the sum of a column of finite values is not.
                arrays = [("the gradient", values[cut])]
                if residual is not None:
                    arrays.append(("the gradient's sum over a column", residual))
                self.fail_at(block.low, f"split {split}", arrays, OVERFLOW)

    def _prepared(self, split: int) -> torch.Tensor:
        """The split's gradient [P], clipped or normalised as the options say."""
        values = self.gradient
        # Times the sum over a split: its estimate of the mean gradient.
        whole = self.comm.n_splits * self.halves / (self.batch * self.taking)
        if self.clip_norm:
            norm = float(torch.linalg.vector_norm(values, dtype=torch.float64)) * whole
            if norm > self.clip_norm:
                values.mul_(self.clip_norm / norm)
        if self.local_adagrad:
            constants = Constants(scale=whole, rate=-1.0, epsilon=self.adagrad_epsilon)
            squares = self.squares[split]
            if not update_("adagrad", self.normalised.zero_(), values, [squares], constants):
                arrays = [("the gradient", values), ("the sum of its squares", squares)]
                self.fail_at(0, f"split {split}", arrays, OVERFLOW)
            values = self.normalised
        return values

    def advance(self, n: int) -> None:
        self._land()
        self._apply()
        self.turn = Turn(self.rate, self.updates, 1.0 / (self.comm.n_splits if self.local_adagrad else self.batch))
        self.taken += n
        self.flying, self.landed = self.exchange, False
        self.float32_bytes += 8 * self.flat.size * (self.comm.size - 1) // self.comm.size
        self.flying.start(self.beside)
        if not self.beside:
            self.end()

    def end(self) -> None:
        self._land()
        self._apply()

    def _land(self) -> None:
        """Until the exchange that is on its way, if any, has all results here."""
        if self.flying is not None and not self.landed:
            self.updates += self.flying.complete()
            self.active_s += 0.0 if self.comm.alone else self.flying.took_s
            self.landed = True

    def _apply(self) -> None:
        """Add what landed to the weights: paper 002's fixed cost, the same on all ranks."""
        weights = self.flat.weights
        if self.flying is not None:
            for block, row in self.flying.landed():
                self.flying.codec.add_(weights[block.low : block.high], row, block.columns, fresh=False)
            self.flying = None
        if self.pending is not None:
            weights.add_(self.pending)
            self.pending = None

    def _make(self, codec: Codec, rows: torch.Tensor, block: Block, packed: torch.Tensor) -> None:
        """An owner's update of a block: the splits' sum, the rule, the change of the weights, packed."""
        if not rows[:, 0].any():
            return onebit.empty_(packed)
        size, mine = block.high - block.low, slice(block.low - self.low, block.high - self.low)
        weights = self.flat.weights[block.low : block.high]
        total, change = self.total[:size].zero_(), self.change[:size]
        codec.add_(total, rows, block.columns, fresh=True)
        change.copy_(weights)
        slots = {name: self.slices[name][mine] for name in self.rule.slots}
        finite = self.rule(change, total, slots, self.turn.rate, self.turn.updates, self.turn.scale)
        change.sub_(weights)
        residual = self.slices[RESIDUAL][mine] if self.error_feedback else None
        if not (codec.pack_(change, residual, block.columns, packed) and finite):
            arrays = [("the gradient", total), *((f"the update rule's {name}", slot) for name, slot in slots.items())]
            arrays.append(("the change of the weights", change))
            self.fail_at(block.low, "the sum of all splits", arrays, OVERFLOW)

    def waiting_for(self) -> str:
        waiting = self.flying.waiting if self.flying is not None else None
        return f"this rank waits for {waiting[1]} of {self.comm.name_of(waiting[0])}" if waiting else ""

    # -- state ------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        self._land()
        slices = dict(self.slices)
        if self.flying is not None:
            slices[PENDING] = self._zeros(self.high - self.low)
            for block, row in self.flying.landed():
                if self.low <= block.low and block.high <= self.high:
                    mine = slices[PENDING][block.low - self.low : block.high - self.low]
                    self.flying.codec.add_(mine, row, block.columns, fresh=True)
        elif self.pending is not None:
            slices[PENDING] = self.pending[self.low : self.high]
        splits: dict[int, dict[str, torch.Tensor]] = {split: {} for split in self.comm.splits}
        for name, held in ((RESIDUAL, self.residuals), (SQUARES, self.squares)):
            for split, values in held.items():
                splits[split][name] = values
        common = {"updates": self.updates, "taken": self.taken, "pending": PENDING in slices}
        return State([(self.low, self.high)] if self.low < self.high else [], slices, splits, common)

    def restore(self, joined: Joined) -> None:
        self._land()
        self.flying = self.pending = None
        joined.weights_into(self.flat.weights)
        self.updates, self.taken = joined.common["updates"], joined.common["taken"]
        if self.low < self.high:
            for name, values in self.slices.items():
                values.copy_(joined.slice(name, self.low, self.high))
        if joined.common["pending"]:
            self.pending = joined.slice(PENDING, 0, self.flat.size).to(self.flat.weights.device)
        for split in self.comm.splits:
            held = joined.split(split)
            for name, kept in ((RESIDUAL, self.residuals), (SQUARES, self.squares)):
                if split in kept:
                    kept[split].copy_(held[name])
