"""The Task protocol: what a shard must hold, how a batch is made, what the loss is.

Legend: R rows (frames) in memory, U utterances in memory, N items chosen, B items of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Sums = dict[str, tuple[float, float]]  # metric -> (sum, count): additive, divided once, at the very end


@dataclass
class Piece:
    """A stretch of a data set in memory: what one split trains on until its next piece comes.

    fields  field -> [R, ...]
    items   int64 [N]: the rows of the frames to train on, in training order
    first   int64 [N]: the first row of each item's utterance that is in memory
    last    int64 [N]: the last row of it
    key_of  maps a position in `items` to its utterance's key, for error messages
    """

    fields: dict[str, torch.Tensor]
    items: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    key_of: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.items)


Loss = tuple[torch.Tensor, int, Any]  # summed loss (scalar), items, what the split's next batch starts from


class Task(Protocol):
    """What is trained. A task is made from the data's field descriptions and its recipe options (keyword-only).

    fields  the fields that its data sets must hold, row by row in step
    margin  rows of context that an item needs on either side, within its utterance
    """

    fields: tuple[str, ...]
    margin: int

    def __init__(self, data: Mapping[str, Any], **options: Any): ...

    def model(self, generator: torch.Generator) -> torch.nn.Module:
        """A freshly initialised model (float32, on the CPU); all its randomness comes from `generator`."""

    def check(self, piece: Piece) -> None:
        """Raise ValueError, naming the utterance, if a piece just read cannot be trained on."""

    def collate(self, piece: Piece, low: int, high: int) -> Any:
        """The batch of items [low, high) of a piece."""

    def loss(self, model: torch.nn.Module, batch: Any, carry: Any) -> Loss:
        """The summed loss of a batch, to be differentiated."""

    def metrics(self, model: torch.nn.Module, batch: Any) -> Sums:
        """What validation adds up; holds at least "loss". No gradient is wanted."""

    def predict(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """What the model is for, an item a row: [B, ...] float32."""
