"""What measured costs say of so many nodes: steps, bytes, efficiency, and the best number of nodes.

Legend: P floats of the flat buffer, N splits, K nodes, R ranks a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from collectives.choice import BUCKETS
from collectives.layout import Layout
from hpc.planning.model import Costs, Link, Optimum, Setting, Step, falls_below, optimum, step_float32, step_onebit
from hpc.planning.powersgd import step_powersgd, summed, sums_of
from hpc.planning.traffic import Traffic, float32_traffic, islands_of, packed_traffic
from kernels.onebit import Columns

WAYS = {"float32": "float32", "onebit": "1-bit", "halves": "1-bit, double buffering"}


class Outlook:
    """The steps of a recipe on any number of nodes, by the ways of exchanging.

    costs    of a rank
    link     of a node
    shapes   of every parameter, its first float and its shape
    size     P
    batch    the recipe's, in items
    counted  what the loss counts in an item (frames of an utterance; 1 where items are frames)
    splits   the recipe's; where the ranks do not divide them: a split a rank
    ranks    R
    bucket   bytes that float32 exchanges at a time; 0: as the strategy mostly finds for itself
    wire     the type in which float32 sums cross
    overlap, deferred  of `step_float32`
    """

    def __init__(
        self, costs: Costs, link: Link, shapes: Sequence[tuple[int, Sequence[int]]], size: int, *, batch: int,
        counted: float = 1.0, splits: int = 1, ranks: int = 1, bucket: int = 0, wire: str = "float32",
        overlap: bool = True, deferred: bool = False,
    ):
        self.costs, self.link, self.size, self.ranks = costs, link, size, ranks
        self.shapes = [(start, tuple(shape)) for start, shape in shapes]
        self.columns = Columns.of(self.shapes)
        self.batch, self.counted, self.splits, self.wire = batch, counted, splits, wire
        self.bucket, self.how = (bucket or BUCKETS[0]) // 4, {"overlap": overlap, "deferred": deferred}
        self.steps = lru_cache(maxsize=None)(self._steps)
        self.traffic = lru_cache(maxsize=None)(self._traffic)

    def setting(self, nodes: int) -> Setting:
        size = nodes * self.ranks
        return Setting(nodes, self.ranks, size if self.splits % size else self.splits, self.batch)

    def fits(self, nodes: int, halves: int = 1) -> bool:
        """Whether every split has an item at least."""
        return self.batch >= halves * self.setting(nodes).splits

    def _traffic(self, nodes: int) -> tuple[Traffic, Traffic]:
        """Of float32 and of 1-bit, an exchange."""
        islands, splits = islands_of(nodes, self.ranks), self.setting(nodes).splits
        plain = float32_traffic(Layout(self.size, islands, self.bucket), splits, self.wire)
        return plain, packed_traffic(self.columns, self.size, islands, splits)

    def _steps(self, nodes: int) -> dict[str, Step]:
        """Of a minibatch, by way: a key of WAYS."""
        setting, (plain, packed) = self.setting(nodes), self.traffic(nodes)
        buckets = Layout(self.size, islands_of(nodes, self.ranks), self.bucket).buckets
        found = {
            "float32": step_float32(self.costs, self.link, plain, setting, buckets, **self.how),
            "onebit": step_onebit(self.costs, self.link, packed, setting),
        }
        if self.fits(nodes, 2):
            found["halves"] = step_onebit(self.costs, self.link, packed, setting, 2)
        return found

    def powersgd(self, nodes: int) -> dict[int, Step]:
        """What a minibatch would take with PowerSGD, by its rank."""
        setting = self.setting(nodes)
        return {r: step_powersgd(self.costs, self.link, self.shapes, r, setting) for r in self.costs.low_rank}

    def powersgd_bytes(self, nodes: int, rank: int) -> int:
        """What leaves a node for it."""
        return sum(summed(count, nodes).total for count in sums_of(self.shapes, rank))

    @cached_property
    def alone(self) -> float:
        """What the loss counts a second on one node with nothing quantized, in the recipe's splits or one a rank."""
        settings = [self.setting(1), Setting(1, self.ranks, self.ranks, self.batch)]
        nothing, whole = Traffic(0, 0, 0), [(0, self.size)]
        steps = [step_float32(self.costs, self.link, nothing, setting, whole) for setting in settings]
        return self.batch * self.counted / min(step.seconds for step in steps)

    def speed(self, nodes: int, way: str) -> float:
        """What the loss counts a second, over all nodes."""
        return self.batch * self.counted / self.steps(nodes)[way].seconds

    def efficiency(self, nodes: int, way: str) -> float:
        """Its share of so many times one node's."""
        return self.speed(nodes, way) / (nodes * self.alone)

    def below_half(self, way: str) -> int | None:
        """The number of nodes from which on less than half of every node's time is of use; None: not up to where
        minibatches have no more items."""
        halves = 2 if way == "halves" else 1

        def share(nodes: int) -> float:
            return self.efficiency(nodes, way) if self.fits(nodes, halves) else 0.0

        found = falls_below(share)
        return found if found and self.fits(found, halves) else None

    def optimum(self, way: str, most: int) -> Optimum:
        """Equation (4) of float32 or of 1-bit, for a node of all its ranks; beyond `most` nodes costs are as there."""
        costs, packed = self.costs, way != "float32"
        line = costs.post if packed else costs.post32
        # An owner adds as many rows as there are ranks of an R K-th of all floats: that part does not shrink.
        fixed = line.row + (costs.quantize + costs.update if packed else 0.0)

        def frame(size: float) -> float:
            return costs.compute(size / self.ranks / self.counted) / size

        def comm(nodes: float) -> float:
            return self.link.seconds(self.traffic(max(2, round(nodes)))[packed], not packed)

        return optimum(self.batch * self.counted, frame, line.base / self.ranks, comm, fixed, most)

    def to_dict(self, nodes: Sequence[int]) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {
            "alone_per_s": self.alone,
            "nodes": [self._row(count) for count in nodes],
            "equation_4": {way: self.optimum(way, max(nodes))._asdict() for way in ("float32", "onebit")},
            "below_half_from": {way: self.below_half(way) for way in WAYS},
        }

    def _row(self, nodes: int) -> dict[str, Any]:
        setting, (plain, packed) = self.setting(nodes), self.traffic(nodes)
        row: dict[str, Any] = {
            "nodes": nodes, "ranks": setting.size, "splits": setting.splits, "items": self.batch / setting.splits,
        }
        for way, step in self.steps(nodes).items():
            turns = 2 if way == "halves" else 1
            traffic = plain if way == "float32" else packed
            row[way] = {
                "step_s": step.seconds, "compute_s": step.compute, "work_s": step.work, "link_s": step.link,
                "not_hidden_s": step.visible, "per_s": self.speed(nodes, way),
                "efficiency": self.efficiency(nodes, way), "bytes_to_owners": turns * traffic.reduce,
                "bytes_back": turns * traffic.share,
            }
        for rank, step in self.powersgd(nodes).items():
            row[f"powersgd{rank}"] = {
                "step_s": step.seconds, "compute_s": step.compute, "work_s": step.work, "link_s": step.link,
                "not_hidden_s": step.visible, "per_s": self.batch * self.counted / step.seconds,
                "bytes": self.powersgd_bytes(nodes, rank),
            }
        return row
