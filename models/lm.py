"""Word language models: recurrent layers over a stream of words, truncated back-propagation through time.

Source: paper 001, section 3.3: a long text read in 32 lanes, 35 steps a batch, hidden state carried on; dropout on the
input embedding and before the output softmax, variational and standard dropout in the recurrent layers; input and
output embeddings tied (Press and Wolf 2017; Inan et al. 2017).

Legend: T steps, B lanes, V words of the vocabulary, E values of an embedding, D units of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Lt
from torch.nn import functional

from models.layers.recurrent import FORGET_BIAS, Kind, Recurrent, State
from models.task import Carry, Loss, Piece, Sums, Task, Unit

Rate = Annotated[float, Ge(0), Lt(1)]
MOST_NATS = 700.0  # a word's loss whose perplexity is still a float64


class WordBatch(NamedTuple):
    """inputs, targets: [T, B] int64, targets one step on; key_of: position in the batch, laid flat -> utterance key."""

    inputs: torch.Tensor
    targets: torch.Tensor
    key_of: Any


class WordModel(torch.nn.Module):
    """Words in, logits of the next words out.

    words              V
    recurrent          the layers, taking E values a step
    tied               the output layer's weights are the embeddings, [V, E]; layers of another width are brought to E
                       by a product with a matrix first
    dropout_embedding  of embeddings, every value by itself
    dropout_output     of what goes into the output layer
    """

    def __init__(
        self, words: int, embedding: int, recurrent: Recurrent, tied: bool, dropout_embedding: float,
        dropout_output: float,
    ):
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.zeros(words, embedding))
        self.recurrent = recurrent
        width = recurrent.outputs
        self.project = torch.nn.Linear(width, embedding, bias=False) if tied and embedding != width else None
        self.output = None if tied else torch.nn.Parameter(torch.zeros(words, width))
        self.bias = torch.nn.Parameter(torch.zeros(words))
        self.dropout_embedding, self.dropout_output = dropout_embedding, dropout_output

    def forward(self, words_TB: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """Logits [T, B, V] of the words after these, and the layers' states after the last step."""
        x_TBE = functional.embedding(words_TB, self.embedding)
        x_TBE = functional.dropout(x_TBE, self.dropout_embedding, self.training)
        h_TBD, after = self.recurrent(x_TBE, None, state)
        if self.project is not None:
            h_TBD = self.project(h_TBD)
        h_TBD = functional.dropout(h_TBD, self.dropout_output, self.training)
        weight = self.embedding if self.output is None else self.output
        return functional.linear(h_TBD, weight, self.bias), after


