"""The sentences task: the class of a whole sentence from its words, by a recurrent encoder or a wide CNN.

Source: paper 001, section 3.1 and table 1 (2 layers of 128 units, 4 for SST; the last hidden state predicts the class;
word vectors of unit length, fixed; dropout probability tuned), and Kim (2014) for the CNN.

Legend: T words of the batch's longest sentence, B sentences, D values a word, V words known, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Lt
from torch.nn import functional

from models.layers.recurrent import FORGET_BIAS, Recurrent
from models.layers.wide_cnn import WideCNN
from models.task import Carry, Loss, Piece, Sums, Task, Unit
from models.word_vectors import read_vectors

HALF_RANGE = 0.25  # of words that no file gives a vector (Kim 2014, section 3.1)


class SentenceBatch(NamedTuple):
    """words: [T, B] int64, 0 in the padding; lengths: [B] int64; labels: [B] int64; key_of: position -> key."""

    words: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    key_of: Callable[[int], str]


class Classifier(torch.nn.Module):
    """Word vectors, an encoder, dropout, and a linear layer to the classes.

    A recurrent encoder's output at a sentence's last word (of a backward direction: at its first) is what it says of
    the sentence: the last hidden state h, not SRU's inner state c.
    """

    def __init__(
        self, words: int, width: int, encoder: Recurrent | WideCNN, classes: int, dropout: float, backward: bool
    ):
        super().__init__()
        self.backward_outputs = encoder.outputs // 2 if backward else 0
        self.embedding = torch.nn.Embedding(words, width)
        self.encoder = encoder
        self.dropout = torch.nn.Dropout(dropout)
        self.output = torch.nn.Linear(encoder.outputs, classes)

    def forward(self, words_TB: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        x_TBD = self.embedding(words_TB)
        if isinstance(self.encoder, WideCNN):
            return self.output(self.dropout(self.encoder(x_TBD, lengths)))
        h_TBD = self.encoder(x_TBD, lengths, wanted=False)[0]
        last_BD = h_TBD[lengths - 1, torch.arange(len(lengths), device=lengths.device)]
        if self.backward_outputs:
            forward = h_TBD.shape[2] - self.backward_outputs
            last_BD = torch.cat([last_BD[:, :forward], h_TBD[0, :, forward:]], dim=1)
        return self.output(self.dropout(last_BD))


class Sentences(Task):
    """Sentence classification with cross-entropy; metrics: loss (nats a sentence) and error (the share taken wrongly).

    data           field descriptions of the training set: words (classes, names, unknown), labels (classes)
    encoder        "sru", "sru-later", "lstm", "gru", "qrnn" (models/layers/recurrent.py), or "cnn", the wide CNN, which
                   the next three options do not concern
    layers         of the encoder
    width          units of a layer, in each direction
    bidirectional  whether every layer also runs from the last word to the first
    embedding      values of a word's vector
    vectors        a text file of word vectors (GloVe, word2vec) to start from; empty: random vectors are learned
    fixed_vectors  with `vectors`: words' vectors are put to unit length, those without one included, and never trained
    dropout        the one probability that is tuned. Recurrent encoders: variational dropout (one mask for all words)
                   of what goes into every layer's products, the first layer's word vectors too, and standard dropout
                   before the output. The CNN: before the output alone, as in Kim (2014)
    forget_bias    recurrent encoders: of the gates that keep the state, at the start
    activation     SRU's g: "tanh", "relu" or "identity"
    highway        SRU's W_h: "fit", only where sizes differ, or "always"

    Vectors that are not in the file are drawn between -0.25 and 0.25; the unknown word's is 0.
    """

    fields: tuple[str, ...] = ("words",)
    targets: tuple[str, ...] = ("labels",)
    unit: Unit = "sequence"
    noun: str = "sentences"

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        encoder: Literal["sru", "sru-later", "lstm", "gru", "qrnn", "cnn"] = "sru",
        layers: Annotated[int, Ge(1)] = 2,
        width: Annotated[int, Ge(1)] = 128,
        bidirectional: bool = False,
        embedding: Annotated[int, Ge(1)] = 300,
        vectors: str = "",
        fixed_vectors: bool = True,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.5,
        forget_bias: float = FORGET_BIAS,
        activation: Literal["tanh", "relu", "identity"] = "tanh",
        highway: Literal["fit", "always"] = "fit",
    ):
        self.names: list[str] = data["words"]["names"]
        self.unknown: int = data["words"]["unknown"]
        self.classes: int = data["labels"]["classes"]
        if self.classes < 2:
            raise ValueError(f"the data set has {self.classes} class, nothing to tell apart; prepare at least two")
        self.options: dict[str, Any] = {"forget_bias": forget_bias}
        if encoder.startswith("sru"):
            self.options |= {"activation": activation, "highway": highway}
        elif (activation, highway) != ("tanh", "fit"):
            raise ValueError(f"task.activation and task.highway are SRU's; encoder = '{encoder}' has none")
        if encoder == "cnn" and bidirectional:
            raise ValueError("task.bidirectional is for recurrent encoders; leave it out")
        self.encoder, self.layers, self.width, self.bidirectional = encoder, layers, width, bidirectional
        self.embedding, self.vectors, self.fixed, self.dropout = embedding, vectors, fixed_vectors, dropout

    def model(self) -> torch.nn.Module:
        encoder: Recurrent | WideCNN
        if self.encoder == "cnn":
            encoder = WideCNN(self.embedding)
        else:
            encoder = Recurrent(
                self.encoder, self.embedding, self.width, self.layers, bidirectional=self.bidirectional,
                variational=self.dropout, **self.options,
            )
        model = Classifier(len(self.names), self.embedding, encoder, self.classes, self.dropout, self.bidirectional)
        model.embedding.weight.requires_grad_(not (self.vectors and self.fixed))
        return model

    def initialise(self, model: torch.nn.Module, generator: torch.Generator) -> None:
        """Fresh weights; word vectors from their file. Raises ValueError if that is of another width; OSError."""
        assert isinstance(model, Classifier)
        vectors_VD = torch.empty(model.embedding.weight.shape).uniform_(-HALF_RANGE, HALF_RANGE, generator=generator)
        if self.vectors:
            self._take_vectors(vectors_VD)
        vectors_VD[self.unknown] = 0.0
        half_range = 1.0 / math.sqrt(model.output.in_features)
        with torch.no_grad():
            model.embedding.weight.copy_(vectors_VD)
            model.output.weight.uniform_(-half_range, half_range, generator=generator)
            model.output.bias.zero_()
        model.encoder.initialise(generator)

    def _take_vectors(self, vectors_VD: torch.Tensor) -> None:
        """Put the file's vectors into the rows of their words, in place."""
        found, width = read_vectors(self.vectors, self.names)
        if width != self.embedding:
            raise ValueError(
                f"'{self.vectors}' has vectors of {width} values, task.embedding is {self.embedding}; set it to {width}"
            )
        if not found:
            raise ValueError(f"'{self.vectors}' has none of the data set's {len(self.names)} words; is it their file?")
        for number, word in enumerate(self.names):
            if word in found:
                vectors_VD[number] = torch.from_numpy(found[word])
        if self.fixed:
            vectors_VD /= vectors_VD.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def check(self, piece: Piece) -> None:
        labels, starts = piece.targets["labels"]
        rows = starts.diff()[piece.sequence]
        if (rows != 1).any():
            at = int(torch.nonzero(rows != 1)[0])
            raise ValueError(
                f"sentence '{piece.key_of(at)}' has {int(rows[at])} labels, expected 1; run 'trireme prepare sentences'"
            )
        classes = labels[starts[piece.sequence]]
        wrong = (classes < 0) | (classes >= self.classes)
        if wrong.any():
            at = int(torch.nonzero(wrong)[0])
            raise ValueError(
                f"sentence '{piece.key_of(at)}' has label {int(classes[at])}, the data set has classes 0 to "
                f"{self.classes - 1}; run 'trireme prepare sentences' again"
            )
        words = piece.fields["words"]
        outside = (words < 0) | (words >= len(self.names))
        if outside.any():
            row = int(torch.nonzero(outside)[0])
            at = int(torch.nonzero((piece.first <= row) & (row <= piece.last))[0])
            raise ValueError(
                f"sentence '{piece.key_of(at)}' has word {int(words[row])}, the model knows words 0 to "
                f"{len(self.names) - 1}; prepare the data together with the model's training data"
            )

    def collate(self, piece: Piece, low: int, high: int) -> SentenceBatch:
        first, last = piece.first[low:high], piece.last[low:high]
        lengths = last - first + 1
        steps = torch.arange(int(lengths.max()), device=first.device)[:, None]
        words_TB = piece.fields["words"][torch.minimum(first + steps, last)].long()
        labels, starts = piece.targets["labels"]
        return SentenceBatch(
            torch.where(steps < lengths, words_TB, 0), lengths, labels[starts[piece.sequence[low:high]]].long(),
            lambda position: piece.key_of(low + position),
        )

    def loss(self, model: torch.nn.Module, batch: SentenceBatch, carry: Carry) -> Loss:
        logits_BC = model(batch.words, batch.lengths)
        return functional.cross_entropy(logits_BC.float(), batch.labels, reduction="sum"), len(batch.labels), None

    def metrics(self, model: torch.nn.Module, batch: SentenceBatch, carry: Carry) -> tuple[Sums, Carry]:
        logits_BC = model(batch.words, batch.lengths).float()
        loss = functional.cross_entropy(logits_BC, batch.labels, reduction="none").double().sum()
        errors = (logits_BC.argmax(1) != batch.labels).sum()
        count = float(len(batch.labels))
        return {"loss": (float(loss.detach()), count), "error": (float(errors), count)}, None

    def predict(self, model: torch.nn.Module, batch: SentenceBatch) -> torch.Tensor:
        """Log posteriors [B, C], nats."""
        return functional.log_softmax(model(batch.words, batch.lengths).float(), 1)
