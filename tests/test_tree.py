"""The tree over splits: however the splits are dealt, the same numbers are added to the same numbers."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as some

from collectives import tree


def test_its_examples():
    assert doctest.testmod(tree).failed == 0


def whole(node):
    """The tree as text, without any dealing: the reference."""
    low, high = node
    if high - low == 1:
        return str(low)
    middle = next(m for m in range(high - 1, low, -1) if (m - low) & (m - low - 1) == 0)  # largest power of two below
    return f"({whole((low, middle))}+{whole((middle, high))})"


@given(some.integers(1, 40), some.data())
def test_every_dealing_gives_the_same_sum_in_the_same_order(splits, data):
    ranks = data.draw(some.sampled_from([k for k in range(1, splits + 1) if splits % k == 0]))
    held = [range(r * splits // ranks, (r + 1) * splits // ranks) for r in range(ranks)]
    parts = {node: whole(node) for h in held for node in tree.nodes_within(h, (0, splits))}
    assert sorted(s for low, high in parts for s in range(low, high)) == list(range(splits))
    names = list(parts.values())
    stack = []
    for step in tree.program((0, splits), {node: k for k, node in enumerate(parts)}, -1):
        right = stack.pop() if step < 0 else ""
        stack.append(names[step] if step >= 0 else f"({stack.pop()}+{right})")
    assert stack == [whole((0, splits))]


@given(some.integers(1, 30), some.integers(0, 30), some.integers(0, 30))
def test_is_node_knows_the_nodes(splits, low, high):
    def nodes(node):
        yield node
        if node[1] - node[0] > 1:
            middle = tree.cut(node)
            yield from nodes((node[0], middle))
            yield from nodes((middle, node[1]))

    if low < high <= splits:
        assert tree.is_node((low, high), (0, splits)) == ((low, high) in set(nodes((0, splits))))


@pytest.mark.parametrize(("splits", "ranks", "partials"), [(4, 2, 1), (4, 4, 1), (6, 2, 2), (12, 3, 1), (12, 6, 1)])
def test_powers_of_two_cost_one_partial_a_rank(splits, ranks, partials):
    share = splits // ranks
    counts = [len(tree.nodes_within(range(r * share, (r + 1) * share), (0, splits))) for r in range(ranks)]
    assert max(counts) == partials
