"""Fully connected layers of low rank: a matrix as the product of two, restructured from a whole one by SVD.

Source: Xue, Li and Gong 2013, "Restructuring of deep neural network acoustic models with singular value
decomposition", reference [13] of paper 002, whose section 5.2 trains such a network (table 2, SVD-LL). Departure: they
leave the singular values with one of the two factors; here each gets their roots, so that both are of one size.

Legend: I inputs, O outputs, K rank.
"""

from __future__ import annotations

import torch


def pays(inputs: int, outputs: int, rank: int) -> bool:
    """Whether two factors of this rank hold fewer floats than the matrix."""
    return rank * (inputs + outputs) < inputs * outputs


def largest_rank(inputs: int, outputs: int) -> int:
    """The largest rank that pays; 0 where none does."""
    return (inputs * outputs - 1) // (inputs + outputs)


def linear(inputs: int, outputs: int, rank: int = 0) -> torch.nn.Module:
    """A fully connected layer with bias: of this rank where that pays, whole elsewhere and for rank 0."""
    if rank and pays(inputs, outputs, rank):
        return Factored(inputs, outputs, rank)
    return torch.nn.Linear(inputs, outputs)


class Factored(torch.nn.Module):
    """x -> up(down(x)): a fully connected layer whose matrix, up.weight @ down.weight, has a low rank.

    inputs, outputs, rank  I, O and K

    down  [K, I], without bias
    up    [O, K], with bias
    """

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.down = torch.nn.Linear(inputs, rank, bias=False)
        self.up = torch.nn.Linear(rank, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))

    @torch.no_grad()
    def take_(self, layer: torch.nn.Linear) -> None:
        """Become, in place, as near to a whole layer as the rank allows."""
        down_KI, up_OK = factors(layer.weight, self.down.out_features)
        self.down.weight.copy_(down_KI)
        self.up.weight.copy_(up_OK)
        self.up.bias.copy_(layer.bias)


@torch.no_grad()
def factors(weight_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`down` [K, I] and `up` [O, K] whose product up @ down is the nearest to a matrix of all of this rank.

    Nearest in the sum of squares (Eckart and Young 1936). Computed in float64, so that the rank alone makes it inexact.
    """
    u_OS, values_S, v_SI = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    roots_K = values_S[:rank].sqrt()
    down, up = roots_K[:, None] * v_SI[:rank], u_OS[:, :rank] * roots_K
    return down.to(weight_OI.dtype).contiguous(), up.to(weight_OI.dtype).contiguous()