class LanguageModel(Task):
    """The next word, with cross-entropy; metrics: loss (nats a word), from which perplexity follows.

    data               field descriptions of the training set: words (classes, names)
    kind               of layer: "sru", "sru-later", "lstm", "gru" or "qrnn"
    layers, width      how many, of how many units
    embedding          values of a word's embedding; 0: as many as `width`
    tied               whether the output layer shares the embeddings
    steps              words of a lane that gradients flow back over
    dropout_embedding  of embeddings, every value by itself
    dropout_output     before the output layer
    dropout            standard dropout in the layers
    variational        variational dropout in the layers: one mask for all steps of a batch
    forget_bias        of the gates that keep the state, at the start
    activation         SRU's g
    highway            SRU's W_h: "fit": where widths differ; "always": in every layer (appendix A.1)
    highway_bias       SRU's b_r at the start; below 0, a layer begins by passing on what it is given
    init_range         half-range of embeddings and output weights at the start; 0: a deviation of 1 / sqrt(inputs)
    """

    fields: tuple[str, ...] = ("words",)
    unit: Unit = "stream"
    noun = "words"

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        kind: Kind = "sru",
        layers: Annotated[int, Ge(1)] = 3,
        width: Annotated[int, Ge(1)] = 512,
        embedding: Annotated[int, Ge(0)] = 0,
        tied: bool = True,
        steps: Annotated[int, Ge(1)] = 35,
        dropout_embedding: Rate = 0.0,
        dropout_output: Rate = 0.0,
        dropout: Rate = 0.0,
        variational: Rate = 0.0,
        forget_bias: float = FORGET_BIAS,
        activation: Literal["tanh", "relu", "identity"] = "tanh",
        highway: Literal["fit", "always"] = "fit",
        highway_bias: float = 0.0,
        init_range: Annotated[float, Ge(0)] = 0.0,
    ):
        self.words: int = data["words"]["classes"]
        self.steps, self.tied, self.init_range = steps, tied, init_range
        self.embedding = embedding or width
        self.shape: tuple[Kind, int, int] = (kind, width, layers)
        self.options: dict[str, Any] = {"variational": variational, "dropout": dropout, "forget_bias": forget_bias}
        if kind in ("sru", "sru-later"):
            self.options |= {"activation": activation, "highway": highway, "highway_bias": highway_bias}
        elif (activation, highway, highway_bias) != ("tanh", "fit", 0.0):
            raise ValueError(
                f"task.activation, task.highway and task.highway_bias are SRU's, task.kind is '{kind}'; leave them out"
            )
        self.dropout_embedding, self.dropout_output = dropout_embedding, dropout_output

    def model(self) -> torch.nn.Module:
        kind, width, layers = self.shape
        recurrent = Recurrent(kind, self.embedding, width, layers, **self.options)
        return WordModel(
            self.words, self.embedding, recurrent, self.tied, self.dropout_embedding, self.dropout_output
        )

    def initialise(self, model: torch.nn.Module, generator: torch.Generator) -> None:
        assert isinstance(model, WordModel)
        project = None if model.project is None else model.project.weight
        with torch.no_grad():
            for weight in (model.embedding, model.output, project):
                if weight is not None:
                    bound = self.init_range or math.sqrt(3.0 / weight.shape[1])
                    weight.uniform_(-bound, bound, generator=generator)
            model.bias.zero_()
            model.recurrent.initialise(generator)

    def check(self, piece: Piece) -> None:
        rows = torch.cat([piece.items, piece.items + 1])
        words = piece.fields["words"][rows]
        wrong = (words < 0) | (words >= self.words)
        if wrong.any():
            at = int(torch.nonzero(wrong)[0])
            raise ValueError(
                f"'{piece.key_of(at % len(piece))}' holds word number {int(words[at])}, the vocabulary has 0 to "
                f"{self.words - 1}; run 'trireme prepare' again"
            )

    def collate(self, piece: Piece, low: int, high: int) -> WordBatch:
        items = piece.items[low:high].view(-1, piece.lanes)
        words = piece.fields["words"]
        return WordBatch(words[items].long(), words[items + 1].long(), lambda position: piece.key_of(low + position))

    def loss(self, model: torch.nn.Module, batch: WordBatch, carry: Carry) -> Loss:
        logits_TBV, state = model(batch.inputs, carry)
        total = functional.cross_entropy(_float(logits_TBV), batch.targets.flatten(), reduction="sum")
        return total, batch.targets.numel(), _detached(state)

    def metrics(self, model: torch.nn.Module, batch: WordBatch, carry: Carry) -> tuple[Sums, Carry]:
        logits_TBV, state = model(batch.inputs, carry)
        nats = functional.cross_entropy(_float(logits_TBV), batch.targets.flatten(), reduction="none")
        return {"loss": (float(nats.double().sum()), float(len(nats)))}, _detached(state)

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Perplexity, from the loss of all words."""
        return {"perplexity": math.exp(min(metrics["loss"], MOST_NATS))}


def _float(logits_TBV: torch.Tensor) -> torch.Tensor:
    """Logits [T * B, V] float32: the very same memory, if they are float32."""
    return logits_TBV.flatten(0, 1).float()


def _detached(state: State) -> State:
    return tuple(part.detach() for part in state)
