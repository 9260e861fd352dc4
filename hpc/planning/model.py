"""How long a step takes on so many nodes: arithmetic on measured costs. Source: paper 002, section 2.

What is modelled is what the code does: `allreduce` exchanges buckets while backward runs, `onebit` exchanges when all
splits are quantized, or, double buffered, one half minibatch while the next half is computed. See `step_float32`,
`step_onebit`.

Legend: P floats of the flat buffer, N splits, K nodes, R ranks a node.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

from collectives.exchange import LONG_NAP_S
from hpc.planning.traffic import Traffic

MOST_NODES = 1024  # farther than that nobody looks for where efficiency falls


@dataclass(frozen=True)
class Curve:
    """Seconds by size: straight between what was measured, and straight on at both ends.

    points  (size, seconds), at least one; with one, seconds are proportional to the size
    """

    points: Sequence[tuple[float, float]]

    def __call__(self, size: float) -> float:
        points = sorted((float(x), float(y)) for x, y in self.points)
        if len(points) == 1:
            points = [(0.0, 0.0), *points]
        (x, y), (x2, y2) = next((p for p in pairwise(points) if size <= p[1][0]), (points[-2], points[-1]))
        return max(0.0, y + (y2 - y) * (size - x) / (x2 - x))

    def scaled(self, factor: float) -> Curve:
        return Curve([(x, y * factor) for x, y in self.points])


class Line(NamedTuple):
    """Seconds of an owner's work on all P floats, from a number of rows (splits, or partial sums)."""

    base: float
    row: float

    def __call__(self, rows: float) -> float:
        return self.base + self.row * rows

    def scaled(self, factor: float) -> Line:
        return Line(self.base * factor, self.row * factor)


@dataclass(frozen=True)
class Costs:
    """Seconds of one rank, measured while as many ranks of its node were busy as will be.

    forward, backward  by items of a sub-batch: reading and stacking it, clearing the gradient; until that is final
    final     (first float of a parameter, share of backward after which its gradient is final), ascending
    quantize  one split's whole gradient, packed with what its residual leaves
    post      of an owner, 1-bit: N packed rows added up, the rule, the change of the weights, packed
    post32    of an owner, float32: partial sums added up, the rule
    update    what landed added to the whole model
    low_rank  PowerSGD's arithmetic on a whole gradient, and torch's update, by its rank
    contended whether what exchanges takes its time from what computes: no core of its own, or on a GPU
    """

    forward: Curve
    backward: Curve
    final: Sequence[tuple[int, float]]
    quantize: float
    post: Line
    post32: Line
    update: float
    low_rank: Mapping[int, float] = field(default_factory=dict)
    contended: bool = False

    def compute(self, items: float) -> float:
        return self.forward(items) + self.backward(items)

    def faster(self, compute: float, memory: float) -> Costs:
        """Where computing, and passes through memory, are so many times as fast, both on one device, in turns."""
        return replace(
            self, forward=self.forward.scaled(1 / compute), backward=self.backward.scaled(1 / compute),
            quantize=self.quantize / memory, post=self.post.scaled(1 / memory), post32=self.post32.scaled(1 / memory),
            update=self.update / memory, low_rank={rank: took / memory for rank, took in self.low_rank.items()},
            contended=True,
        )


@dataclass(frozen=True)
class Link:
    """How long messages take.

    both     seconds of an exchange of two stages, one after the other, by the bytes that leave a node in both together
    streamed the same in many pieces, each of which goes its own way
    message  seconds that a rank's every further message takes
    core     seconds that a byte takes from a core that computes meanwhile
    """

    both: Curve
    streamed: Curve
    message: float = 0.0
    core: float = 0.0

    @classmethod
    def of(cls, rate: float, latency: float, message: float = 0.0) -> Link:
        """Of a rate in bytes a second each way, and seconds until a message arrives."""
        curve = Curve([(0.0, 2 * latency), (rate, 2 * latency + 1.0)])
        return cls(curve, curve, message)

    def seconds(self, traffic: Traffic, streamed: bool = False) -> float:
        """Of an exchange whose two stages follow each other, or of one in many pieces."""
        if not traffic.messages:
            return 0.0
        curve = self.streamed if streamed else self.both
        return curve(traffic.total) + self.message * max(0, traffic.messages - 2)


