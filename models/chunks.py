"""How utterances are cut into what recurrent layers see at a time: whole, as chunks with context, or as a stream.

    utterance   epoch-wise BPTT: utterances whole, padded to the batch's longest
    chunks      context-sensitive chunks, "21-64+21" (paper 003, section 3.1): 64 frames, whose outputs count, with 21
                past and 21 future frames as context; every chunk starts from nothing. In decoding chunks overlap by
                half (the paper's 32 frames), and a frame's posterior is the mean of those it has, two as a rule
    truncated   lanes of running frames, "20" at a time: the state goes on from batch to batch, gradients do not. With
                layers of both directions, "64+21": latency-controlled. The forward direction goes on from what it was
                after the 64 frames, the backward one starts from nothing after 21 more (Zhang et al. 2016)

An output delay of d has the network say at frame t what frame t - d is; the last frame is repeated d times for what is
left to be said (Sak et al. 2014).

Nothing here is in a shard: frames are cut when a batch is made.

Legend: B sequences of a part, T steps of the longest, W frames of a window, D values a frame, N labels of a batch, M
outputs that count, L lanes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from models.layers.acoustic import within
from models.task import Carry, Piece


class Chunk(NamedTuple):
    """`centre` frames whose outputs count, after `left` and before `right` frames of context."""

    left: int
    centre: int
    right: int

    @classmethod
    def of(cls, text: str) -> Chunk:
        """Of "left-centre+right", where left and right may be left out. Raises ValueError.

        >>> Chunk.of("21-64+21"), Chunk.of("64+21"), Chunk.of("20")
        (Chunk(left=21, centre=64, right=21), Chunk(left=0, centre=64, right=21), Chunk(left=0, centre=20, right=0))
        """
        found = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,6})(?:\+(\d{1,6}))?", text)
        if found is None or not int(found[2]):
            raise ValueError(
                f"task.chunk = '{text}' is no chunk; write frames, each below a million, as left-centre+right, e.g. "
                "21-64+21"
            )
        left, centre, right = (int(group or 0) for group in found.groups())
        return cls(left, centre, right)


class Part(NamedTuple):
    """Sequences side by side, as the layers see them at once.

    inputs   windows of raw features, float32 [T, B, W, D]
    lengths  int64 [B]
    scored   which outputs count, bool [B, T]
    kept     int64 [B]: after how many steps the state is what comes next starts from; None: at the end
    """

    inputs: torch.Tensor
    lengths: torch.Tensor
    scored: torch.Tensor
    kept: torch.Tensor | None = None


class SequenceBatch(NamedTuple):
    """What the layers see, part by part, the state going on from each to the next, and the labels.

    labels    int64 [N]
    key_of    maps a position in `labels` to its utterance's key
    parts     of at least one
    of_label  int64 [M]: which label's frame each output that counts is of; None: M is N, each its own
    begin     of the first part: (lane, bool whether it goes on from the last batch's state), each [B]; None: none does
    end       int64 [L]: the sequence that each lane ends with; None: nothing is carried on
    """

    labels: torch.Tensor
    key_of: Callable[[int], str]
    parts: tuple[Part, ...]
    of_label: torch.Tensor | None = None
    begin: tuple[torch.Tensor, torch.Tensor] | None = None
    end: torch.Tensor | None = None

    def started(self, carry: Carry) -> Carry:
        """The state that the first part starts from."""
        if carry is None or self.begin is None:
            return None
        lane, goes_on = self.begin
        return tuple(torch.where(goes_on[:, None], state[lane], 0.0) for state in carry)

    def carried(self, state: Carry) -> Carry:
        """What the next batch starts from."""
        if state is None or self.end is None:
            return None
        return tuple(held[self.end].detach() for held in state)

    def by_label(self, logits_MC: torch.Tensor) -> torch.Tensor:
        """Of every label's frame the log of the mean posterior [N, C]; logits, where every frame has one output."""
        if self.of_label is None:
            return logits_MC
        posteriors_MC = torch.nn.functional.softmax(logits_MC, 1)
        total_NC = posteriors_MC.new_zeros((len(self.labels), logits_MC.shape[1]))
        total_NC.index_add_(0, self.of_label, posteriors_MC)
        return (total_NC / total_NC.sum(1, keepdim=True)).clamp_min(1e-37).log()


class Cut(NamedTuple):
    """Sequences [B] as rows of a piece: input from row `at` on for so many steps, those beyond `last` being `last`
    again; outputs count for rows [low, high). `first` and `last` are their utterances' rows in memory."""

    at: torch.Tensor
    steps: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    kept: torch.Tensor | None = None


class Cutter:
    """Cuts pieces of frames.

    chunk    what is seen at a time; None: whole utterances
    context  frames of a window on either side
    delay    frames that outputs come later
    """

    def __init__(self, chunk: Chunk | None, context: int, delay: int):
        self.chunk, self.delay = chunk, delay
        self.offsets = torch.arange(-context, context + 1)

    # -- training ---------------------------------------------------------------------------------------------------

    def utterances(self, piece: Piece, low: int, high: int) -> SequenceBatch:
        first, last = piece.first[low:high], piece.last[low:high]
        cut = Cut(first, last - first + 1 + self.delay, first, last, first, last + 1)
        return self._batch(piece, cut, lambda sequence: low + sequence)

    def chunks(self, piece: Piece, low: int, high: int) -> SequenceBatch:
        assert self.chunk is not None
        begin, first, last = piece.items[low:high], piece.first[low:high], piece.last[low:high]
        end = torch.minimum(begin + self.chunk.centre, last + 1)
        at = torch.maximum(begin - self.chunk.left, first)
        steps = torch.minimum(end + self.chunk.right, last + 1) - at
        return self._batch(piece, Cut(at, steps, first, last, begin, end), lambda sequence: low + sequence)

    def stretch(self, piece: Piece, low: int, high: int) -> SequenceBatch:
        """Lanes, cut where an utterance begins: every part of one is a sequence.

        With a delay, a lane that begins amid an utterance at first says what frames before it were, which it did not
        see; the lane before it ends without having said them.
        """
        assert self.chunk is not None
        lanes = piece.lanes
        items_LT = piece.items[low:high].view(-1, lanes).T
        begins_LT = items_LT == piece.first[low:high].view(-1, lanes).T
        fresh_LT = begins_LT.clone()
        begins_LT[:, 0] = True
        lane, step = torch.nonzero(begins_LT, as_tuple=True)
        steps_T = items_LT.shape[1]
        edges = torch.cat([lane * steps_T + step, lane.new_tensor([lanes * steps_T])])
        count, where = edges.diff(), low + step * lanes + lane
        at, first, last = piece.items[where], piece.first[where], piece.last[where]
        ends = at + count > last
        scored = torch.maximum(at - self.delay, first)
        steps = torch.minimum(at + count + self.chunk.right, last + 1) - at + self.delay * ends
        cut = Cut(
            at, steps, first, last, scored, torch.maximum(at + count - self.delay * ~ends, scored),
            count if self.chunk.right else None,
        )
        end = torch.searchsorted(lane, torch.arange(lanes, device=lane.device), right=True) - 1
        batch = self._batch(piece, cut, lambda sequence: int(where[sequence]))
        return batch._replace(begin=(lane, ~fresh_LT[lane, step]), end=end)

    # -- decoding, of whole utterances ------------------------------------------------------------------------------

    def overlapping(self, piece: Piece, low: int, high: int) -> SequenceBatch:
        """Chunks that begin half a chunk after each other: every frame is in the middle of two (one, if half a chunk is
        no whole number of frames, of some)."""
        assert self.chunk is not None
        first, last = piece.first[low:high], piece.last[low:high]
        half = (self.chunk.centre + 1) // 2
        count = (last - first) // half + 2
        of = torch.repeat_interleave(torch.arange(len(first), device=first.device), count)
        number = torch.arange(len(of), device=of.device) - (count.cumsum(0) - count)[of]
        begin = first[of] + (number - 1) * half
        end = torch.minimum(begin + self.chunk.centre, last[of] + 1)
        begin = torch.maximum(begin, first[of])
        at = torch.maximum(begin - self.chunk.left, first[of])
        steps = torch.minimum(end + self.chunk.right, last[of] + 1) - at
        return self._whole(piece, low, high, [Cut(at, steps, first[of], last[of], begin, end)], [of])

    def in_turn(self, piece: Piece, low: int, high: int) -> SequenceBatch:
        """Chunks one after another, the state of the forward direction going on."""
        assert self.chunk is not None
        first, last = piece.first[low:high], piece.last[low:high]
        cuts, of = [], torch.arange(len(first), device=first.device)
        for at in range(0, int((last - first).max()) + 1, self.chunk.centre):
            begin = torch.minimum(first + at, last + 1)
            end = torch.minimum(begin + self.chunk.centre, last + 1)
            steps = torch.minimum(end + self.chunk.right, last + 1) - begin
            cuts.append(Cut(begin, steps, first, last, begin, end, end - begin))
        return self._whole(piece, low, high, cuts, [of] * len(cuts))

    def _whole(self, piece: Piece, low: int, high: int, cuts: list[Cut], of: list[torch.Tensor]) -> SequenceBatch:
        """Labels utterance after utterance, whatever the order of the outputs.

        of  by cut: the utterance of every sequence, int64 [B], counted from `low`
        """
        first, last = piece.first[low:high], piece.last[low:high]
        lengths = last - first + 1
        base = lengths.cumsum(0) - lengths
        positions = [_scored_rows(cut) + (base - first)[owner].repeat_interleave(cut.high - cut.low)
                     for cut, owner in zip(cuts, of, strict=True)]
        whole = Cut(first, lengths, first, last, first, last + 1)
        batch = self._batch(piece, whole, lambda sequence: low + sequence, cuts)
        return batch._replace(of_label=torch.cat(positions))

    # -- both -------------------------------------------------------------------------------------------------------

    def _batch(
        self, piece: Piece, labelled: Cut, item_of: Callable[[int], int], cuts: list[Cut] | None = None
    ) -> SequenceBatch:
        """The labels of one cut, and the inputs of others (of the same one)."""
        ends = (labelled.high - labelled.low).cumsum(0)

        def key_of(position: int) -> str:
            return piece.key_of(item_of(int(torch.searchsorted(ends, position, right=True))))

        labels = piece.fields["labels"].index_select(0, _scored_rows(labelled)).long()
        return SequenceBatch(labels, key_of, tuple(self._parts(piece, cuts or [labelled])))

    def _parts(self, piece: Piece, cuts: Iterable[Cut]) -> Iterator[Part]:
        if self.offsets.device != piece.items.device:
            self.offsets = self.offsets.to(piece.items.device)
        for cut in cuts:
            rows_TB = torch.arange(int(cut.steps.max()), device=cut.at.device)[:, None] + cut.at
            window = torch.minimum(rows_TB, cut.last)[..., None] + self.offsets
            window = torch.minimum(torch.maximum(window, cut.first[:, None]), cut.last[:, None])
            inputs = piece.fields["features"].index_select(0, window.flatten()).view(*window.shape, -1)
            said_TB = rows_TB - self.delay
            yield Part(inputs, cut.steps, ((cut.low <= said_TB) & (said_TB < cut.high)).T, cut.kept)


def _scored_rows(cut: Cut) -> torch.Tensor:
    """The rows that outputs count for, sequence after sequence: int64 [M]."""
    counts = cut.high - cut.low
    inside = within(counts, int(counts.max()))
    return (cut.low[:, None] + torch.arange(inside.shape[1], device=inside.device))[inside]


def chunk_starts(starts: torch.Tensor, centre: int) -> torch.Tensor:
    """Where chunks begin, given where utterances begin (and the last ends): int64, the last end included.

    >>> chunk_starts(torch.tensor([0, 70, 100]), 64).tolist()
    [0, 64, 70, 100]
    """
    count = (starts.diff() + centre - 1) // centre
    of = torch.repeat_interleave(torch.arange(len(count)), count)
    number = torch.arange(len(of)) - (count.cumsum(0) - count)[of]
    return torch.cat([starts[of] + number * centre, starts[-1:]])
