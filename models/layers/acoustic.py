"""Acoustic models: a DNN over windows of frames, and recurrent layers over utterances or parts of them.

The data's mean and deviation are buffers of both, so that a saved model can be fed raw features.

Legend: T frames of the longest sequence, B windows or sequences of a batch, W frames of a window, D values a frame, C
classes, N outputs that count.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from models.layers.factored import linear
from models.layers.recurrent import Kind, Recurrent, State

ACTIVATIONS = {"sigmoid": torch.nn.Sigmoid, "relu": torch.nn.ReLU}


class Normal(torch.nn.Module):
    """Values to mean 0 and deviation 1.

    mean, deviation  [D], of the training set
    """

    def __init__(self, mean_D: torch.Tensor, deviation_D: torch.Tensor):
        super().__init__()
        self.mean: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("mean", mean_D.clone())
        self.register_buffer("scale", 1.0 / deviation_D)

    def normal(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs - self.mean) * self.scale


class DNN(Normal):
    """`layers` fully connected layers of `width` units over a normalised window, then `classes` logits.

    factored  the rank of every matrix that is smaller as two factors; 0: all are whole
    """

    def __init__(
        self, mean_D: torch.Tensor, deviation_D: torch.Tensor, window: int, layers: int, width: int, classes: int,
        activation: str, dropout: float, factored: int = 0,
    ):
        super().__init__(mean_D, deviation_D)
        *of_hidden, of_output = dnn_sizes(window * len(mean_D), layers, width, classes)
        hidden: list[torch.nn.Module] = []
        for inputs, outputs in of_hidden:
            hidden += [linear(inputs, outputs, factored), ACTIVATIONS[activation]()]
            if dropout:
                hidden.append(torch.nn.Dropout(dropout))
        self.hidden = torch.nn.Sequential(*hidden)
        self.output = linear(*of_output, factored)

    def forward(self, inputs_BWD: torch.Tensor) -> torch.Tensor:
        """Raw windows [B, W, D] to logits [B, C]."""
        return self.output(self.hidden(self.normal(inputs_BWD).flatten(1)))


def dnn_sizes(inputs: int, layers: int, width: int, classes: int) -> list[tuple[int, int]]:
    """Inputs and outputs of every matrix of a DNN, from the first to the output's."""
    return list(pairwise([inputs, *[width] * layers, classes]))


class AcousticRNN(Normal):
    """Recurrent layers over normalised windows, then `classes` logits a frame.

    kind     of layer: see `Recurrent`, which takes `options` too
    window   W
    """

    def __init__(
        self, mean_D: torch.Tensor, deviation_D: torch.Tensor, kind: Kind, window: int, layers: int, width: int,
        classes: int, **options: object,
    ):
        super().__init__(mean_D, deviation_D)
        self.recurrent = Recurrent(kind, window * len(mean_D), width, layers, **options)  # type: ignore[arg-type]
        self.output = torch.nn.Linear(self.recurrent.outputs, classes)

    def forward(
        self, inputs_TBWD: torch.Tensor, lengths: torch.Tensor, scored_BT: torch.Tensor, state: State | None = None,
        kept: torch.Tensor | None = None, wanted: bool = True,
    ) -> tuple[torch.Tensor, State]:
        """Raw windows of sequences to logits [N, C] of the outputs that count, sequence after sequence; and the state.

        lengths    int64 [B]
        scored_BT  bool: which outputs count
        state      what an earlier call returned, to go on from; None: zeros
        kept       int64 [B]: after how many steps the state is wanted; None: at the end
        wanted     whether it is wanted at all
        """
        h_TBH, state = self.recurrent(self.normal(inputs_TBWD).flatten(2), lengths, state, kept, wanted)
        return self.output(h_TBH.transpose(0, 1)[scored_BT]), state


def within(lengths: torch.Tensor, steps: int) -> torch.Tensor:
    """Which steps belong to sequences of these lengths [B]: bool [B, T]."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]
