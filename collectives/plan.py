"""What a rank does with every bucket of an exchange, worked out once: which sums, which messages, between whom.

Two algorithms. `owners`: the owner of a piece gets every other island's partial sums of it, adds all of them in the
tree over splits, and sends the result to each island: the same bits for any number of ranks. `ring`: partial sums of a
piece go from island to island, each adding its own, until they reach the owner, and results go round the same way: a
link then only carries its neighbours' traffic, but the order of the additions depends on where the islands are, so the
ring does not promise the same bits.

Legend: P floats of the flat buffer, H islands; wire: the type in which values cross between islands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from collectives.comm import Message
from collectives.layout import Layout, Piece
from collectives.leaves import Leaves
from collectives.tree import Node, nodes_within, program
from kernels.window import ADD, TreeSum

BLOCK = 1 << 18  # floats that a CPU sums and updates at a time: they stay in the cache in between
STREAM_FLOATS = 1 << 22  # sums that are the result, and of at least so many floats in all, go past the caches


@dataclass
class Parcel:
    """A message of float32 values [n], in the type of the wire."""

    message: Message
    values: torch.Tensor
    wired: torch.Tensor  # `values` itself where the wire is float32

    def pack(self) -> None:
        """Bring `values` into the type of the wire."""
        if self.wired is not self.values:
            self.wired.copy_(self.values)

    def unpack(self) -> bool:
        """Put what came into `values`: zeros for an empty message. Returns whether anything came."""
        if not self.message.received:
            self.values.zero_()
        elif self.wired is not self.values:
            self.values.copy_(self.wired)
        return self.message.received > 0


@dataclass
class Block:
    """Floats [low, low + n) of an owned piece.

    total    the sum over all splits, once `sum_up` was called
    result   where the result is to be
    change   [n], in the type of the wire: what the result grew by; None where the wire is float32
    """

    low: int
    total: torch.Tensor
    result: torch.Tensor
    change: torch.Tensor | None
    sum_up: Callable[[], object]


@dataclass
class Own:
    """A piece that this rank owns: partial sums that come, blocks of it, parcels with the result that go out."""

    sources: list[Parcel]
    blocks: list[Block]
    targets: list[Parcel]


@dataclass
class Duty:
    """What this rank does for an owner on another island: a partial sum, perhaps added to one that comes."""

    source: Parcel | None
    sum_up: Callable[[], object]
    target: Parcel


@dataclass
class Get:
    """Floats [low, low + n) of the result, which this rank takes in for its island, and perhaps passes on."""

    low: int
    source: Parcel
    result: torch.Tensor
    targets: list[Parcel]


@dataclass
class Work:
    """All that a rank does for one bucket [low, high)."""

    low: int
    high: int
    duties: list[Duty] = field(default_factory=list)
    own: list[Own] = field(default_factory=list)
    gets: list[Get] = field(default_factory=list)
    pulls: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # (result elsewhere, its place here)

    @property
    def sent(self) -> list[Parcel]:
        targets = [t for own in self.own for t in own.targets] + [t for get in self.gets for t in get.targets]
        return [duty.target for duty in self.duties] + targets

    @property
    def awaited(self) -> list[Parcel]:
        sources = [s for own in self.own for s in own.sources] + [get.source for get in self.gets]
        return [duty.source for duty in self.duties if duty.source is not None] + sources


class Plan:
    """The work of one rank.

    leaves     the gradient buffers of this rank and its neighbours
    results    [P] of every neighbour: where it writes results; all the same memory where the island has one in common
    final      [P]: where this rank needs results in the end
    layout     who owns what
    algorithm  "owners" or "ring"
    totals     where block sums go: "scratch" (each until the next), "kept", or "result" (the sum is the result)
    """

    def __init__(
        self, leaves: Leaves, results: Sequence[torch.Tensor], final: torch.Tensor, layout: Layout, *,
        algorithm: str = "owners", totals: str = "scratch",
    ):
        self.comm, self.leaves, self.results, self.final, self.layout = leaves.comm, leaves, results, final, layout
        self.result = results[self.comm.neighbours.index(self.comm.rank)]
        self.ring, self.wire, self.totals = algorithm == "ring", leaves.wire, totals
        self.places = max(map(len, layout.islands))
        self.parts = max(len(self._nodes(i)) for i in range(len(layout.islands)))
        longest = max(high - low for low, high in layout.buckets)
        self.block = min(BLOCK, longest) if final.device.type == "cpu" else longest
        self.scratch = self._zeros(self.block)
        most = self._tag(len(layout.buckets), False, 0, 0)
        if most > self.comm.most_tag:
            raise ValueError(
                f"{len(layout.buckets)} buckets between {len(layout.islands)} hosts need {most} message tags, and this "
                f"MPI has {self.comm.most_tag}; make strategy.bucket_mib larger"
            )
        self.work = [self._work(bucket) for bucket in range(len(layout.buckets))]

    @property
    def awaited(self) -> list[Parcel]:
        """Everything that comes to this rank in a turn."""
        return [parcel for work in self.work for parcel in work.awaited]

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends to other islands in a turn."""
        return sum(p.wired.numel() * p.wired.element_size() for work in self.work for p in work.sent)

    # -- who holds which partial sums -------------------------------------------------------------------------------

    def _nodes(self, island: int) -> list[Node]:
        """The partial sums an island forms of what its ranks hold."""
        held = {split for rank in self.layout.islands[island] for split in self.comm.splits_of(rank)}
        return nodes_within(held, self.leaves.root)

    def _tree_sum(
        self, node: Node, parts: dict[Node, torch.Tensor], out: torch.Tensor, streams: bool = False
    ) -> TreeSum:
        below = {n: t for n, t in parts.items() if node[0] <= n[0] and n[1] <= node[1]}
        numbers = {n: k for k, n in enumerate(below)}
        return TreeSum(list(below.values()), program(node, numbers, ADD), out, self.wire, streams)

    # -- messages ---------------------------------------------------------------------------------------------------

    def _tag(self, bucket: int, result: bool, island: int, place: int, part: int = 0) -> int:
        """A number for a message that no other message of a turn between the same ranks has."""
        piece = (2 * bucket + result) * len(self.layout.islands) + island
        return (piece * self.places + place) * self.parts + part

    def _zeros(self, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype, device=self.final.device)

    def _wired(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.wire is None else torch.empty_like(values, dtype=self.wire)

    def _send(self, values: torch.Tensor, to: int, tag: int) -> Parcel:
        wired = self._wired(values)
        return Parcel(self.comm.sending(wired, to, tag, "reduce"), values, wired)

    def _receive(self, values: torch.Tensor, source: int, tag: int) -> Parcel:
        wired = self._wired(values)
        return Parcel(self.comm.receiving(wired, source, tag), values, wired)

    # -- the work of a bucket ---------------------------------------------------------------------------------------

    def _work(self, bucket: int) -> Work:
        low, high = self.layout.buckets[bucket]
        work, mine, islands = Work(low, high), self.comm.island, len(self.layout.islands)
        for hop in range(1, islands):  # in the order in which a ring reaches this island
            island = (mine - hop) % islands
            for place, piece in self._pieces(bucket, island):
                if self.layout.partner(place, mine) == self.comm.rank:
                    work.duties += self._duties(bucket, island, place, piece, hop)
                    if not self.layout.everyone:
                        work.gets.append(self._get(bucket, island, place, piece, hop))
        for place, piece in self._pieces(bucket, mine):
            if piece.owner == self.comm.rank:
                work.own.append(self._own(bucket, place, piece))
        work.pulls = self._pulls(bucket)
        return work

    def _pieces(self, bucket: int, island: int) -> list[tuple[int, Piece]]:
        """An island's pieces of a bucket, with their places; for an empty one nobody sends anything."""
        return [(k, piece) for k, piece in enumerate(self.layout.pieces(bucket, island)) if piece.low < piece.high]

    def _pulls(self, bucket: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What neighbours bring about in memory that is not this rank's own, and where it is needed here."""
        found = []
        for island in range(len(self.layout.islands)):
            own = island == self.comm.island
            if self.layout.everyone and not own:
                continue
            for place, piece in self._pieces(bucket, island):
                by = piece.owner if own else self.layout.partner(place, self.comm.island)
                there = self.results[self.comm.neighbours.index(by)][piece.low : piece.high]
                here = self.final[piece.low : piece.high]
                if there.data_ptr() != here.data_ptr():
                    found.append((there, here))
        return found

    def _duties(self, bucket: int, island: int, place: int, piece: Piece, hop: int) -> list[Duty]:
        mine, near = self.comm.island, self.leaves.near(piece.low, piece.high)
        size = piece.high - piece.low
        if self.ring:
            source, parts = None, [self._joined(near)]
            if hop > 1:
                before = self.layout.partner(place, (mine - 1) % len(self.layout.islands))
                source = self._receive(self._zeros(size), before, self._tag(bucket, False, island, place))
                parts = [[source.values], *parts]
            to = piece.owner
            if hop < len(self.layout.islands) - 1:
                to = self.layout.partner(place, (mine + 1) % len(self.layout.islands))
            leaves = [leaf for part in parts for leaf in part]
            sums = self._row_sum(leaves, leaves[0])
            return [Duty(source, sums, self._send(leaves[0], to, self._tag(bucket, False, island, place)))]
        duties = []
        for part, node in enumerate(self._nodes(mine)):
            within = [n for n in near if node[0] <= n[0] and n[1] <= node[1]]
            out = self._zeros(size) if self.layout.everyone and len(within) > 1 else near[within[0]]
            target = self._send(out, piece.owner, self._tag(bucket, False, island, place, part))
            duties.append(Duty(None, self._tree_sum(node, near, out) if len(within) > 1 else _nothing, target))
        return duties

    @staticmethod
    def _joined(parts: dict[Node, torch.Tensor]) -> list[torch.Tensor]:
        return [parts[node] for node in sorted(parts)]

    def _row_sum(
        self, leaves: Sequence[torch.Tensor], out: torch.Tensor, streams: bool = False
    ) -> Callable[[], object]:
        """The sum of leaves from left to right: the ring's order."""
        if len(leaves) == 1 and leaves[0] is out:
            return _nothing
        in_a_row = [0, *(step for k in range(1, len(leaves)) for step in (k, ADD))]
        return TreeSum(leaves, in_a_row, out, self.wire, streams)

    def _own(self, bucket: int, place: int, piece: Piece) -> Own:
        mine, islands = self.comm.island, self.layout.islands
        near = self.leaves.near(piece.low, piece.high)
        size = piece.high - piece.low
        large = self.totals == "result" and self.layout.size >= STREAM_FLOATS
        streams = large and self.result.data_ptr() != self.leaves.first.data_ptr()
        others = [i for i in range(len(islands)) if i != mine]
        sources: list[Parcel] = []
        far: dict[Node, torch.Tensor] = {}
        if self.ring and others:
            before = self.layout.partner(place, (mine - 1) % len(islands))
            sources = [self._receive(self._zeros(size), before, self._tag(bucket, False, mine, place))]
        elif others:
            for island in others:
                for part, node in enumerate(self._nodes(island)):
                    tag = self._tag(bucket, False, mine, place, part)
                    sources.append(self._receive(self._zeros(size), self.layout.partner(place, island), tag))
                    far[node] = sources[-1].values
        ahead = [(mine + 1) % len(islands)] if self.ring else others
        result = self.result[piece.low : piece.high]
        change = self._zeros(size, self.wire) if self.wire is not None else None
        targets = [] if self.layout.everyone else [
            self._carry(result if change is None else change, i, place, self._tag(bucket, True, mine, place))
            for i in ahead if i != mine
        ]
        total = self._zeros(size) if self.totals == "kept" else result
        blocks = []
        for at in range(0, size, self.block if self.totals == "scratch" else max(size, 1)):
            cut = slice(at, min(size, at + self.block) if self.totals == "scratch" else size)
            out = self.scratch[: cut.stop - cut.start] if self.totals == "scratch" else total[cut]
            if self.ring and sources:
                leaves = [sources[0].values, *self._joined(near)]
                sums = self._row_sum([leaf[cut] for leaf in leaves], out, streams)
            else:
                sums = self._tree_sum(self.leaves.root, {n: t[cut] for n, t in (near | far).items()}, out, streams)
            blocks.append(Block(piece.low + at, out, result[cut], None if change is None else change[cut], sums))
        return Own(sources, blocks, targets)

    def _carry(self, values: torch.Tensor, island: int, place: int, tag: int) -> Parcel:
        """A parcel with a result to the partner on another island."""
        to = self.layout.partner(place, island)
        return Parcel(self.comm.sending(values, to, tag, "share"), values, values)

    def _get(self, bucket: int, island: int, place: int, piece: Piece, hop: int) -> Get:
        mine, islands = self.comm.island, len(self.layout.islands)
        result = self.result[piece.low : piece.high]
        carried = result if self.wire is None else self._zeros(len(result), self.wire)
        tag = self._tag(bucket, True, island, place)
        source = self.layout.partner(place, (mine - 1) % islands) if self.ring and hop > 1 else piece.owner
        onward = self.ring and hop < islands - 1
        targets = [self._carry(carried, (mine + 1) % islands, place, tag)] if onward else []
        return Get(piece.low, Parcel(self.comm.receiving(carried, source, tag), carried, carried), result, targets)


def _nothing() -> None:
    """A partial sum of one leaf is there already."""