@dataclass(frozen=True)
class Setting:
    """nodes of `ranks` ranks each that learn `batch` items a minibatch, in so many splits over all of them."""

    nodes: int
    ranks: int
    splits: int
    batch: float

    @property
    def size(self) -> int:
        return self.nodes * self.ranks

    @property
    def held(self) -> int:
        """Splits a rank."""
        return self.splits // self.size


class Step(NamedTuple):
    """A minibatch: seconds in all, and of them forward and backward alone; the rest: waiting for the link (if it took
    no other time at all, and nothing was hidden), and fixed and owners' work."""

    seconds: float
    compute: float
    link: float
    work: float

    @property
    def visible(self) -> float:
        """Seconds beyond computing and arithmetic: the exchange that is not hidden."""
        return max(0.0, self.seconds - self.compute - self.work)


def step_float32(
    costs: Costs, link: Link, traffic: Traffic, setting: Setting, buckets: Sequence[tuple[int, int]], *,
    overlap: bool = True, deferred: bool = False,
) -> Step:
    """`allreduce`: all splits but the last are computed and added up; backward of the last fills buckets, which are
    reduced, summed and updated by their owners, and shared, one behind the other, while it goes on.

    buckets   floats [low, high), of all P
    overlap   whether buckets set out before backward ends
    deferred  whether owners' updates wait for the norm of all sums (a clipped gradient)
    """
    items = setting.batch / setting.splits
    compute = setting.held * costs.compute(items)
    adding = (setting.held - 1) * costs.post32.row
    near = costs.post32.row * setting.ranks if setting.ranks > 1 else 0.0  # a node's own sum, for every other node
    owned = (costs.post32(setting.ranks + setting.nodes - 1) + near * (setting.nodes - 1)) / setting.size
    if setting.nodes == 1:
        return Step(compute + adding + owned, compute, 0.0, adding + owned)
    backward = costs.backward(items)
    size = max(high for _, high in buckets)
    shares = [(high - low) / size for low, high in buckets]
    ready = [_final_at(costs.final, low, high) if overlap else 1.0 for low, high in buckets]
    whole, latency = link.seconds(traffic, streamed=True), link.both(0.0) / 2
    wire = [max(0.0, whole - 2 * latency) * share / 2 for share in shares]
    work, stolen = [owned * share for share in shares], 0.0
    for _ in range(6):  # what is done while backward runs makes it longer, where it has to share the core
        longer = backward + stolen
        full = [longer * share for share in ready]
        end, in_time = _piped(full, wire, work, latency, longer, deferred)
        stolen = in_time * (owned + link.core * traffic.total) if costs.contended else 0.0
    seconds = compute - backward + adding + end
    return Step(seconds, compute, whole, adding + owned)


def _final_at(final: Sequence[tuple[int, float]], low: int, high: int) -> float:
    """The share of backward after which floats [low, high) are final."""
    ends = [*(start for start, _ in final[1:]), math.inf]
    within = [share for (start, share), end in zip(final, ends, strict=True) if start < high and low < end]
    return max(within, default=1.0)


