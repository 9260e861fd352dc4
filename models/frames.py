"""The frames task: every frame's class (senone, phone state, speaker), by a CD-DNN or by recurrent layers.

A DNN sees a window of frames; its items are frames. What recurrent layers see at a time, and what their items are, is
`bptt`: whole utterances, chunks of them with context, or lanes of running frames (`chunks.py`); padding never counts.

Source: paper 002, sections 2 and 5 (P(s|o) of a tied state from an observation vector; 7 hidden layers of 2048 to 9304
senones), sigmoid, ReLU, or matrices factored by SVD (table 2, whose low-latency front-end is not here); paper 003,
section 3.1 (11 frames of input; bidirectional LSTM by epoch-wise and context-sensitive-chunk BPTT); paper 001, section
3.5 (SRU and bidirectional SRU acoustic models).

Legend: B frames of a batch, N labels of a batch, M outputs, W = 2 * context + 1 frames of a window, D values a frame, C
classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from torch.nn import functional

from models.chunks import Chunk, Cutter, SequenceBatch
from models.layers.acoustic import DNN, AcousticRNN, dnn_sizes
from models.layers.factored import Factored, factors, largest_rank
from models.layers.recurrent import FORGET_BIAS
from models.task import Carry, Loss, Piece, Sums, Task, Tensors, Unit

# What a network may have; the first is what it has if nothing is said.
OF_SRU = ("tanh", "relu", "identity")
ACTIVATIONS = {"dnn": ("sigmoid", "relu"), "sru": OF_SRU, "sru-later": OF_SRU}


class FrameBatch(NamedTuple):
    """Windows of frames.

    inputs   raw features, float32 [B, W, D]
    labels   int64 [B]
    key_of   maps a position in `labels` to its utterance's key
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    key_of: Callable[[int], str]


