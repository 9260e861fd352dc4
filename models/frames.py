"""The frames task: a CD-DNN that names every frame's class (senone, phone state, speaker) from a window of frames.

Source: paper 002, sections 2 and 5 (P(s|o) of a tied state from an observation vector; 7 hidden layers of 2048 to 9304
senones), sigmoid or ReLU (table 2); paper 003, section 3.1 (11 frames of input).

Legend: B frames of a batch, W = 2 * context + 1 frames of a window, D values a frame, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from torch.nn import functional

from models.task import Loss, Piece, Sums

ACTIVATIONS = {"sigmoid": torch.nn.Sigmoid, "relu": torch.nn.ReLU}


class FrameBatch(NamedTuple):
    """inputs: [B, W, D] float32, raw features; labels: [B] int64; key_of: position -> utterance key."""

    inputs: torch.Tensor
    labels: torch.Tensor
    key_of: Any


class DNN(torch.nn.Module):
    """`layers` fully connected layers of `width` units over a normalised window, then `classes` logits.

    The data's mean and deviation are buffers, so the saved model can be fed raw features.
    """

    def __init__(
        self, mean_D: torch.Tensor, deviation_D: torch.Tensor, window: int, layers: int, width: int, classes: int,
        activation: str, dropout: float,
    ):
        super().__init__()
        self.mean: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("mean", mean_D.clone())
        self.register_buffer("scale", 1.0 / deviation_D)
        sizes = [window * len(mean_D)] + [width] * layers
        hidden: list[torch.nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            hidden += [torch.nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
            if dropout:
                hidden.append(torch.nn.Dropout(dropout))
        self.hidden = torch.nn.Sequential(*hidden)
        self.output = torch.nn.Linear(sizes[-1], classes)

    def forward(self, inputs_BWD: torch.Tensor) -> torch.Tensor:
        """Raw windows [B, W, D] to logits [B, C]."""
        normal = (inputs_BWD - self.mean) * self.scale
        return self.output(self.hidden(normal.flatten(1)))


class Frames:
    """Frame classification with cross-entropy; metrics: loss (nats a frame) and frame_error.

    data         field descriptions of the training set: features (width, mean, std), labels (classes, names, counts)
    context      frames stacked on either side, repeated at the utterance's edges
    layers       hidden layers
    width        units a hidden layer
    activation   "sigmoid" or "relu"
    dropout      standard dropout after each hidden layer
    init         "glorot": uniform of half-range sqrt(6 / (in + out)); "he": normal of deviation sqrt(2 / in);
                 "uniform" and "normal": half-range or deviation `init_range`. Biases start at 0.
    init_range   see init
    """

    fields: tuple[str, ...] = ("features", "labels")

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        context: Annotated[int, Ge(0)] = 5,
        layers: Annotated[int, Ge(0)] = 3,
        width: Annotated[int, Ge(1)] = 512,
        activation: Literal["sigmoid", "relu"] = "sigmoid",
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        init: Literal["glorot", "he", "uniform", "normal"] = "glorot",
        init_range: Annotated[float, Gt(0)] = 0.05,
    ):
        self.margin = context
        self.layers, self.width, self.activation, self.dropout = layers, width, activation, dropout
        self.init, self.init_range = init, init_range
        self.mean = torch.tensor(data["features"]["mean"], dtype=torch.float32)
        self.deviation = torch.tensor(data["features"]["std"], dtype=torch.float32)
        self.classes: int = data["labels"]["classes"]
        if self.classes < 2:
            raise ValueError(f"the data set has {self.classes} class, nothing to tell apart; prepare at least two")
        self.offsets = torch.arange(-context, context + 1)

    def model(self, generator: torch.Generator) -> torch.nn.Module:
        model = DNN(
            self.mean, self.deviation, 2 * self.margin + 1, self.layers, self.width, self.classes, self.activation,
            self.dropout,
        )
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                self._initialise(module, generator)
        return model

    def _initialise(self, layer: torch.nn.Linear, generator: torch.Generator) -> None:
        with torch.no_grad():
            layer.bias.zero_()
            if self.init == "glorot":
                bound = math.sqrt(6.0 / (layer.in_features + layer.out_features))
                layer.weight.uniform_(-bound, bound, generator=generator)
            elif self.init == "he":
                layer.weight.normal_(0.0, math.sqrt(2.0 / layer.in_features), generator=generator)
            elif self.init == "uniform":
                layer.weight.uniform_(-self.init_range, self.init_range, generator=generator)
            else:
                layer.weight.normal_(0.0, self.init_range, generator=generator)

    def check(self, piece: Piece) -> None:
        features, labels = piece.fields["features"], piece.fields["labels"][piece.items]
        if features.shape[1:] != self.mean.shape:
            raise ValueError(
                f"utterance '{piece.key_of(0)}' has {features.shape[1]} values a frame, the model takes "
                f"{len(self.mean)}; prepare the data as the model's training data was prepared"
            )
        wrong = (labels < 0) | (labels >= self.classes)
        if wrong.any():
            at = int(torch.nonzero(wrong)[0])
            raise ValueError(
                f"utterance '{piece.key_of(at)}' has label {int(labels[at])}, the data set has classes 0 to "
                f"{self.classes - 1}; run 'trireme prepare' again with the right --classes"
            )

    def collate(self, piece: Piece, low: int, high: int) -> FrameBatch:
        items = piece.items[low:high]
        if self.offsets.device != items.device:
            self.offsets = self.offsets.to(items.device)
        window = items[:, None] + self.offsets
        window = torch.minimum(torch.maximum(window, piece.first[low:high, None]), piece.last[low:high, None])
        inputs = piece.fields["features"].index_select(0, window.flatten()).view(*window.shape, -1)
        labels = piece.fields["labels"].index_select(0, items).long()
        return FrameBatch(inputs, labels, lambda position: piece.key_of(low + position))

    def loss(self, model: torch.nn.Module, batch: FrameBatch, carry: None) -> Loss:
        logits_BC = model(batch.inputs)
        return functional.cross_entropy(logits_BC.float(), batch.labels, reduction="sum"), len(batch.labels), None

    def metrics(self, model: torch.nn.Module, batch: FrameBatch) -> Sums:
        logits_BC = model(batch.inputs).float()
        loss = functional.cross_entropy(logits_BC, batch.labels, reduction="none").double().sum()
        errors = (logits_BC.argmax(1) != batch.labels).sum()
        count = float(len(batch.labels))
        return {"loss": (float(loss.detach()), count), "frame_error": (float(errors), count)}

    def predict(self, model: torch.nn.Module, batch: FrameBatch) -> torch.Tensor:
        """Log posteriors [B, C], nats."""
        return functional.log_softmax(model(batch.inputs).float(), 1)
