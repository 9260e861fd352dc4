"""A model's parameters and gradients as two contiguous buffers.

Legend: P floats of all parameters that learn, padded: every parameter starts at a multiple of ALIGN floats, and P is a
multiple of CHUNK, as the ends of the pieces are that ranks own (`collectives/layout.py`), so that vectorised kernels
meet the same elements in the same lanes for any number of ranks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable

import torch

ALIGN = 64
CHUNK = 1024


class Flat:
    """Moves a model's parameters into one buffer [P]; the model goes on using them as views.

    model    parameters must be float32 and on one device; tied parameters are kept once, frozen ones (that take no
             gradient now) stay where they are, every rank's own
    storage  asked for a zeroed buffer of a given number of floats: the Comm decides where buffers live

    Raises ValueError for a model without parameters that learn, or of another dtype.
    """

    def __init__(self, model: torch.nn.Module, storage: Callable[[int], torch.Tensor]):
        self.model = model
        named = list(model.named_parameters())
        wrong = [f"{n} ({p.dtype})" for n, p in named if p.dtype != torch.float32]
        learning = [(n, p) for n, p in named if p.requires_grad]
        if not learning or wrong:
            raise ValueError(f"a model needs float32 parameters, this one has {wrong or 'none'}; see 'precision'")
        self.names = [n for n, _ in learning]
        self.parameters = [p for _, p in learning]
        self.fixed = {n: p for n, p in named if not p.requires_grad} | dict(model.named_buffers())
        self.offsets, at = [], 0
        for parameter in self.parameters:
            self.offsets.append(at)
            at += -(-parameter.numel() // ALIGN) * ALIGN
        self.size = -(-at // CHUNK) * CHUNK
        self.count = sum(p.numel() for p in self.parameters)
        self.shapes = [(offset, tuple(p.shape)) for offset, p in zip(self.offsets, self.parameters, strict=True)]
        self.weights = storage(self.size)
        with torch.no_grad():
            for parameter, view in zip(self.parameters, self.views(self.weights), strict=True):
                view.copy_(parameter)
                parameter.data = view

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The parameters' shapes as views of a buffer [P]."""
        return [
            buffer[offset : offset + p.numel()].view(p.shape)
            for offset, p in zip(self.offsets, self.parameters, strict=True)
        ]

    def bind_grads(self, grads: torch.Tensor) -> None:
        """From now on backward adds into this buffer [P]."""
        if self.parameters[0].grad is not None and self.parameters[0].grad.data_ptr() == grads.data_ptr():
            return  # bound already: with many parameters binding takes a while
        for parameter, view in zip(self.parameters, self.views(grads), strict=True):
            parameter.grad = view

    def on_grad(self, told: Callable[[int], None]) -> None:
        """From now on backward calls `told` with a parameter's number when its gradient is final."""
        for number, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, number=number: told(number))

    def within(self, low: int, high: int) -> range:
        """The numbers of the parameters that have floats in [low, high)."""
        first = bisect_right(self.offsets, low) - 1
        return range(first, bisect_left(self.offsets, high))

    def name_at(self, index: int) -> str:
        """The name of the parameter that holds a float of the buffer."""
        return self.names[bisect_right(self.offsets, index) - 1]
