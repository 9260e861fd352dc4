"""The matrix product that layers are made of, by whichever of torch's libraries is the quickest at it on the CPU.

In float32, torch's own products on the CPU are MKL's; oneDNN's, which convolutions and bfloat16 go to, are quicker
where there is enough to do, on AMD's processors above all. Which one it is depends on the sizes alone, so equal sizes
give equal bits.
"""

from __future__ import annotations

import torch

from kernels import native

Tensor = torch.Tensor

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ENOUGH = 1 << 23  # products of two numbers, from which on oneDNN's way in is worth it
WIDE = 1 << 19  # numbers of the result, likewise, where the left matrix is a transposed one: it is turned first
TALL = 1 << 11  # rows of the left matrix, from which on a transposed right one is worth turning


def product(a_NK: Tensor, b_MK: Tensor, plus_NM: Tensor | None = None) -> Tensor:
    """a b^T [N, M], plus `plus_NM` where it is given; gradients do not go through.

    a_NK, b_MK  either may be another matrix transposed
    plus_NM     contiguous, like the result
    """
    (rows, inner), columns = a_NK.shape, len(b_MK)
    enough = rows * inner * columns >= ENOUGH and (a_NK.is_contiguous() or rows * columns >= WIDE)
    if ONEDNN and enough and a_NK.dtype == torch.float32 and a_NK.device.type == "cpu":
        a_NK, b_MK = by_rows(a_NK), by_rows(b_MK) if rows >= TALL else b_MK
        if plus_NM is None:
            return torch.ops.mkldnn._linear_pointwise(a_NK, b_MK, None, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(a_NK, plus_NM, b_MK, None, "add")
    return a_NK.mm(b_MK.t()) if plus_NM is None else torch.addmm(plus_NM, a_NK, b_MK.t())


def by_rows(matrix: Tensor) -> Tensor:
    """The same float32 matrix with its rows one after the other in memory, if it is another such matrix transposed."""
    library, turned = native.library(), matrix.t()
    if library is None or matrix.is_contiguous() or not turned.is_contiguous():
        return matrix
    out = torch.empty(matrix.shape)
    library.trireme_transpose(turned.data_ptr(), out.data_ptr(), *turned.shape, torch.get_num_threads())
    return out
