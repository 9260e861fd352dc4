"""What PowerSGD would cost instead: gradients sent as products of two thin matrices, as torch's DDP hook does it.

Trireme does not have it, but a plan that sets 1-bit beside float32 alone would flatter it: PowerSGD sends fewer bytes.

Source: Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization"
(2019), algorithm 1. As in torch 2: a matrix is factored whose factors have less than half of its values; what is not
factored is summed over ranks first, then the factors P, then the factors Q, one after the other, when backward is over;
DDP copies gradients into a bucket and out of it, and torch's own rule goes over memory once for each of its operations.

Legend: M [m, n] a matrix's gradient plus what was left of those before, r the rank, M ~ P Q^T, P [m, r], Q [n, r].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hpc.planning.model import Costs, Link, Setting, Step
from hpc.planning.traffic import Traffic

LOW_RANKS = (1, 4)
RATE = 2  # a matrix is factored whose factors are more than so many times smaller
MOMENTUM, SMALL_RATE = 0.9, 1e-9

Shapes = Sequence[tuple[int, Sequence[int]]]  # of every parameter the first float, and its shape


class Sums(NamedTuple):
    """Floats of the three sums over ranks: of what is not factored, of all P, of all Q."""

    whole: int
    first: int
    second: int


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """(m, n): the first dimension, and what lies behind it."""
    rows, *behind = shape or (1,)
    return rows, math.prod(behind)


def is_factored(shape: Sequence[int], rank: int) -> bool:
    """Whether a parameter of this shape is sent as factors of this rank."""
    m, n = matrix_of(shape)
    return RATE * (m + n) * rank < m * n


def sums_of(shapes: Shapes, rank: int) -> Sums:
    """What is summed over ranks."""
    whole = first = second = 0
    for _, shape in shapes:
        m, n = matrix_of(shape)
        if is_factored(shape, rank):
            first, second = first + m * rank, second + n * rank
        else:
            whole += m * n
    return Sums(whole, first, second)


class Arithmetic:
    """What a rank does of a gradient, sums over ranks apart, and torch's rule; nothing of a model is changed by it.

    shapes    of all parameters
    gradient  [P], changed in place when called: it becomes what all ranks would take for it
    rank      r
    """

    def __init__(self, shapes: Shapes, gradient: torch.Tensor, rank: int):
        self.gradient = gradient
        self.bucket, self.left, self.momentum, self.weights = (torch.zeros_like(gradient) for _ in range(4))
        places = [(at, matrix_of(shape)) for at, shape in shapes if is_factored(shape, rank)]
        self.views = [self.bucket[at : at + m * n].view(m, n) for at, (m, n) in places]
        random = torch.Generator().manual_seed(rank)
        self.second = [torch.randn(n, rank, generator=random).to(gradient.device) for _, (_, n) in places]

    def __call__(self) -> None:
        self.bucket.copy_(self.gradient).add_(self.left)
        given = self.bucket.clone()
        for view, q in zip(self.views, self.second, strict=True):
            p = torch.linalg.qr(view @ torch.linalg.qr(q).Q).Q
            torch.mm(view.t(), p, out=q)
            torch.mm(p, q.t(), out=view)
        torch.sub(given, self.bucket, out=self.left)
        self.gradient.copy_(self.bucket)
        self.momentum.mul_(MOMENTUM).add_(self.gradient)
        self.weights.add_(self.momentum, alpha=-SMALL_RATE)


def step_powersgd(costs: Costs, link: Link, shapes: Shapes, rank: int, setting: Setting) -> Step:
    """A minibatch: every rank's share computed at once, the arithmetic, and three sums one after the other.

    shapes  of all parameters
    rank    r; `costs.low_rank` has it
    """
    compute = costs.compute(setting.batch / setting.size)
    moving = sum(link.seconds(summed(count, setting.nodes)) for count in sums_of(shapes, rank))
    return Step(compute + moving + costs.low_rank[rank], compute, moving, costs.low_rank[rank])


def summed(count: int, nodes: int) -> Traffic:
    """What leaves a node for the sum of so many floats: to every other node its share, and back."""
    away = 4 * count * (nodes - 1) // nodes
    return Traffic(away, away, 2 * (nodes - 1) if count else 0)