class Frames(Task):
    """Frame classification with cross-entropy; metrics: loss (nats a frame) and frame_error.

    data         field descriptions of the training set: features (width, mean, std), labels (classes, names, counts)
    network        "dnn", or a kind of recurrent layer
    bptt           recurrent layers: "utterance", "chunks" or "truncated" (see `chunks.py`). What data.batch counts, and
                   the data is dealt to splits by: utterances, chunks, or frames (lanes times the chunk's frames)
    chunk          of "chunks", "21-64+21" if nothing is said, and of "truncated", "20"; "64+21" for both directions
    delay          recurrent layers of one direction, not with "chunks": frames that outputs come later
    bidirectional  recurrent layers: whether they also run from the last frame to the first
    context        frames stacked on either side, repeated at the utterance's edges
    layers         hidden layers
    width          units a hidden layer; of each direction
    activation     "sigmoid" (the default) or "relu"; of SRU "tanh" (the default), "relu" or "identity"
    factored       DNN: the rank of its matrices, each then the product of two, where that makes it smaller (the input's
                   and the output's too); 0: all are whole
    dropout        standard dropout after each hidden layer; in SRU, of g(c)
    variational    recurrent layers: dropout of what goes into their matrix products, the same at all steps
    forget_bias    recurrent layers: of the gates that keep the state, at the start (not under "uniform" and "normal")
    init           "glorot": uniform of half-range sqrt(6 / (in + out)); "he": normal of deviation sqrt(2 / in);
                   "uniform" and "normal": half-range or deviation `init_range`. Biases start at 0. The first
                   two leave recurrent layers the initialisation that they have themselves. A factored matrix starts
                   as near as its rank allows to a whole one drawn so, which makes it a little smaller.
    init_range     see init

    Raises ValueError for options that the network does not have.
    """

    fields: tuple[str, ...] = ("features", "labels")
    per_row = True

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        network: Literal["dnn", "sru", "sru-later", "lstm", "gru", "qrnn"] = "dnn",
        bptt: Literal["utterance", "chunks", "truncated"] = "utterance",
        chunk: str = "",
        delay: Annotated[int, Ge(0)] = 0,
        bidirectional: bool = False,
        context: Annotated[int, Ge(0)] = 5,
        layers: Annotated[int, Ge(0)] = 3,
        width: Annotated[int, Ge(1)] = 512,
        activation: Literal["", "sigmoid", "relu", "tanh", "identity"] = "",
        factored: Annotated[int, Ge(0)] = 0,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        variational: Annotated[float, Ge(0), Lt(1)] = 0.0,
        forget_bias: float = FORGET_BIAS,
        init: Literal["glorot", "he", "uniform", "normal"] = "glorot",
        init_range: Annotated[float, Gt(0)] = 0.05,
    ):
        known = ACTIVATIONS.get(network, ("",))
        if activation and activation not in known:
            raise ValueError(
                f"task.activation = '{activation}' is none that task.network = '{network}' has; "
                f"{'choose one of ' + ', '.join(known) if known[0] else 'leave it out'}"
            )
        recurrent = {
            "bidirectional": bidirectional, "variational": variational, "forget_bias": forget_bias != FORGET_BIAS,
            "bptt": bptt != "utterance", "chunk": chunk, "delay": delay,
        }
        if network == "dnn" and any(recurrent.values()):
            keys = ", ".join(f"task.{key}" for key, given in recurrent.items() if given)
            raise ValueError(
                f"{keys}: for recurrent networks, and task.network = 'dnn'; leave it out, or set task.network to a "
                "recurrent one, e.g. lstm"
            )
        if network != "dnn" and factored:
            raise ValueError(f"task.factored is for task.network = 'dnn', this is '{network}'; leave it out")
        if network != "dnn" and not layers:
            raise ValueError(f"task.layers = 0: task.network = '{network}' needs at least one")
        self.network, self.bidirectional = network, bidirectional
        self.variational, self.forget_bias = variational, forget_bias
        self.offsets = torch.arange(-context, context + 1)
        self.bptt, self.margin = bptt, context
        if network != "dnn":
            self._settle_cutting(chunk, delay)
        self.layers, self.width, self.activation, self.dropout = layers, width, activation or known[0], dropout
        self.init, self.init_range, self.factored = init, init_range, factored
        self.mean = torch.tensor(data["features"]["mean"], dtype=torch.float32)
        self.deviation = torch.tensor(data["features"]["std"], dtype=torch.float32)
        self.classes: int = data["labels"]["classes"]
        if self.classes < 2:
            raise ValueError(f"the data set has {self.classes} class, nothing to tell apart; prepare at least two")
        largest = max(largest_rank(*size) for size in self._sizes())
        if factored > largest:
            raise ValueError(
                f"task.factored = {factored} would make no matrix of this network smaller; "
                + (f"choose at most {largest}" if largest else "leave it out")
            )

    def _settle_cutting(self, chunk: str, delay: int) -> None:
        """What recurrent layers see at a time. Raises ValueError for what does not go together."""
        both, context = self.bidirectional, self.margin
        if self.bptt == "utterance" and chunk:
            raise ValueError(
                f"task.chunk = '{chunk}' goes with task.bptt = 'chunks' or 'truncated'; leave it out (task.chunk=)"
            )
        if delay and (both or self.bptt == "chunks"):
            raise ValueError(
                f"task.delay = {delay} is for layers of one direction that go on; chunks and layers of both directions "
                "see ahead by themselves: leave it out"
            )
        self.unit: Unit
        self.unit, self.judged = "sequence", "sequence"
        cut = None
        if self.bptt == "chunks":
            cut = Chunk.of(chunk or "21-64+21")
            self.unit, self.steps, self.margin = "chunk", cut.centre, max(cut.left, cut.right) + context
        elif self.bptt == "truncated":
            cut = Chunk.of(chunk or ("64+21" if both else "20"))
            if cut.left or bool(cut.right) != both:
                said = "the past is in the state"
                if not cut.left:
                    said = "both directions need frames ahead" if both else "frames ahead are for task.bidirectional"
                raise ValueError(
                    f"task.chunk = '{chunk}': with task.bptt = 'truncated' {said}; write "
                    f"'{cut.centre}{f'+{cut.right or 21}' if both else ''}'"
                )
            self.unit, self.steps, self.margin = "stream", cut.centre, max(cut.right + context, context, delay, 1)
        self.cutter = Cutter(cut, context, delay)

    def _sizes(self) -> list[tuple[int, int]]:
        return dnn_sizes(len(self.offsets) * len(self.mean), self.layers, self.width, self.classes)

    def model(self) -> torch.nn.Module:
        window = len(self.offsets)
        if self.network == "dnn":
            return DNN(
                self.mean, self.deviation, window, self.layers, self.width, self.classes, self.activation, self.dropout,
                self.factored,
            )
        options: dict[str, Any] = {"activation": self.activation} if self.activation else {}
        return AcousticRNN(
            self.mean, self.deviation, self.network, window, self.layers, self.width, self.classes,
            bidirectional=self.bidirectional, dropout=self.dropout, variational=self.variational,
            forget_bias=self.forget_bias, **options,
        )

    def initialise(self, model: torch.nn.Module, generator: torch.Generator) -> None:
        if isinstance(model, AcousticRNN) and self.init in ("glorot", "he"):
            model.recurrent.initialise(generator)
            self._initialise(model.output, generator)
            return
        self._initialise_all(model, generator)

    def _initialise_all(self, module: torch.nn.Module, generator: torch.Generator) -> None:
        """A module's parameters and its children's, drawn in the same order with factored matrices as with whole."""
        if isinstance(module, Factored):
            whole = torch.nn.Linear(module.down.in_features, module.up.out_features)
            self._initialise(whole, generator)
            module.take_(whole)
            return
        self._initialise(module, generator)
        for child in module.children():
            self._initialise_all(child, generator)

    def _initialise(self, layer: torch.nn.Module, generator: torch.Generator) -> None:
        """A layer's own parameters: matrices as `init` says, vectors zero."""
        with torch.no_grad():
            for parameter in layer.parameters(recurse=False):
                if parameter.ndim == 1:
                    parameter.zero_()
                    continue
                outputs, inputs = parameter.shape
                if self.init == "glorot":
                    bound = math.sqrt(6.0 / (inputs + outputs))
                    parameter.uniform_(-bound, bound, generator=generator)
                elif self.init == "he":
                    parameter.normal_(0.0, math.sqrt(2.0 / inputs), generator=generator)
                elif self.init == "uniform":
                    parameter.uniform_(-self.init_range, self.init_range, generator=generator)
                else:
                    parameter.normal_(0.0, self.init_range, generator=generator)

    def adapted(self, model: torch.nn.Module, tensors: Tensors) -> Tensors:
        """Whole matrices are restructured by SVD where this model has them factored (paper 002, [13])."""
        adapted = dict(tensors)
        for name, layer in model.named_modules():
            weight, bias = f"{name}.weight", f"{name}.bias"
            if isinstance(layer, Factored) and {weight, bias} <= adapted.keys() and adapted[weight].ndim == 2:
                down, up = factors(adapted.pop(weight), layer.down.out_features)
                adapted |= {f"{name}.down.weight": down, f"{name}.up.weight": up, f"{name}.up.bias": adapted.pop(bias)}
        return adapted

    def check(self, piece: Piece) -> None:
        features, labels = piece.fields["features"], piece.fields["labels"]
        if features.shape[1:] != self.mean.shape:
            raise ValueError(
                f"utterance '{piece.key_of(0)}' has {features.shape[1]} values a frame, the model takes "
                f"{len(self.mean)}; prepare the data as the model's training data was prepared"
            )
        wrong = torch.nonzero((labels < 0) | (labels >= self.classes)).flatten()
        held = torch.nonzero((piece.first <= wrong[:1]) & (wrong[:1] <= piece.last)).flatten() if len(wrong) else wrong
        if len(held):
            raise ValueError(
                f"utterance '{piece.key_of(int(held[0]))}' has label {int(labels[wrong[0]])}, the data set has classes "
                f"0 to {self.classes - 1}; run 'trireme prepare' again with the right --classes"
            )

    def collate(self, piece: Piece, low: int, high: int) -> FrameBatch | SequenceBatch:
        if self.network != "dnn":
            return self._cut(piece, low, high)
        items = piece.items[low:high]
        if self.offsets.device != items.device:
            self.offsets = self.offsets.to(items.device)
        window = items[:, None] + self.offsets
        window = torch.minimum(torch.maximum(window, piece.first[low:high, None]), piece.last[low:high, None])
        inputs = piece.fields["features"].index_select(0, window.flatten()).view(*window.shape, -1)
        labels = piece.fields["labels"].index_select(0, items).long()
        return FrameBatch(inputs, labels, lambda position: piece.key_of(low + position))

    def _cut(self, piece: Piece, low: int, high: int) -> SequenceBatch:
        """Items of recurrent layers: what the piece's are, which may be whole utterances to be decoded."""
        if piece.unit == "chunk":
            return self.cutter.chunks(piece, low, high)
        if piece.unit == "stream":
            return self.cutter.stretch(piece, low, high)
        if self.bptt == "chunks":
            return self.cutter.overlapping(piece, low, high)
        if self.bptt == "truncated" and self.bidirectional:
            return self.cutter.in_turn(piece, low, high)
        return self.cutter.utterances(piece, low, high)

    def _outputs(
        self, model: torch.nn.Module, batch: FrameBatch | SequenceBatch, carry: Carry
    ) -> tuple[torch.Tensor, Carry]:
        """A logit, or log posterior, of every label's frame [N, C], and what the next batch starts from."""
        if isinstance(batch, FrameBatch):
            return model(batch.inputs).float(), None
        state, outputs = batch.started(carry), []
        wanted = batch.end is not None or len(batch.parts) > 1
        for part in batch.parts:
            logits_MC, state = model(*part[:3], state, part.kept, wanted)
            outputs.append(logits_MC.float())
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return batch.by_label(whole), batch.carried(state)

    def loss(self, model: torch.nn.Module, batch: FrameBatch | SequenceBatch, carry: Carry) -> Loss:
        logits_NC, carry = self._outputs(model, batch, carry)
        return functional.cross_entropy(logits_NC, batch.labels, reduction="sum"), len(batch.labels), carry

    def metrics(
        self, model: torch.nn.Module, batch: FrameBatch | SequenceBatch, carry: Carry
    ) -> tuple[Sums, Carry]:
        logits_NC, carry = self._outputs(model, batch, carry)
        loss = functional.cross_entropy(logits_NC, batch.labels, reduction="none").double().sum()
        errors = (logits_NC.argmax(1) != batch.labels).sum()
        count = float(len(batch.labels))
        return {"loss": (float(loss.detach()), count), "frame_error": (float(errors), count)}, carry

    def predict(self, model: torch.nn.Module, batch: FrameBatch | SequenceBatch) -> torch.Tensor:
        """Log posteriors, nats: [B, C], or [N, C], utterance after utterance."""
        return functional.log_softmax(self._outputs(model, batch, None)[0], 1)
