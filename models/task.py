"""The Task protocol: what a shard must hold, how a batch is made, what the loss is.

Legend: R rows (frames, words) in memory, U utterances in memory, N items chosen, B items of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

Unit = Literal["row", "sequence", "chunk", "stream"]
Sums = dict[str, tuple[float, float]]  # metric -> (sum, count): additive, divided once, at the very end
Carry = tuple[torch.Tensor, ...] | None  # what a split's next batch starts from (hidden state); None: from nothing
Tensors = dict[str, torch.Tensor]  # a model's parameters and buffers by name
Loss = tuple[torch.Tensor, int, Carry]  # summed loss (scalar), what it counts, and what comes out to go on from


@dataclass
class Piece:
    """A stretch of a data set in memory: what one split trains on until its next piece comes.

    fields    field -> [R, ...]
    items     int64 [N]: the rows to train on, in training order; unit "sequence": their first rows
    first     int64 [N]: the first row of each item's utterance that is in memory
    last      int64 [N]: the last row of it
    key_of    maps a position in `items` to its utterance's key, for error messages
    targets   field with rows of its own -> its rows [R', ...] and where each utterance's begin, int64 [U + 1]
    sequence  int64 [N]: each item's utterance, counted as in `targets`
    lanes     unit "stream": sequences side by side; `items` of a batch are [steps, lanes], laid flat
    unit      what the items are
    """

    fields: dict[str, torch.Tensor]
    items: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    key_of: Callable[[int], str]
    targets: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    sequence: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    lanes: int = 1
    unit: Unit = "row"

    def __len__(self) -> int:
        return len(self.items)

    def take_(self, positions: torch.Tensor) -> None:
        """Keep these items, int64 [N'], in this order, in place."""
        key_of = self.key_of
        self.items, self.first, self.last = self.items[positions], self.first[positions], self.last[positions]
        self.sequence = self.sequence[positions] if self.targets else self.sequence
        self.key_of = lambda position: key_of(int(positions[position]))

    def move_(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put all tensors where `place` puts them, in place."""
        self.fields = {name: place(values) for name, values in self.fields.items()}
        self.targets = {name: (place(values), place(starts)) for name, (values, starts) in self.targets.items()}
        self.items, self.first, self.last = place(self.items), place(self.first), place(self.last)
        self.sequence = place(self.sequence)


class Task(Protocol):
    """What is trained. A task is made from the data's field descriptions and its recipe options (keyword-only).

    fields   the fields that its data sets must hold, row by row in step
    targets  the fields that have rows of their own for every utterance (unit "sequence" only)
    unit     what an item is: a "row" (frame), a whole "sequence", a "chunk" of one, or a row of a running "stream"
    judged   what an item is in evaluation and prediction, if that is another: "sequence"
    noun     the plural of what the loss counts, for people: "frames", "sentences", "words"
    margin   units "row", "chunk" and "stream": rows that an item needs on either side, within its utterance; a stream
             that has one is of utterances, one without of running text
    per_row  whether the loss counts rows (a label a frame), not sequences
    steps    rows of a chunk; unit "stream": the steps of a batch, over which gradients flow back
    """

    fields: tuple[str, ...]
    targets: tuple[str, ...] = ()
    unit: Unit = "row"
    judged: Unit | None = None
    noun: str = "frames"
    margin: int = 0
    per_row: bool = False
    steps: int = 1

    def __init__(self, data: Mapping[str, Any], **options: Any): ...

    def model(self) -> torch.nn.Module:
        """A model (float32, on the CPU), its weights whatever they are: they are initialised or loaded next."""

    def initialise(self, model: torch.nn.Module, generator: torch.Generator) -> None:
        """Fresh weights; all their randomness comes from `generator`."""

    def adapted(self, model: torch.nn.Module, tensors: Tensors) -> Tensors:
        """What a finished run learned, as this recipe's model holds it, where a run starts from another recipe's model
        (`init_from`). What cannot be turned into it stays as it is, and is complained of by who loads it."""
        return tensors

    def check(self, piece: Piece) -> None:
        """Raise ValueError, naming the utterance, if a piece just read cannot be trained on."""

    def collate(self, piece: Piece, low: int, high: int) -> Any:
        """The batch of items [low, high) of a piece; has a `key_of` as the piece has."""

    def loss(self, model: torch.nn.Module, batch: Any, carry: Carry) -> Loss:
        """The summed loss of a batch, to be differentiated, and a carry without gradients."""

    def metrics(self, model: torch.nn.Module, batch: Any, carry: Carry) -> tuple[Sums, Carry]:
        """What validation adds up; holds at least "loss". No gradient is wanted."""

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Further metrics that follow from the whole data set's (perplexity from the loss)."""
        return {}

    def predict(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """What the model is for, float32: an item a row [B, ...]; with `per_row`, the items' rows one after another."""
