"""Synchronous data-parallel SGD: owner-sums reduce-scatter, update on the owner, all-gather of the weights.

Every rank is the owner of one slice of the parameters. It receives that slice of its peers' partial gradient sums,
adds them in the fixed tree over splits, divides by the batch size, applies the update rule to its slice, and the new
weights are gathered. Source: paper 002, equations (1) and (2) and section 3.1 (the O(1) aggregation, here without
quantization). Departure: the sum of equation (2) is divided by the recipe's batch size N, so that the learning rate
(the paper's epsilon times N) does not change with it.

Legend: P parameters (padded), S floats of this rank's slice, K ranks.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge

from collectives.comm import Comm
from collectives.strategy import Joined, Rule, State, Strategy, TrainingFailed, Weights
from collectives.tree import Node, combine, is_node, nodes_within

NORM_GROUP = 1024  # floats a group of the gradient norm; slices end at multiples of it, whatever the ranks


class AllReduce(Strategy):
    """Every step's gradient is the sum over all splits, and every rank continues from the same weights.

    clip_norm  the global gradient norm above which the gradient is scaled down to it; 0: never
    """

    def __init__(self, comm: Comm, flat: Weights, rule: Rule, batch: int, *, clip_norm: Annotated[float, Ge(0)] = 0.0):
        super().__init__(comm, flat, rule, batch)
        self.clip_norm = clip_norm
        self.updates = 0
        self.bounds = flat.bounds(comm.size)
        self.low, self.high = self.bounds[comm.rank], self.bounds[comm.rank + 1]
        self.slots = {name: self._zeros(self.high - self.low) for name in rule.slots}
        self.root: Node = (0, comm.n_splits)
        self.partials: list[tuple[Node, torch.Tensor]] = []  # a binary counter: one buffer a level of the tree
        self.free: list[torch.Tensor] = []
        self.inbox: dict[Node, torch.Tensor] = {}
        self.count = 0

    def _zeros(self, count: int) -> torch.Tensor:
        return self.comm.zeros(count, self.flat.weights.device)

    def enter(self, split: int) -> None:
        grads = self.free.pop() if self.free else self._zeros(self.flat.size)
        grads.zero_()
        self.flat.bind_grads(grads)
        self.partials.append(((split, split + 1), grads))

    def step(self, split: int, count: int) -> None:
        self.count += count
        while len(self.partials) > 1:
            (left, kept), (right, added) = self.partials[-2:]
            if left[1] != right[0] or not is_node((left[0], right[1]), self.root):
                break
            kept.add_(added)
            self.free.append(added)
            self.partials[-2:] = [((left[0], right[1]), kept)]

    def advance(self, n: int) -> None:
        count = int(self.comm.sum_counts(self.count))
        self.count = 0
        if count:
            mine = slice(self.low, self.high)
            grad = self._reduce_scatter()
            self._check(grad, count)
            grad.mul_(self._scale(grad))
            self.rule(self.flat.weights[mine], grad, self.slots, self.rate, self.updates)
            self.updates += 1
            self.comm.share_slices_(self.flat.weights, self.bounds)
        self.free += [buffer for _, buffer in self.partials]
        self.partials = []

    def _reduce_scatter(self) -> torch.Tensor:
        """This rank's slice [S] of the gradient sum over all splits, added in the fixed tree."""
        comm, bounds = self.comm, self.bounds
        peers = [k for k in range(comm.size) if k != comm.rank]
        sends = [(grads[bounds[k] : bounds[k + 1]], k) for k in peers for _, grads in self.partials]
        parts = {node: grads[self.low : self.high] for node, grads in self.partials}
        receives = []
        for k in peers:
            for node in nodes_within(comm.splits_of(k), self.root):
                if node not in self.inbox:
                    self.inbox[node] = self._zeros(self.high - self.low)
                receives.append((self.inbox[node], k))
                parts[node] = self.inbox[node]
        comm.exchange(sends, receives)
        return combine(self.root, parts, torch.Tensor.add_)

    def _scale(self, grad: torch.Tensor) -> float:
        """What turns the sum into the clipped mean; the norm is summed in fixed groups (collective)."""
        if not self.clip_norm:
            return 1.0 / self.batch
        groups = np.zeros(self.flat.size // NORM_GROUP)
        edges = [b // NORM_GROUP for b in self.bounds]
        squares = grad.view(-1, NORM_GROUP).double().square_().sum(1)
        groups[edges[self.comm.rank] : edges[self.comm.rank + 1]] = squares.cpu().numpy()
        whole = torch.from_numpy(groups)
        self.comm.share_slices_(whole, edges)
        norm = math.sqrt(math.fsum(whole.tolist())) / self.batch  # fsum is exact: no order to agree on
        return min(1.0, self.clip_norm / norm if norm else 1.0) / self.batch

    def _check(self, grad: torch.Tensor, count: int) -> None:
        """Raise TrainingFailed if the summed gradient is not finite, naming the parameter."""
        if not torch.isfinite(grad.sum()):
            bad = torch.nonzero(~torch.isfinite(grad))
            where = self.flat.name_at(self.low + int(bad[0])) if len(bad) else "the sum over parameters"
            raise TrainingFailed(
                f"the gradient is not finite at update {self.updates} (rank {self.comm.rank}, parameter {where}, "
                f"{len(bad)} values, {count} frames); lower optim.learning_rate or set strategy.clip_norm"
            )

    def state(self) -> State:
        return State(low=self.low, slices=dict(self.slots), common={"updates": self.updates})

    def restore(self, joined: Joined) -> None:
        joined.weights_into(self.flat.weights)
        self.updates = joined.common["updates"]
        for name, slot in self.slots.items():
            slot.copy_(joined.slice(name, self.low, self.high))
