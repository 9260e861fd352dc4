"""Where the exchange cuts: a flat buffer into buckets, and buckets into the pieces that ranks own.

Buckets run from the buffer's end to its start, which is the order in which backward fills them. Within a bucket every
island owns an equal part, and every rank of the island an equal piece of that: so each bucket keeps all ranks and all
links busy. Where messages are so short that only their number counts, `everyone` gives every island the whole bucket:
each island then does the same work, and nothing has to be sent back.

Legend: P floats of the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

GRAIN = 1024  # floats; pieces end at multiples of it, so that vectorised rules meet the same floats in the same lanes


class Piece(NamedTuple):
    """Floats [low, high) of the flat buffer, and the rank that sums and updates them."""

    owner: int
    low: int
    high: int


def cut_buckets(size: int, bucket: int) -> list[tuple[int, int]]:
    """Floats [0, size) as (low, high), the last first, each of about `bucket` floats and a multiple of GRAIN.

    >>> cut_buckets(5000, 2048)
    [(3072, 5000), (1024, 3072), (0, 1024)]
    """
    grains = -(-size // GRAIN)
    step = max(1, bucket // GRAIN)
    edges = [min(size, g * GRAIN) for g in [*range(grains, 0, -step), 0]]
    return [(low, high) for high, low in pairwise(edges)]


def cut_evenly(low: int, high: int, parts: int) -> list[tuple[int, int]]:
    """[low, high) in so many runs, as even as multiples of GRAIN allow; some may be empty.

    >>> cut_evenly(1024, 5000, 3)
    [(1024, 2048), (2048, 3072), (3072, 5000)]
    """
    grains = -(-(high - low) // GRAIN)
    edges = [min(high, low + grains * k // parts * GRAIN) for k in range(parts + 1)]
    return list(pairwise(edges))


@dataclass(frozen=True)
class Layout:
    """Who owns what.

    size      floats of the buffer
    islands   the ranks that share memory, island by island
    bucket    floats of a bucket
    everyone  whether every island owns everything
    """

    size: int
    islands: Sequence[Sequence[int]]
    bucket: int
    everyone: bool = False

    @cached_property
    def buckets(self) -> list[tuple[int, int]]:
        return cut_buckets(self.size, self.bucket)

    def pieces(self, bucket: int, island: int) -> list[Piece]:
        """The pieces of a bucket that an island owns, one a rank, in the order of its ranks."""
        low, high = self.buckets[bucket]
        if not self.everyone:
            low, high = cut_evenly(low, high, len(self.islands))[island]
        ranks = self.islands[island]
        return [Piece(rank, *run) for rank, run in zip(ranks, cut_evenly(low, high, len(ranks)), strict=True)]

    def partner(self, place: int, island: int) -> int:
        """The rank of an island that deals with the piece of another island's rank at this place in it."""
        return self.islands[island][place % len(self.islands[island])]

    def owned(self, rank: int) -> list[tuple[int, int]]:
        """All floats that a rank owns, as ascending runs that do not touch."""
        island = next(i for i, ranks in enumerate(self.islands) if rank in ranks)
        found = [piece for bucket in range(len(self.buckets)) for piece in self.pieces(bucket, island)]
        mine = [piece for piece in found if piece.owner == rank and piece.low < piece.high]
        runs: list[tuple[int, int]] = []
        for piece in sorted(mine, key=lambda piece: piece.low):
            if runs and runs[-1][1] == piece.low:
                runs[-1] = (runs[-1][0], piece.high)
            else:
                runs.append((piece.low, piece.high))
        return runs
