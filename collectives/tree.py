"""The fixed binary tree over splits in which every sum of Trireme is taken.

The node of splits [low, high) is the sum of its two halves, cut at the largest power of two below its length. Which
rank adds what never changes which numbers are added to which: that is what makes sums, and so models, bit-identical for
every number of ranks. Design, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

Node = tuple[int, int]


def cut(node: Node) -> int:
    """Where a node of two or more splits is halved.

    >>> cut((0, 6)), cut((4, 6)), cut((0, 4))
    (4, 5, 2)
    """
    low, high = node
    return low + (1 << (high - low - 1).bit_length() - 1)


def nodes_within(held: Collection[int], node: Node) -> list[Node]:
    """The largest nodes below `node` whose splits are all held, ascending: the partial sums that can be formed alone.

    >>> nodes_within(range(3, 6), (0, 6))
    [(3, 4), (4, 6)]
    """
    low, high = node
    if all(split in held for split in range(low, high)):
        return [node]
    if high - low == 1:
        return []
    middle = cut(node)
    return nodes_within(held, (low, middle)) + nodes_within(held, (middle, high))


def program(node: Node, leaves: Mapping[Node, int], add: int) -> list[int]:
    """How a node's sum is formed from numbered sums of nodes below it, in postfix order.

    >>> program((0, 3), {(0, 1): 0, (1, 2): 1, (2, 3): 2}, -1)
    [0, 1, -1, 2, -1]
    """
    if node in leaves:
        return [leaves[node]]
    middle = cut(node)
    return [*program((node[0], middle), leaves, add), *program((middle, node[1]), leaves, add), add]


class Step(NamedTuple):
    """What a rank does with one of its splits: the buffer its gradient goes into, and what is added up after it."""

    split: int
    buffer: int
    adds: list[tuple[int, int]]  # (into, from), buffers


def counting(splits: Sequence[int], root: Node) -> tuple[list[Step], list[tuple[Node, int]]]:
    """How a rank adds its splits one by one, as a binary counter does, and the nodes it then holds, with their buffers.

    The last split's gradient stays by itself, so that it can be handed over while it is still being computed.

    >>> counting(range(0, 3), (0, 6))
    ([Step(split=0, buffer=0, adds=[]), Step(split=1, buffer=1, adds=[(0, 1)]), Step(split=2, buffer=1, adds=[])], \
[((0, 2), 0), ((2, 3), 1)])
    """
    steps: list[Step] = []
    held: list[tuple[Node, int]] = []
    free: list[int] = []
    buffers = 0
    for split in splits:
        if not free:
            free, buffers = [buffers], buffers + 1
        held.append(((split, split + 1), free.pop()))
        step = Step(split, held[-1][1], [])
        while split != splits[-1] and len(held) > 1:
            (left, into), (right, added) = held[-2:]
            if left[1] != right[0] or not is_node((left[0], right[1]), root):
                break
            step.adds.append((into, added))
            free.append(added)
            held[-2:] = [((left[0], right[1]), into)]
        steps.append(step)
    return steps, held


def is_node(node: Node, root: Node) -> bool:
    """Whether [low, high) is a node of the tree below `root`."""
    while root != node:
        low, high = root
        if high - low <= 1:
            return False
        middle = cut(root)
        if node[1] <= middle:
            root = (low, middle)
        elif middle <= node[0]:
            root = (middle, high)
        else:
            return False
    return True
