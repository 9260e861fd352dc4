"""What crosses between nodes in an exchange, to the byte: who owns what is cut as the strategies cut it.

Legend: P floats of the flat buffer, C columns, N splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from collectives.layout import Layout, cut_evenly
from collectives.packed import OneBit, cut_parts
from collectives.tree import nodes_within
from kernels.onebit import Columns

WIRES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a value

Islands = Sequence[Sequence[int]]  # the ranks that share memory, island by island


class Traffic(NamedTuple):
    """What leaves a node in one exchange, where it is most.

    reduce    bytes to the owners
    share     bytes of results
    messages  that one of its ranks sends
    """

    reduce: int
    share: int
    messages: int

    @property
    def total(self) -> int:
        return self.reduce + self.share


def islands_of(nodes: int, ranks: int) -> list[list[int]]:
    """So many nodes of so many ranks each."""
    return [list(range(node * ranks, (node + 1) * ranks)) for node in range(nodes)]


def packed_traffic(columns: Columns, size: int, islands: Islands, splits: int) -> Traffic:
    """Of gradients at a bit a value (`collectives/packed.py`): a packed row a split to every owner, one back.

    columns  of the flat buffer
    size     P
    splits   N, of all ranks
    """
    ranks = sum(map(len, islands))
    held = splits // ranks
    rows = [4 * max(part.packed, 1) for part in cut_parts(columns, size, ranks, OneBit())]
    whole, found = sum(rows), []
    for island in islands:
        own, others = sum(rows[rank] for rank in island), ranks - len(island)
        found.append(Traffic(len(island) * held * (whole - own), others * own, 2 * others))
    return max(found, key=lambda traffic: traffic.total)


def float32_traffic(layout: Layout, splits: int, wire: str = "float32") -> Traffic:
    """Of gradients as partial sums of a node's splits, and of new weights (`collectives/plan.py`, the owners' way).

    splits  N, of all ranks
    wire    a name of WIRES
    """
    islands, bytes_ = layout.islands, WIRES[wire]
    held, others = splits // sum(map(len, islands)), len(islands) - 1
    cuts = [cut_evenly(low, high, len(islands)) for low, high in layout.buckets]
    found = []
    for island, ranks in enumerate(islands):
        owned = sum(high - low for cut in cuts for low, high in [cut[island]])
        mine = {split for rank in ranks for split in range(rank * held, (rank + 1) * held)}
        sums = len(nodes_within(mine, (0, splits)))
        to_owners, back = sums * bytes_ * (layout.size - owned), others * bytes_ * owned
        found.append(Traffic(to_owners, back, others * len(cuts) * (sums + 1)))
    return max(found, key=lambda traffic: traffic.total)
