"""The gradient buffers of an island's ranks: the leaves of the tree over splits that sums are taken of.

Legend: P floats of the flat buffer.
"""

from __future__ import annotations

import torch

from collectives.comm import Comm
from collectives.memory import CPU
from collectives.tree import Node, Step, counting

WIRES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Leaves:
    """The buffers that this rank's splits add their gradients into, and its neighbours', which all of them see.

    comm    the ranks and their splits
    size    P
    wire    a name of WIRES: what values are rounded to wherever they may cross between islands. Every node of the tree
            but the whole sum is rounded, whether it crosses or not: so the number of islands changes nothing.
    device  where the buffers are

    A rank that holds one split has one buffer; more splits take one more for every level of the tree.
    """

    def __init__(self, comm: Comm, size: int, wire: str = "float32", device: torch.device = CPU):
        self.comm, self.size, self.wire = comm, size, WIRES[wire]
        self.root: Node = (0, comm.n_splits)
        counted = [counting(comm.splits_of(rank), self.root) for rank in range(comm.size)]
        self.steps: dict[int, Step] = {step.split: step for step in counted[comm.rank][0]}
        self._held = {rank: counted[rank][1] for rank in comm.neighbours}
        levels = max(step.buffer + 1 for steps, _ in counted for step in steps)
        self._windows = [comm.memory.window(size, device) for _ in range(levels)]
        mine = comm.neighbours.index(comm.rank)
        self.mine = [window[mine] for window in self._windows]

    @property
    def first(self) -> torch.Tensor:
        """The island's first buffer [P], seen by all its ranks: where a sum may be taken in place, on one island."""
        return self._windows[0][0]

    def add_(self, into: int, added: int) -> None:
        """Add one of this rank's buffers to another, as a node of the tree."""
        left, right = self.mine[into], self.mine[added]
        if self.wire is None:
            left.add_(right)
        else:
            torch.add(left.to(self.wire).float(), right.to(self.wire).float(), out=left)

    def near(self, low: int, high: int) -> dict[Node, torch.Tensor]:
        """Floats [low, high) of the partial sums that the ranks of this island hold after all their splits."""
        return {
            node: self._windows[buffer][k][low:high]
            for k, rank in enumerate(self.comm.neighbours) for node, buffer in self._held[rank]
        }
