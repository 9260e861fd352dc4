"""The matrix product that layers are made of, by whichever of torch's libraries is the quickest at it on the CPU.

In float32, torch's own products on the CPU are MKL's; oneDNN's, which convolutions and bfloat16 go to, are quicker
where there is enough to do, on AMD's processors above all. Which one it is depends on the sizes alone, so equal sizes
give equal bits.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ENOUGH = 1 << 23  # products of two numbers, from which on oneDNN's way in is worth it
WIDE = 1 << 21  # numbers of the result, likewise, where the left matrix is a transposed one: it is copied first


def product(a_NK: Tensor, b_MK: Tensor, plus_NM: Tensor | None = None) -> Tensor:
    """a b^T [N, M], plus `plus_NM` where it is given; gradients do not go through.

    a_NK, b_MK  either may be another matrix transposed
    plus_NM     contiguous, like the result
    """
    (rows, inner), columns = a_NK.shape, len(b_MK)
    enough = rows * inner * columns >= ENOUGH and (a_NK.is_contiguous() or rows * columns >= WIDE)
    if ONEDNN and enough and a_NK.dtype == torch.float32 and a_NK.device.type == "cpu":
        if plus_NM is None:
            return torch.ops.mkldnn._linear_pointwise(a_NK, b_MK, None, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(a_NK, plus_NM, b_MK, None, "add")
    return a_NK.mm(b_MK.t()) if plus_NM is None else torch.addmm(plus_NM, a_NK, b_MK.t())
