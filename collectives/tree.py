"""The fixed binary tree over splits in which every sum of Trireme is taken.

The node of splits [low, high) is the sum of its two halves, cut at the largest power of two below its length. Which
rank adds what never changes which numbers are added to which: that is what makes sums, and so models, bit-identical for
every number of ranks. Design, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

Node = tuple[int, int]
Value = TypeVar("Value")


def cut(node: Node) -> int:
    """Where a node of two or more splits is halved.

    >>> cut((0, 6)), cut((4, 6)), cut((0, 4))
    (4, 5, 2)
    """
    low, high = node
    return low + (1 << (high - low - 1).bit_length() - 1)


def nodes_within(held: range, node: Node) -> list[Node]:
    """The largest nodes below `node` whose splits are all held, ascending: the partial sums a rank can form alone.

    >>> nodes_within(range(3, 6), (0, 6))
    [(3, 4), (4, 6)]
    """
    low, high = node
    if held.start <= low and high <= held.stop:
        return [node]
    if high <= held.start or held.stop <= low:
        return []
    middle = cut(node)
    return nodes_within(held, (low, middle)) + nodes_within(held, (middle, high))


def combine(node: Node, parts: Mapping[Node, Value], add: Callable[[Value, Value], Value]) -> Value:
    """The node's sum from partial sums of nodes below it; `add(left, right)` may overwrite left."""
    if node in parts:
        return parts[node]
    middle = cut(node)
    return add(combine((node[0], middle), parts, add), combine((middle, node[1]), parts, add))


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
