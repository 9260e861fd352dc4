"""The update rules, each in one pass over memory.

With g the gradient, w the weights, m, a, u the state, all [S], and the constants by name:

    g' = g * scale + l2 * w         w' = w * keep
    sgd       w <- w' - rate * g'
    momentum  m <- momentum * m + g';                          w <- w' - rate * m
    nesterov  m <- momentum * m + g';                          w <- w' - rate * (g' + momentum * m)
    adagrad   a <- a + g' g';                                  w <- w' - rate * g' / (sqrt(a) + epsilon)
    adagrad_momentum  a <- a + g' g';  m <- momentum * m + g' / (sqrt(a) + epsilon);  w <- w' - rate * m
    momentum_adagrad  m <- momentum * m + g';  a <- a + m m;   w <- w' - rate * m / (sqrt(a) + epsilon)
    adam      m <- momentum * m + fresh * g';  a <- beta2 * a + fresh2 * g' g';
              w <- w' - rate * m / (sqrt(a) * correction2 + epsilon)
    adamax    m <- momentum * m + fresh * g';  u <- max(beta2 * u, |g'|);  w <- w' - rate * m / (u + epsilon)

Every operation is rounded by itself, on both sides as in the reference, so all of them give the same bits (a GPU's
denormal numbers apart). Sources: paper 002, equation (1), and section 5.3 for AdaGrad before and after momentum;
Sutskever et al. 2013; Duchi et al. 2011; Kingma and Ba 2015, algorithms 1 and 2. Corrections for the number of updates
are the caller's: they are in `rate` and `correction2`.

Legend: S floats of the slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kernels import gpu, native

SOURCE = "update.cu"
THREADS = 256


class Constants(NamedTuple):
    """What is the same for all floats of a slice; the order is that of `src/update.h`."""

    scale: float = 1.0
    l2: float = 0.0
    keep: float = 1.0
    rate: float = 0.0
    momentum: float = 0.0
    fresh: float = 1.0
    beta2: float = 0.0
    fresh2: float = 1.0
    correction2: float = 1.0
    epsilon: float = 0.0


# How many state tensors a rule has; where it has two, AdaGrad's are a and m, in this order.
SLOTS = {
    "sgd": 0, "momentum": 1, "nesterov": 1, "adagrad": 1, "adagrad_momentum": 2, "momentum_adagrad": 2, "adam": 2,
    "adamax": 2,
}


def update_(
    rule: str, weights: torch.Tensor, grad: torch.Tensor, slots: Sequence[torch.Tensor], constants: Constants
) -> bool:
    """One update; returns whether all of the gradient, and of the state after it, is finite (if not, what was written
    is of no use). A gradient of 1e20 is, its square is not: AdaGrad would go on dividing by infinity.

    rule     a name of SLOTS
    weights  [S], contiguous, changed in place
    grad     [S], contiguous
    slots    the rule's state, each [S], contiguous, changed in place
    """
    tensors = (weights, grad, *slots)
    assert len(slots) == SLOTS[rule], (rule, len(slots))
    assert all(t.shape == weights.shape and t.dtype == weights.dtype and t.is_contiguous() for t in tensors)
    if gpu.serves(weights):
        return _cuda(rule, tensors, constants)
    library = native.library()
    if library is None or weights.is_cuda or weights.dtype != torch.float32:
        return reference(rule, weights, grad, slots, constants)
    pointers = [t.data_ptr() for t in tensors] + [None] * (4 - len(tensors))
    packed = _packed(constants)
    return not getattr(library, f"trireme_{rule}")(*pointers, weights.numel(), packed.ctypes.data)


PACKED = np.dtype([(name, np.float32) for name in Constants._fields])  # `Constants` of src/update.h


def _packed(constants: Constants) -> np.ndarray:
    return np.array([tuple(constants)], PACKED)


def _cuda(rule: str, tensors: Sequence[torch.Tensor], constants: Constants) -> bool:
    count, bad = tensors[0].numel(), torch.zeros(1, dtype=torch.int32, device=tensors[0].device)
    if count:
        pointers = [t.data_ptr() for t in tensors] + [0] * (4 - len(tensors))
        blocks = -(-count // THREADS)
        gpu.launch(
            SOURCE, f"trireme_{rule}", blocks, THREADS,
            (*pointers, np.int64(count), _packed(constants)[0], bad.data_ptr()), tensors[0].device,
        )
    return not bad.item()


def reference(
    rule: str, weights: torch.Tensor, grad: torch.Tensor, slots: Sequence[torch.Tensor], constants: Constants
) -> bool:
    """The same in torch, for any type of float."""
    c = _rounded(constants, weights.dtype)
    g = grad * c.scale + c.l2 * weights
    weights.mul_(c.keep)
    if rule == "sgd":
        step = g
    elif rule in ("momentum", "nesterov"):
        smoothed = slots[0].mul_(c.momentum).add_(g)
        step = smoothed if rule == "momentum" else g + c.momentum * smoothed
    elif rule == "adagrad":
        step = g / (_root(slots[0].add_(g * g)) + c.epsilon)
    elif rule == "adagrad_momentum":
        step = slots[1].mul_(c.momentum).add_(g / (_root(slots[0].add_(g * g)) + c.epsilon))
    elif rule == "momentum_adagrad":
        smoothed = slots[1].mul_(c.momentum).add_(g)
        step = smoothed / (_root(slots[0].add_(smoothed * smoothed)) + c.epsilon)
    else:
        mean, size = slots[0].mul_(c.momentum).add_(c.fresh * g), slots[1].mul_(c.beta2)
        if rule == "adam":
            step = mean / (_root(size.add_(c.fresh2 * (g * g))) * c.correction2 + c.epsilon)
        else:
            step = mean / (torch.maximum(size, g.abs(), out=size) + c.epsilon)
    weights.sub_(c.rate * step)
    return all(bool(torch.isfinite(values).all()) for values in (grad, *slots))


def _root(values: torch.Tensor) -> torch.Tensor:
    """Correctly rounded, which torch's float32 square root on AVX-512 is not."""
    return values.double().sqrt().to(values.dtype)


def _rounded(constants: Constants, dtype: torch.dtype) -> Constants:
    """As the kernels get them, in float32: torch would compute with Python's doubles."""
    if dtype != torch.float32:
        return constants
    return Constants(*(float(np.float32(value)) for value in constants))
