"""Synchronous data-parallel SGD: every rank sums and updates its own pieces of the model, bucket by bucket.

Gradients are written by backward into memory that the ranks of a host share; the owner of a piece adds what its peers
hold of it in the fixed tree over splits, divides by the batch size, applies the update rule, and writes the new weights
where all of them read them (`exchange.py`). A bucket is exchanged and updated as soon as backward has filled it on all
ranks: its weights have done their part in this step by then. Source: paper 002, equations (1) and (2) and section 3.1
(the O(1) aggregation, here without quantization). Departure: the sum of equation (2) is divided by the recipe's batch
size N, so that the learning rate (the paper's epsilon times N) does not change with it.

Legend: P parameters (padded), S floats that this rank owns.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge

from collectives.choice import Candidate, candidates, choose, where_of
from collectives.comm import Comm
from collectives.exchange import Exchange
from collectives.layout import Layout
from collectives.leaves import Leaves
from collectives.nccl import Link, NcclExchange
from collectives.plan import Plan
from collectives.strategy import Joined, Rule, State, Strategy, Weights
from kernels import gpu

NORM_GROUP = 1024  # floats a group of the gradient norm; pieces end at multiples of it, whatever the ranks
MIB = 1 << 20


class AllReduce(Strategy):
    """Every step's gradient is the sum over all splits, and every rank continues from the same weights.

    clip_norm   the global gradient norm above which the gradient is scaled down to it; 0: never
    algorithm   how sums cross between hosts: "owners", "everyone" (short messages), "ring", "auto" (the fastest by a
                short measurement that keeps the same bits for any number of ranks), "fastest" (the ring too, which
                does not promise that), "nccl" (nor does NCCL; where it cannot be used: "auto")
    bucket_mib  MiB of gradient that are exchanged at a time; 0: by measurement
    wire        the type in which gradients and what weights grow by cross between hosts; sums are float32. The narrow
                ones round every partial sum, so they are part of what is learned
    overlap     whether buckets are exchanged while backward still runs: "on" (on a thread where there are several
                hosts), or "off"
    """

    shares_weights = True
    operational = ("bucket_mib", "overlap")
    remedy = "lower optim.learning_rate or set strategy.clip_norm"

    def __init__(
        self,
        comm: Comm,
        flat: Weights,
        rule: Rule,
        batch: float,
        *,
        clip_norm: Annotated[float, Ge(0)] = 0.0,
        algorithm: Literal["auto", "fastest", "owners", "everyone", "ring", "nccl"] = "auto",
        bucket_mib: Annotated[float, Ge(0)] = 0.0,
        wire: Literal["float32", "bfloat16", "float16"] = "float32",
        overlap: Literal["on", "off"] = "on",
    ):
        super().__init__(comm, flat, rule, batch)
        self.clip_norm = clip_norm
        self.asked = (algorithm, int(bucket_mib * MIB), wire)
        self.overlap = overlap == "on"
        if algorithm == "nccl" and wire != "float32":
            raise ValueError(f"strategy.algorithm = 'nccl' sends float32 only; got strategy.wire = '{wire}'")
        self.leaves = Leaves(comm, flat.size, wire, flat.weights.device)
        self.results = comm.memory.results(flat.weights)
        self.scale = 1.0 / batch
        self.filled: list[int] = []  # buckets in the order in which this rank's first backward filled them
        self.followed = False
        self.last = comm.splits[-1]
        self.watching = self.settled = False
        self.turn_batches = self.undone = 1  # of this turn; of those, how many this split has not learned yet

    def prepare(self, remembered: dict[str, Any] | None = None) -> dict[str, Any]:
        comm, (algorithm, bucket, wire) = self.comm, self.asked
        size = 4 * self.flat.size
        if algorithm == "nccl" and not comm.transport.nccl:
            algorithm = "auto"
        found = candidates(algorithm, bucket, size, len(comm.islands), comm.size)
        where = where_of(comm, size, wire, self.flat.weights.device) | {"transport": comm.transport.kind}
        self.link = self._linked() if algorithm == "nccl" else None
        choice, self.exchange = choose(comm, self._exchange, found, where, remembered)
        self.exchange.apply, self.exchange.note = self._apply, self._noted
        layout = self.exchange.plan.layout
        self.pieces = layout.owned(comm.rank)
        owned = sum(high - low for low, high in self.pieces)
        self.slots = {name: comm.memory.zeros(owned, self.flat.weights.device) for name in self.rule.slots}
        blocks = sorted(b.low for work in self.exchange.plan.work for own in work.own for b in own.blocks)
        self.places = {low: self._place(low) for low in blocks}  # of a block, where it begins in a slot
        self.needs = [self.flat.within(*bucket) for bucket in layout.buckets]
        self.buckets_of = [
            [b for b, needed in enumerate(self.needs) if number in needed] for number in range(len(self.flat.names))
        ]
        if self.overlap:
            self.flat.on_grad(self._grad_is_final)
        self.settled = True
        return choice.to_dict() | {"said": str(choice)}

    def sent(self) -> dict[str, int]:
        found = super().sent()
        wide = 4 // self.leaves.wire.itemsize if self.leaves.wire is not None else 0
        return found | {"float32": wide * (found["reduce"] + found["share"])}

    def _place(self, low: int) -> int:
        before = 0
        for first, last in self.pieces:
            if first <= low < last:
                return before + low - first
            before += last - first
        raise AssertionError(f"float {low} is not owned here")

    def _linked(self) -> Link:
        """All ranks, linked by NCCL (collective)."""
        name = self.comm.on_root(gpu.nccl_name)
        return gpu.NcclLink(self.comm.size, self.comm.rank, name, self.flat.weights.device)

    def _exchange(self, candidate: Candidate) -> Any:
        """An Exchange, or what does the same turns by NCCL (collective)."""
        comm = self.comm
        if self.link is not None:
            return NcclExchange(
                comm, self.flat.weights, self.leaves, candidate.bucket // 4, self.link,
                apply=lambda total, low: None, deferred=self.clip_norm > 0,
            )
        everyone = candidate.algorithm == "everyone"
        layout = Layout(self.flat.size, comm.islands, candidate.bucket // 4, everyone)
        plan = Plan(
            self.leaves, self.results, self.flat.weights, layout,
            algorithm="ring" if candidate.algorithm == "ring" else "owners",
            totals="kept" if self.clip_norm else "scratch",
        )
        return Exchange(
            comm, self.flat.weights, plan, apply=lambda total, low: None, deferred=self.clip_norm > 0,
            threaded=self.overlap and len(comm.islands) > 1 and comm.threads,
        )

    def _noted(self, name: str, begin_ns: int, end_ns: int) -> None:
        self.note(name, begin_ns, end_ns)

    # -- the turn ---------------------------------------------------------------------------------------------------

    def span(self, limit: int) -> int:
        self.turn_batches = min(limit, self.batches)
        return self.turn_batches

    def enter(self, split: int) -> None:
        self.flat.bind_grads(self.exchange.enter(split))
        self.undone, self.counted = self.turn_batches, 0
        if split == self.last:
            self.left = [len(needed) for needed in self.needs]
            self.seen = [False] * len(self.buckets_of)
            self.watching = self.overlap and self.undone == 1

    def _grad_is_final(self, parameter: int) -> None:
        """Told by backward; buckets that need nothing else set out now, if this is the turn's last backward."""
        if not self.watching:
            return
        if self.seen[parameter]:
            raise RuntimeError(
                f"parameter {self.flat.names[parameter]} got a second gradient in one backward, after the first was "
                "handed over; set strategy.overlap = 'off' for this model"
            )
        self.seen[parameter] = True
        for bucket in self.buckets_of[parameter]:
            self.left[bucket] -= 1
            if not self.left[bucket]:
                self.exchange.full(bucket)
                if not self.followed:
                    self.filled.append(bucket)
        if not self.exchange.threaded:
            self.exchange.poll()

    def step(self, split: int, count: int) -> None:
        self.undone -= 1
        self.counted += count
        self.watching = self.overlap and self.undone == 1 and split == self.last
        if not self.undone:
            self.exchange.stepped(split, self.counted)

    def advance(self, n: int) -> None:
        learned = self.exchange.finish()
        if self.clip_norm:
            self.scale = self._clipped() / self.batch
            learned = self.exchange.share()
        self.active_s = self.exchange.active_s
        self.updates += learned
        if learned and not self.followed:
            self._follow_backward()

    def _follow_backward(self) -> None:
        """From now on buckets set out in the order in which rank 0 filled them."""
        rest = [bucket for bucket in self.exchange.order if bucket not in self.filled]
        self.exchange.order = self.comm.on_root(lambda: self.filled + rest)
        self.followed = True

    def _apply(self, total: torch.Tensor, low: int) -> None:
        """New weights of the block that begins at `low`, from its gradient sum."""
        at = self.places[low]
        mine = slice(at, at + len(total))
        slots = {name: slot[mine] for name, slot in self.slots.items()}
        if not self.rule(
            self.flat.weights[low : low + len(total)], total, slots, self.rate, self.updates, self.scale
        ):
            self.fail_at(
                low, "the sum of all splits",
                [("the gradient", total), *((f"the update rule's {name}", slot) for name, slot in slots.items())],
                "numbers overflow",
            )

    def _clipped(self) -> float:
        """The factor that clips the mean gradient; its norm is summed in fixed groups (collective)."""
        mine = [block.total for work in self.exchange.plan.work for own in work.own for block in own.blocks]
        if self.exchange.plan.layout.everyone and self.comm.island:
            mine = []  # the first island has all groups
        squares = [total.view(-1, NORM_GROUP).double().square_().sum(1).cpu().numpy() for total in mine]
        everyone = self.comm.all_values(np.concatenate([np.empty(0), *squares]))
        # fsum is exact: no order to agree on. The norm is the mean gradient's, over all that the turn took.
        norm = math.sqrt(math.fsum(everyone.tolist())) / (self.batch * self.turn_batches)
        return min(1.0, self.clip_norm / norm if norm else 1.0)

    def waiting_for(self) -> str:
        return self.exchange.waiting_for() if self.settled else ""

    # -- state ------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        return State(pieces=self.pieces, slices=dict(self.slots), common={"updates": self.updates})

    def restore(self, joined: Joined) -> None:
        joined.weights_into(self.flat.weights)
        self.updates = joined.common["updates"]
        for name, slot in self.slots.items():
            at = 0
            for low, high in self.pieces:
                slot[at : at + high - low].copy_(joined.slice(name, low, high))
                at += high - low