def _piped(
    ready: Sequence[float], wire: Sequence[float], work: Sequence[float], latency: float, backward: float,
    deferred: bool,
) -> tuple[float, float]:
    """When the last bucket is through, and what share of all was done before backward ended.

    ready  seconds after which buckets are full; wire: seconds of the link, each of two stages; work: their owner's
    """
    events = [(at, 0, bucket) for bucket, at in enumerate(ready)]
    heapq.heapify(events)
    link = core = end = in_time = 0.0
    held: list[int] = []
    while events or held:
        if not events:  # all sums are there; one more small message tells their norm
            core = max(core, backward) + latency
            events = [((core := core + work[bucket]), 1, bucket) for bucket in held]
            held = []
        at, stage, bucket = heapq.heappop(events)
        begins = max(link, at)
        link = begins + wire[bucket]
        there = link + latency + (LONG_NAP_S if link < backward else 0.0)  # a thread looks now and then
        in_time += (there <= backward) / (2 * len(ready))
        if stage:
            end = max(end, there)
        elif deferred:
            core = max(core, there)
            held.append(bucket)
        else:
            core = max(core, there) + work[bucket]
            heapq.heappush(events, (core, 1, bucket))
    return max(end, backward), in_time


def step_onebit(costs: Costs, link: Link, traffic: Traffic, setting: Setting, halves: int = 1) -> Step:
    """`onebit`: every split is computed and quantized; then rows to the owners, their work, results back, all added.

    halves  2: double buffering; a minibatch is learned in two turns, and what a turn exchanges is on its way while the
            next one is computed. What a turn adds to the model, and quantizes, it does twice a minibatch
    """
    items = setting.batch / setting.splits / halves
    compute = setting.held * costs.compute(items)
    quantize, post = setting.held * costs.quantize, costs.post(setting.splits) / setting.size
    moving = link.seconds(traffic)
    if halves == 1:
        seconds = compute + quantize + moving + post + costs.update
        return Step(seconds, compute, moving, quantize + post + costs.update)
    beside = post + link.core * traffic.total if costs.contended else 0.0
    exchange = moving + post + (3 * LONG_NAP_S + beside if costs.contended else 3 * LONG_NAP_S)
    turn = max(compute + quantize + beside, exchange) + costs.update
    work = quantize + costs.update + (post if costs.contended else 0.0)
    return Step(halves * turn, halves * compute, halves * moving, halves * work)


class Optimum(NamedTuple):
    """Equation (4) and its terms; nodes: K-hat, None where the denominator is not positive (section 2.3)."""

    nodes: float | None
    batch: float
    frame_s: float
    post_s: float
    comm_s: float
    update_s: float

    @property
    def limit(self) -> float | None:
        """Where communication is faster than the fixed cost: the seconds a minibatch that no number of nodes beats."""
        return None if self.nodes is not None else 2 * self.update_s


def optimum(
    batch: float, frame: Callable[[float], float], post_s: float, comm: Callable[[float], float], update_s: float,
    most: float = MOST_NODES,
) -> Optimum:
    """The number of nodes at which computing and communicating take equally long. Source: paper 002, equation (4).

        K = (N/2 T_frm + C T_post) / (T_comm / Z - T_upd)

    batch     N, what the loss counts
    frame     T_frm by the size of the sub-batch: seconds of one; the size is N/2 over K, and K found in a few rounds
    post_s    C T_post: what nodes share of the work on all floats
    comm      T_comm / Z, by K
    update_s  T_upd, the same on all nodes
    most      K beyond which T_frm and T_comm are taken as there
    """
    nodes = 1.0
    for _ in range(60):
        frame_s, comm_s = frame(batch / 2 / nodes), comm(nodes)
        gap = comm_s - update_s
        found = (batch / 2 * frame_s + post_s) / gap if gap > 0 else math.inf
        nodes = max(1.0, min(math.sqrt(nodes * found), batch / 2, most))  # halfway, for K moves what it is made from
    return Optimum(None if found == math.inf else found, batch, frame_s, post_s, comm_s, update_s)


def falls_below(efficiency: Callable[[int], float], share: float = 0.5, most: int = MOST_NODES) -> int | None:
    """The smallest number of nodes whose efficiency is below a share; None if there is none up to `most`."""
    high = 1
    while efficiency(high) >= share:
        if high == most:
            return None
        high = min(2 * high, most)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if efficiency(middle) < share else (middle, high)
    return high
