"""The convolution over words of Kim (2014): filters of several widths side by side, each map's maximum over time.

Legend: T words of the longest sentence, B sentences, D values a word, F maps of a width.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

WIDTHS = (3, 4, 5)  # words that a filter spans
MAPS = 100  # of every width


class WideCNN(torch.nn.Module):
    """ReLU(W * x + b), the maximum over time; `outputs` is how wide the output is: 300.

    A sentence shorter than the widest filter is continued with zeros up to its width; beyond that, padding never takes
    part in a maximum, so neither it nor other sentences of a batch change a result.

    inputs  D

    Source: Kim (2014), section 2, equations (1) to (3), and section 3.1 (widths and maps); paper 001, section 3.1.
    Departure: Kim's code continues every sentence with zeros on both sides, up to the longest of the data set.
    """

    def __init__(self, inputs: int, widths: tuple[int, ...] = WIDTHS, maps: int = MAPS):
        super().__init__()
        self.outputs = len(widths) * maps
        self.convolutions = torch.nn.ModuleList(torch.nn.Conv1d(inputs, maps, width) for width in widths)
        self.shortest = max(widths)

    def initialise(self, generator: torch.Generator) -> None:
        """Uniform weights of half-range 1 / sqrt(inputs of a filter), as torch's; biases 0."""
        for convolution in self.convolutions:
            assert isinstance(convolution, torch.nn.Conv1d) and convolution.bias is not None
            half_range = 1.0 / math.sqrt(convolution.weight[0].numel())
            with torch.no_grad():
                convolution.weight.uniform_(-half_range, half_range, generator=generator)
                convolution.bias.zero_()

    def forward(self, x_TBD: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The maxima [B, outputs] of sentences whose lengths, int64 [B], are 1 to T."""
        steps = torch.arange(len(x_TBD), device=x_TBD.device)[:, None]
        x_BDT = (x_TBD * (steps < lengths)[..., None]).permute(1, 2, 0)
        x_BDT = functional.pad(x_BDT, (0, max(0, self.shortest - x_BDT.shape[2])))
        spans = lengths.clamp(min=self.shortest)[:, None]
        maxima = []
        for convolution in self.convolutions:
            h_BFT = functional.relu(convolution(x_BDT))
            ends = torch.arange(x_BDT.shape[2] - h_BFT.shape[2] + 1, x_BDT.shape[2] + 1, device=x_BDT.device)
            maxima.append((h_BFT * (ends <= spans)[:, None]).amax(2))  # 0 is ReLU's least
        return torch.cat(maxima, dim=1)
