"""Recurrent layers under one interface, so that a task swaps them by a name: SRU, LSTM, GRU, a QRNN-like convolution.

Length-major: the step comes first, as paper 001's equation (8) has it. A sequence that is shorter than the batch's
longest ends where it ends: its outputs beyond are 0, its state is that of its last step, and what stands in the padding
never changes anything, as long as it is finite.

Dropout as in paper 001, section 2.1: variational (one mask for all steps) on what goes into matrix products, standard
(a mask for every step) on g(c) before SRU's highway; other cells, which have none, have it on their outputs. Masks come
from torch's global generator.

Legend: T steps, B sequences, I inputs, D units of a layer, N layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from kernels import sru

State = tuple[torch.Tensor, ...]
Kind = Literal["sru", "sru-later", "lstm", "gru", "qrnn"]
GRAMS = 2  # inputs that a QRNN's convolution sees at a step
FORGET_BIAS = 1.0  # of gates that keep the state, at the start; no paper of SRU's says, and at 0 it forgets too fast


class Cell(Protocol):
    """One layer in one direction.

    states  the widths of its state's tensors, each [B, width]

    The state it returns is of use only if it is `wanted`.
    """

    states: tuple[int, ...]

    def __call__(
        self, x_TBI: torch.Tensor, lengths: torch.Tensor | None, state: State, wanted: bool = True
    ) -> tuple[torch.Tensor, State]: ...
    def initialise(self, generator: torch.Generator) -> None: ...


def _same_for_all_steps(x_TBI: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Variational dropout: one mask for all steps (Gal and Ghahramani 2016)."""
    if not (training and rate):
        return x_TBI
    return x_TBI * torch.nn.functional.dropout(torch.ones_like(x_TBI[:1]), rate)


