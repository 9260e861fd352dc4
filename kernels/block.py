"""What a block of training by splits comes to: how far a split's model went, and the update of the global model.

With W the global model, D its last change, T the total of what all splits departed by (each times its weight), the
constants by name, all [S]:

    depart_  T_k = (W_k - W_g) * weight                                  a split's part of the total
    block_   D <- momentum * D + rate * (T * scale);  W <- W * keep + D;  W_g <- W + ahead * D

Source: paper 003, equations (2) to (6): T * scale is G(t), if the weights are counts and the scale is one over their
sum; momentum is eta, rate zeta, and ahead is eta again under Nesterov block momentum, 0 under classical. Paper 000,
equation (19): momentum 0, rate alpha, keep 1 - beta. The difference of equation (2) is taken split by split, before the
average: what nobody changed then stays as it is, bit for bit.

Every operation is rounded by itself, on both sides as in the reference, so all of them give the same bits (a GPU's
denormal numbers apart).

Legend: S floats of the slice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from kernels import gpu, native

SOURCE = "block.cu"
THREADS = 256


class BlockConstants(NamedTuple):
    """What is the same for all floats of a slice; the order is that of `src/block.h`."""

    scale: float
    momentum: float = 0.0
    rate: float = 1.0
    keep: float = 1.0
    ahead: float = 0.0


PACKED = np.dtype([(name, np.float32) for name in BlockConstants._fields])  # `BlockConstants` of src/block.h


def block_(
    total: torch.Tensor, weights: torch.Tensor, change: torch.Tensor, start: torch.Tensor, constants: BlockConstants
) -> bool:
    """The update of a block; returns whether the total and the change are finite (if not, nothing is of use).

    total    [S], contiguous
    weights  [S], contiguous, the global model, changed in place
    change   [S], contiguous, its last change, changed in place
    start    [S], contiguous, overwritten: where the next block's splits start from
    """
    tensors = (total, weights, change, start)
    assert all(t.shape == weights.shape and t.dtype == weights.dtype and t.is_contiguous() for t in tensors)
    if gpu.serves(weights):
        bad = torch.zeros(1, dtype=torch.int32, device=weights.device)
        _launch("block", tensors, (_packed(constants)[0], bad.data_ptr()))
        return not bad.item()
    library = native.library()
    if library is None or weights.is_cuda or weights.dtype != torch.float32:
        return reference_block_(total, weights, change, start, constants)
    packed = _packed(constants)
    return not library.trireme_block(*(t.data_ptr() for t in tensors), weights.numel(), packed.ctypes.data)


def depart_(weights: torch.Tensor, start: torch.Tensor, weight: float, out: torch.Tensor) -> None:
    """How far a split's model went, times its weight, into `out`; all [S], contiguous."""
    tensors = (weights, start, out)
    assert all(t.shape == weights.shape and t.dtype == weights.dtype and t.is_contiguous() for t in tensors)
    if gpu.serves(weights):
        return _launch("departure", tensors, (np.float32(weight),))
    library = native.library()
    if library is None or weights.is_cuda or weights.dtype != torch.float32:
        reference_depart_(weights, start, weight, out)
        return
    library.trireme_departure(*(t.data_ptr() for t in tensors), weights.numel(), weight)


def reference_block_(
    total: torch.Tensor, weights: torch.Tensor, change: torch.Tensor, start: torch.Tensor, constants: BlockConstants
) -> bool:
    """The same in torch, for any type of float."""
    c = constants
    if weights.dtype == torch.float32:  # as the kernels get them: torch would compute with Python's doubles
        c = BlockConstants(*(float(np.float32(value)) for value in constants))
    change.mul_(c.momentum).add_(c.rate * (total * c.scale))
    weights.mul_(c.keep).add_(change)
    start.copy_(c.ahead * change).add_(weights)
    return bool(torch.isfinite(total).all() and torch.isfinite(change).all())


def reference_depart_(weights: torch.Tensor, start: torch.Tensor, weight: float, out: torch.Tensor) -> None:
    """The same in torch."""
    torch.sub(weights, start, out=out).mul_(weight)


def _packed(constants: BlockConstants) -> np.ndarray:
    return np.array([tuple(constants)], PACKED)


def _launch(name: str, tensors: tuple[torch.Tensor, ...], after: tuple[int | np.generic, ...]) -> None:
    count = tensors[0].numel()
    if count:
        pointers = tuple(t.data_ptr() for t in tensors)
        gpu.launch(
            SOURCE, f"trireme_{name}", -(-count // THREADS), THREADS, (*pointers, np.int64(count), *after),
            tensors[0].device,
        )
