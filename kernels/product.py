"""The matrix product that layers are made of, by whichever of torch's libraries is the quickest at it on the CPU.

In float32, torch's own products on the CPU are MKL's; oneDNN's, which convolutions and bfloat16 go to, are quicker
where there is enough to do, on AMD's processors above all. Which one it is depends on sizes and layout alone. Equal
bits take equal sizes, layout, number of threads, and memory equally aligned to 64 bytes, as torch's own products do.

Legend: N rows, M columns, K numbers that are multiplied and summed for each of the result's.
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
    """a b^T [N, M], plus `plus_NM` where it is given; gradients do not go through, and autocast changes no type.

    a_NK, b_MK  of one type; either may be another matrix transposed
    plus_NM     contiguous, like the result
    """
    if torch.is_autocast_enabled(a_NK.device.type):
        with torch.autocast(a_NK.device.type, enabled=False):
            return product(a_NK, b_MK, plus_NM)
    (rows, inner), columns = a_NK.shape, len(b_MK)
    enough = rows * inner * columns >= ENOUGH and (a_NK.is_contiguous() or rows * columns >= WIDE)
    if ONEDNN and enough and a_NK.dtype == b_MK.dtype == torch.float32 and a_NK.device.type == "cpu":
        return torch.ops.trireme.product(a_NK, b_MK, plus_NM)
    return a_NK.mm(b_MK.t()) if plus_NM is None else torch.addmm(plus_NM, a_NK, b_MK.t())


def _onednn(a_NK: Tensor, b_MK: Tensor, plus_NM: Tensor | None) -> Tensor:
    a_NK, b_MK = by_rows(a_NK), by_rows(b_MK) if len(a_NK) >= TALL else b_MK
    if plus_NM is None:
        return torch.ops.mkldnn._linear_pointwise(a_NK, b_MK, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(a_NK, plus_NM, b_MK, None, "add")


def by_rows(matrix: Tensor) -> Tensor:
    """The same matrix, float32 on the CPU, row after row in memory if it is such a matrix transposed; else itself."""
    library, turned = native.library(), matrix.t()
    if library is None or matrix.is_contiguous() or not turned.is_contiguous():
        return matrix
    out = matrix.new_empty(matrix.shape)
    library.trireme_transpose(turned.data_ptr(), out.data_ptr(), *turned.shape, torch.get_num_threads())
    return out


def _register() -> torch.library.Library:
    """Make oneDNN's way an operator of its own, so that compiled graphs may hold it."""
    library = torch.library.Library("trireme", "FRAGMENT")
    library.define("product(Tensor a, Tensor b, Tensor? plus) -> Tensor")
    library.impl("product", _onednn, "CPU")
    torch.library.register_fake("trireme::product", lambda a, b, plus: a.new_empty((len(a), len(b))), lib=library)
    return library


LIBRARY = _register()  # as long as it lives, so does the operator