def _uniform(weight: torch.Tensor, half_range: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        weight.uniform_(-half_range, half_range, generator=generator)


def _set_bias(bias: torch.Tensor, width: int, forget: float) -> None:
    """All of a bias 0, but the forget gate's, which is the second."""
    with torch.no_grad():
        bias.zero_()
        bias[width : 2 * width] = forget


class SRU(torch.nn.Module):
    """Paper 001, equations (3) to (7), the three (or four) products as one: equation (8).

    inputs, width  I and D
    activation     g: "tanh", "relu" or "identity"
    highway        "fit": W_h x only where I and D differ; "always": everywhere (appendix A.1)
    later          the later SRU (Lei et al. 2018, a departure): c_{t-1} in the gates, and the highway's input times
                   sqrt(1 + 2 exp(b_r)), of b_r at the start
    forget_bias    b_f at the start
    highway_bias   b_r at the start; below 0, a layer begins by passing on what it is given
    variational    of what goes into the products
    dropout        of g(c)
    reverse        from the last step to the first
    """

    def __init__(
        self, inputs: int, width: int, *, activation: str = "tanh", highway: str = "fit", later: bool = False,
        forget_bias: float = FORGET_BIAS, highway_bias: float = 0.0, variational: float = 0.0, dropout: float = 0.0,
        reverse: bool = False,
    ):
        super().__init__()
        if highway not in ("fit", "always"):
            raise ValueError(f"highway '{highway}' is unknown; choose from fit, always")
        self.states: tuple[int, ...] = (width,)
        self.parts = 3 if highway == "fit" and inputs == width else 4
        self.weight = torch.nn.Parameter(torch.empty(self.parts * width, inputs))
        self.bias = torch.nn.Parameter(torch.zeros(2 * width))
        self.v = torch.nn.Parameter(torch.empty(2 * width)) if later else None
        self.activation, self.reverse = activation, reverse
        self.forget_bias, self.highway_bias = forget_bias, highway_bias
        self.variational, self.dropout = variational, dropout
        self.scale = math.sqrt(1.0 + 2.0 * math.exp(highway_bias)) if later else 1.0
        self.initialise(torch.Generator())

    def initialise(self, generator: torch.Generator) -> None:
        """Uniform weights of deviation 1 / sqrt(I), biases as they were asked for."""
        _uniform(self.weight, math.sqrt(3.0 / self.weight.shape[1]), generator)
        with torch.no_grad():
            self.bias[: self.states[0]] = self.forget_bias
            self.bias[self.states[0] :] = self.highway_bias
        if self.v is not None:
            _uniform(self.v, math.sqrt(3.0 / len(self.v)), generator)

    def forward(
        self, x_TBI: torch.Tensor, lengths: torch.Tensor | None, state: State, wanted: bool = True
    ) -> tuple[torch.Tensor, State]:
        given = _same_for_all_steps(x_TBI, self.variational, self.training)
        mask = None
        if self.training and self.dropout:
            ones = torch.ones((*x_TBI.shape[:2], self.states[0]), device=x_TBI.device)
            mask = torch.nn.functional.dropout(ones, self.dropout)
        h_TBD, c_BD = sru.layer(
            x_TBI, self.weight, self.bias, state[0], given_TBI=None if given is x_TBI else given, v=self.v,
            lengths=lengths, mask_TBD=mask, activation=self.activation, reverse=self.reverse, scale=self.scale,
        )
        return h_TBD, (c_BD,)


class QRNN(torch.nn.Module):
    """A convolution over the last two inputs, and pooling with a forget and an output gate (Bradbury et al. 2017).

    z = tanh(W_z * x), f = sigmoid(W_f * x), o = sigmoid(W_o * x); c_t = f c_{t-1} + (1 - f) z; h_t = o c_t. The state
    also holds the input before the first. `forget_bias` is f's at the start.
    """

    def __init__(
        self, inputs: int, width: int, *, forget_bias: float = FORGET_BIAS, variational: float = 0.0,
        dropout: float = 0.0, reverse: bool = False,
    ):
        super().__init__()
        self.states: tuple[int, ...] = (width, (GRAMS - 1) * inputs)
        self.weight = torch.nn.Parameter(torch.empty(3 * width, GRAMS * inputs))
        self.bias = torch.nn.Parameter(torch.zeros(3 * width))
        self.forget_bias = forget_bias
        self.variational, self.dropout, self.reverse = variational, dropout, reverse
        self.initialise(torch.Generator())

    def initialise(self, generator: torch.Generator) -> None:
        """Uniform weights of deviation 1 / sqrt(inputs of the convolution), biases 0 but f's."""
        _uniform(self.weight, math.sqrt(3.0 / self.weight.shape[1]), generator)
        _set_bias(self.bias, self.states[0], self.forget_bias)

    def forward(
        self, x_TBI: torch.Tensor, lengths: torch.Tensor | None, state: State, wanted: bool = True
    ) -> tuple[torch.Tensor, State]:
        x_TBI = _in_time(x_TBI, lengths) if self.reverse else x_TBI
        given = _same_for_all_steps(x_TBI, self.variational, self.training)
        both = torch.cat([torch.cat([state[1][None], given[:-1]]), given], dim=2)
        width = self.states[0]
        z, gates = torch.nn.functional.linear(both, self.weight, self.bias).split([width, 2 * width], dim=2)
        u_TBKD = torch.cat([torch.tanh(z), gates], dim=2)
        mask = None
        if self.training and self.dropout:
            mask = torch.nn.functional.dropout(torch.ones_like(z), self.dropout)
        h_TBD, c_BD = sru.recurrence(
            u_TBKD, torch.zeros_like(z), torch.zeros_like(self.bias[width:]), state[0], lengths=lengths, mask_TBD=mask,
            activation="identity",
        )
        before = _last(torch.cat([state[1][None], given]), lengths)
        return (_in_time(h_TBD, lengths) if self.reverse else h_TBD), (c_BD, before)


class Torch(torch.nn.Module):
    """torch's own LSTM or GRU, one layer.

    Sequences run on over their padding, and what comes out there is dropped: packed ones of unlike lengths take torch
    five times as long on a CPU. Only an LSTM's inner state at the end of the shorter ones needs them packed.

    kind         "lstm" (two state tensors: h and c) or "gru"
    forget_bias  of the LSTM's forget gate, or of the GRU's gate that keeps the state, at the start
    """

    def __init__(
        self, kind: str, inputs: int, width: int, *, forget_bias: float = FORGET_BIAS, variational: float = 0.0,
        dropout: float = 0.0, reverse: bool = False,
    ):
        super().__init__()
        self.states: tuple[int, ...] = (width, width) if kind == "lstm" else (width,)
        made: dict[str, Callable[[int, int], torch.nn.RNNBase]] = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
        self.cell = made[kind](inputs, width)
        self.forget_bias = forget_bias
        self.variational, self.dropout, self.reverse = variational, dropout, reverse
        self.initialise(torch.Generator())

    def initialise(self, generator: torch.Generator) -> None:
        """Uniform weights of half-range 1 / sqrt(D), as torch's; biases 0 but the forget gate's."""
        width = self.states[0]
        for name, parameter in self.cell.named_parameters():
            if name.startswith("weight"):
                _uniform(parameter, 1.0 / math.sqrt(width), generator)
                continue
            _set_bias(parameter, width, self.forget_bias if name.startswith("bias_ih") else 0.0)

    def forward(
        self, x_TBI: torch.Tensor, lengths: torch.Tensor | None, state: State, wanted: bool = True
    ) -> tuple[torch.Tensor, State]:
        x_TBI = _in_time(x_TBI, lengths) if self.reverse else x_TBI
        given = _same_for_all_steps(x_TBI, self.variational, self.training)
        h_TBD, ends = self._run(given, state)
        if lengths is not None:
            if wanted:
                ends = self._ends(given, lengths, state, h_TBD, ends)
            inside = torch.arange(len(given), device=given.device)[:, None] < lengths
            h_TBD = torch.where(inside[..., None], h_TBD, 0.0)
        h_TBD = torch.nn.functional.dropout(h_TBD, self.dropout, self.training)
        return (_in_time(h_TBD, lengths) if self.reverse else h_TBD), ends

    def _run(self, x: torch.Tensor | PackedSequence, state: State) -> tuple[Any, State]:
        held = tuple(part[None] for part in state)
        out, after = self.cell(x, held if len(held) == 2 else held[0])
        return out, tuple(part[0] for part in (after if len(held) == 2 else (after,)))

    def _ends(
        self, x_TBI: torch.Tensor, lengths: torch.Tensor, state: State, h_TBD: torch.Tensor, ends: State
    ) -> State:
        """The state after each sequence's last step, given all outputs and the state after T steps."""
        found = [_last(torch.cat([state[0][None], h_TBD]), lengths)]
        if len(state) == 1:
            return tuple(found)
        short = torch.nonzero((lengths < len(x_TBI)) & (lengths > 0)).flatten()
        c_BD = torch.where((lengths > 0)[:, None], ends[1], state[1])
        if len(short):
            packed = pack_padded_sequence(x_TBI[:, short], lengths[short].cpu(), enforce_sorted=False)
            shorter = self._run(packed, tuple(part[short] for part in state))[1][1]
            c_BD = c_BD.index_copy(0, short, shorter.to(c_BD.dtype))
        return found[0], c_BD


def _in_time(x_TBI: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Every sequence from its last step to its first, padding where it was."""
    if lengths is None:
        return x_TBI.flip(0)
    t = torch.arange(len(x_TBI), device=x_TBI.device)[:, None]
    index = torch.where(t < lengths, lengths - 1 - t, t)
    return x_TBI.gather(0, index[..., None].expand_as(x_TBI))


def _in_two(
    cell: Cell, x_TBI: torch.Tensor, lengths: torch.Tensor, state: State, kept: torch.Tensor
) -> tuple[torch.Tensor, State]:
    """All outputs of a cell, and its state after `kept` steps [B]. Under variational dropout the steps that are only
    seen ahead have a mask of their own."""
    t = torch.arange(len(x_TBI), device=x_TBI.device)[:, None]
    middle, rest = int(kept.max()), lengths - kept
    ahead = (kept + t[: int(rest.max())]).clamp(max=len(x_TBI) - 1)[..., None]
    parts, ends = [], state
    if middle:
        h_TBD, ends = cell(x_TBI[:middle], kept, state)
        parts.append(h_TBD)
    if len(ahead):
        parts.append(cell(x_TBI.gather(0, ahead.expand(-1, -1, x_TBI.shape[2])), rest, ends, wanted=False)[0])
    both = torch.cat(parts)
    index = torch.where(t < kept, t, middle + t - kept).clamp(max=len(both) - 1)
    inside = (t < lengths)[..., None]
    return both.gather(0, index[..., None].expand(-1, -1, both.shape[2])) * inside, ends


def _last(x_TBI: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """The row of each sequence's last step, of rows that begin one before the first step."""
    if lengths is None:
        return x_TBI[-1]
    return x_TBI.gather(0, lengths[None, :, None].expand(1, *x_TBI.shape[1:]))[0]


def make_cell(kind: Kind, inputs: int, width: int, **options: object) -> Cell:
    """A cell by its name; options that are not for it are errors."""
    if kind in ("sru", "sru-later"):
        return SRU(inputs, width, later=kind == "sru-later", **options)  # type: ignore[arg-type]
    return QRNN(inputs, width, **options) if kind == "qrnn" else Torch(kind, inputs, width, **options)  # type: ignore[arg-type]


class Recurrent(torch.nn.Module):
    """N layers of one kind of cell.

    kind           which
    inputs, width  I and D; of both directions each
    layers         N
    bidirectional  whether every layer also runs from the last step to the first; its outputs stand beside the others
    options        of every cell: `forget_bias`, `variational` and `dropout`; SRU's `activation`, `highway` and
                   `highway_bias`

    `outputs` is how wide the outputs are.
    """

    def __init__(
        self, kind: Kind, inputs: int, width: int, layers: int, *, bidirectional: bool = False, **options: object
    ):
        super().__init__()
        directions = 2 if bidirectional else 1
        self.outputs = directions * width
        self.layers = torch.nn.ModuleList()
        for layer in range(layers):
            into = inputs if not layer else self.outputs
            cells = [make_cell(kind, into, width, reverse=bool(k), **options) for k in range(directions)]
            self.layers.append(torch.nn.ModuleList(cells))  # type: ignore[arg-type]

    def initialise(self, generator: torch.Generator) -> None:
        """All weights anew, from this generator."""
        for cells in self._cells():
            for cell in cells:
                cell.initialise(generator)

    def start(self, like: torch.Tensor) -> State:
        """Zero states for as many sequences as `like` [T, B, I] has."""
        widths = [width for cells in self._cells() for cell in cells for width in cell.states]
        return tuple(like.new_zeros((like.shape[1], width)) for width in widths)

    def forward(
        self, x_TBI: torch.Tensor, lengths: torch.Tensor | None = None, state: State | None = None,
        kept: torch.Tensor | None = None, wanted: bool = True,
    ) -> tuple[torch.Tensor, State]:
        """Outputs [T, B, outputs] and the states after each sequence's last step.

        x_TBI    the inputs
        lengths  int64 [B], 0 to T; None: all are T long
        state    what an earlier call returned, to go on from there; None: zeros. Backward directions take no notice:
                 they begin at the last step, from zeros
        kept     int64 [B], 0 to each length, which must be given: the forward direction's states are those after so
                 many steps instead, and what comes beyond them is only seen ahead; backward directions have none then
        wanted   whether the states are; else they are of no use, and an LSTM is quicker
        """
        held = iter(self.start(x_TBI) if state is None else state)
        after: list[torch.Tensor] = []
        for cells in self._cells():
            outputs = []
            for backward, cell in enumerate(cells):
                own = tuple(islice(held, len(cell.states)))
                if backward:
                    h_TBD, ends = cell(x_TBI, lengths, tuple(map(torch.zeros_like, own)), wanted and kept is None)
                elif kept is None:
                    h_TBD, ends = cell(x_TBI, lengths, own, wanted)
                else:
                    assert lengths is not None
                    h_TBD, ends = _in_two(cell, x_TBI, lengths, own, kept)
                outputs.append(h_TBD)
                after += ends
            x_TBI = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        return x_TBI, tuple(after)

    def last(self, state: State) -> torch.Tensor:
        """The last layer's state of each direction, side by side: [B, outputs]. An LSTM's is h, the others' c or h."""
        top: Sequence[Cell] = list(self._cells())[-1]
        tail = state[-sum(len(cell.states) for cell in top) :]
        firsts = [sum(len(cell.states) for cell in top[:k]) for k in range(len(top))]
        return torch.cat([tail[first] for first in firsts], dim=1)

    def _cells(self) -> list[list[Cell]]:
        return [list(cells) for cells in self.layers]  # type: ignore[call-overload]
