"""What PowerSGD would cost instead: gradients sent as products of two thin matrices, as torch's DDP hook does it.

Trireme does not have it, but a plan that sets 1-bit beside float32 alone would flatter it: PowerSGD sends fewer bytes.
It is taken at its best: a link is never waited for longer than its bytes take, and all ranks sum at once.

Source: Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization"
(2019), algorithm 1. As in torch 2: a matrix whose factors have less than half of its values is factored, all else is
summed as it is, together with the first factors.

Legend: M [m, n] a matrix's gradient plus what was left of those before, r the rank, M ~ P Q^T, P [m, r], Q [n, r].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from hpc.planning.model import Costs, Link, Setting, Step
from hpc.planning.traffic import Traffic

LOW_RANKS = (1, 4)
LEAST_RATE = 2  # a matrix is factored where its factors are so many times smaller, at least

Shapes = Sequence[tuple[int, Sequence[int]]]  # of every parameter the first float, and its shape


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """(m, n): the first dimension, and what lies behind it."""
    rows, *behind = shape or (1,)
    return rows, math.prod(behind)


def is_factored(shape: Sequence[int], rank: int) -> bool:
    m, n = matrix_of(shape)
    return LEAST_RATE * (m + n) * min(m, n, rank) < m * n


def floats(shapes: Shapes, rank: int) -> tuple[int, int]:
    """What is summed over ranks: first all P, and what is not factored; then all Q."""
    first = second = 0
    for _, shape in shapes:
        m, n = matrix_of(shape)
        factored = is_factored(shape, rank)
        first += m * (min(m, n, rank) if factored else n)
        second += n * min(m, n, rank) if factored else 0
    return first, second


def arithmetic(shapes: Shapes, gradient: torch.Tensor, rank: int) -> Callable[[], None]:
    """What a rank does of a gradient [P], but for the sums: M P^T, M^T P, their product, what is left of it."""
    left = torch.zeros_like(gradient)
    places = [(at, matrix_of(shape)) for at, shape in shapes if is_factored(shape, rank)]
    views = [gradient[at : at + m * n].view(m, n) for at, (m, n) in places]
    second = [torch.randn(view.shape[1], min(*view.shape, rank), device=gradient.device) for view in views]

    def act() -> None:
        gradient.add_(left)
        given = gradient.clone()
        for view, q in zip(views, second, strict=True):
            p = torch.linalg.qr(view @ q).Q
            torch.mm(view.t(), p, out=q)
            torch.mm(p, q.t(), out=view)
        torch.sub(given, gradient, out=left)

    return act


def step_powersgd(costs: Costs, link: Link, shapes: Shapes, rank: int, setting: Setting) -> Step:
    """All splits computed and added up; P summed, then Q, then the update of all floats on every rank."""
    compute = setting.held * costs.compute(setting.batch / setting.splits)
    work = (setting.held - 1) * costs.post32.row + costs.low_rank[rank] + costs.post32(1)
    moving = sum(link.seconds(summed(count, setting.nodes)) for count in floats(shapes, rank))
    return Step(compute + moving + work, compute, moving, work)


def summed(count: int, nodes: int) -> Traffic:
    """What leaves a node for the sum of so many floats: their share to every other one, and back."""
    away = 4 * count * (nodes - 1) // nodes
    return Traffic(away, away, 2 * (nodes > 1 and count > 0))
