"""The recurrence of SRU in one pass over time, forward and backward.

Source: paper 001 (Lei, Zhang: Training RNNs as Fast as CNNs), equations (4) to (7) and algorithm 1, from the grouped
product of equation (8), length-major:

    f = sigmoid(u_f + b_f)          c_t = f c_{t-1} + (1 - f) u_x
    r = sigmoid(u_r + b_r)          h_t = r drop(g(c_t)) + (1 - r) x_t

u's fourth part, where there is one, is W_h x (appendix A.1) and stands for x_t. `drop` is standard dropout (section
2.1). Departure, only where asked for: the later SRU (Lei et al. 2018) with v_f c_{t-1} and v_r c_{t-1} in the gates and
`scale` before x_t.

A sequence that is shorter than the batch's longest keeps its state where it ends: outputs beyond it are 0, nothing
there is read, and its gradients there are 0.

Legend: T steps, B sequences, D units, K = 3 or 4 parts of u.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kernels import gpu, native

ACTIVATIONS = {"identity": 0, "tanh": 1, "relu": 2}

Tensor = torch.Tensor


POINTERS = (
    "u", "highway", "bias", "v", "mask", "c0", "lengths", "h", "c", "grad_h", "grad_c", "grad_u", "grad_highway",
    "grad_bias", "grad_v",
)
NUMBERS = ("steps", "batch", "d", "u_row", "highway_row", "low", "high")
PACKED = np.dtype([
    *((name, np.uint64) for name in POINTERS), *((name, np.int64) for name in NUMBERS), ("scale", np.float64),
    ("activation", np.int32), ("reverse", np.int32),
])  # `Sru` of src/sru.cpp and src/sru.cu
THREADS = 128


def recurrence(
    u_TBKD: Tensor, x_TBD: Tensor | None, bias: Tensor, c0_BD: Tensor, *, v: Tensor | None = None,
    lengths: Tensor | None = None, mask_TBD: Tensor | None = None, activation: str = "tanh", reverse: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Outputs h [T, B, D] and the last states [B, D]; differentiable in u, x, bias, c0 and v.

    u_TBKD      [T, B, K * D]: W x, W_f x, W_r x, and W_h x if K = 4
    x_TBD       the highway's input if K = 3, else None
    bias        [2 * D]: b_f, b_r
    c0_BD       the states before the first step
    v           [2 * D]: v_f, v_r of the later SRU; None: the paper's
    lengths     int64 [B], 0 to T; None: all are T long
    mask_TBD    what g(c) is multiplied by: 0, or 1 / (1 - p); None: nothing is dropped
    activation  g: "tanh", "relu" or "identity"
    reverse     from the last step to the first; a short sequence begins at its own end
    scale       of the highway's input

    All are taken as float32, unless u is float64. Raises ValueError if shapes do not fit.
    """
    steps, batch, width = u_TBKD.shape
    d = c0_BD.shape[1]
    given = width == 3 * d and x_TBD is not None and x_TBD.shape == (steps, batch, d)
    if not (given or (width == 4 * d and x_TBD is None)):
        raise ValueError(
            f"u {tuple(u_TBKD.shape)} and x {None if x_TBD is None else tuple(x_TBD.shape)} do not fit {d} units: u "
            "needs 3 parts and x as wide as the units, or 4 parts and no x"
        )
    kind = torch.float64 if u_TBKD.dtype == torch.float64 else torch.float32  # of state and gates, under autocast too
    u, bias, c0 = (t.to(kind).contiguous() for t in (u_TBKD, bias, c0_BD))
    x, v, mask = (None if t is None else t.to(kind).contiguous() for t in (x_TBD, v, mask_TBD))
    if not steps:
        return u.new_zeros((0, batch, d)), c0.clone()
    if lengths is None:
        lengths = torch.full((batch,), steps, dtype=torch.int64, device=u.device)
    return _Recurrence.apply(u, x, bias, c0, v, lengths, mask, activation, reverse, scale)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor,
        mask: Tensor | None, activation: str, reverse: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:
        h, c = torch.ops.trireme.sru_forward(u, x, bias, c0, v, lengths, mask, activation, reverse, scale)
        ctx.save_for_backward(u, x, bias, c0, v, lengths, mask, c)
        ctx.options = (activation, reverse, scale)
        return h, (c[0] if reverse else c[-1]).clone()

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        u, x, bias, c0, v, lengths, mask, c = ctx.saved_tensors
        grad_u, grad_x, grad_bias, grad_c, grad_v = torch.ops.trireme.sru_backward(
            u, x, bias, c0, v, lengths, mask, c, grad_h.contiguous(), grad_last, *ctx.options
        )
        grads = (grad_u, None if x is None else grad_x, grad_bias, grad_c, None if v is None else grad_v)
        return (*grads, None, None, None, None, None)


def _fused(u: Tensor) -> bool:
    """Whether a fused side serves this tensor."""
    on_cpu = u.device.type == "cpu" and u.dtype in (torch.float32, torch.float64)
    return gpu.serves(u) or (on_cpu and native.library() is not None)


def _packed(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor, mask: Tensor | None,
    c: Tensor, activation: str, reverse: bool, scale: float, **arrays: Tensor | None,
) -> np.ndarray:
    steps, batch, width = u.shape
    d = c0.shape[1]
    tensors = {"u": u, "bias": bias, "c0": c0, "v": v, "mask": mask, "c": c, **arrays}
    assert all(t is None or (t.dtype == u.dtype and t.is_contiguous()) for t in (x, *tensors.values()))
    assert lengths.dtype == torch.int64 and lengths.is_contiguous()
    packed = np.zeros(1, PACKED)
    for name, tensor in ({"lengths": lengths} | tensors).items():
        packed[name] = 0 if tensor is None else tensor.data_ptr()
    packed["highway"] = u.data_ptr() + 3 * d * u.element_size() if x is None else x.data_ptr()
    for name, value in zip(NUMBERS, (steps, batch, d, width, width if x is None else d, 0, batch), strict=True):
        packed[name] = value
    packed["scale"], packed["activation"], packed["reverse"] = scale, ACTIVATIONS[activation], reverse
    return packed


def _run(side: str, u: Tensor, packed: np.ndarray) -> None:
    if u.is_cuda:
        units = int(packed["batch"][0] * packed["d"][0])
        if units:
            gpu.launch("sru.cu", f"trireme_sru_{side}", -(-units // THREADS), THREADS, (packed[0],), u.device)
        return
    name = f"trireme_sru_{side}{'' if u.dtype == torch.float32 else '_double'}"
    getattr(native.library(), name)(packed.ctypes.data)


def _forward(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor, mask: Tensor | None,
    activation: str, reverse: bool, scale: float,
) -> tuple[Tensor, Tensor]:
    if not _fused(u):
        return reference(u, x, bias, c0, v, lengths, mask, activation, reverse, scale)
    h, c = (u.new_empty((*u.shape[:2], c0.shape[1])) for _ in range(2))
    _run("forward", u, _packed(u, x, bias, c0, v, lengths, mask, c, activation, reverse, scale, h=h))
    return h, c


def _backward(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor, mask: Tensor | None,
    c: Tensor, grad_h: Tensor, grad_last: Tensor, activation: str, reverse: bool, scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of u, x, bias, c0 and v; an empty one for what there is not."""
    if not _fused(u):
        return _reference_backward(
            u, x, bias, c0, v, lengths, mask, grad_h, grad_last, activation, reverse, scale
        )
    batch, d = c0.shape
    grad_u, grad_c = torch.empty_like(u), grad_last.clone(memory_format=torch.contiguous_format)
    grad_x = u.new_empty(0) if x is None else torch.empty_like(x)
    grad_bias = u.new_zeros((batch, 2 * d))
    grad_v = u.new_zeros((0 if v is None else batch, 2 * d))
    packed = _packed(
        u, x, bias, c0, v, lengths, mask, c, activation, reverse, scale, grad_h=grad_h, grad_c=grad_c, grad_u=grad_u,
        grad_highway=grad_x, grad_bias=grad_bias, grad_v=grad_v,
    )
    if x is None:
        packed["grad_highway"] = grad_u.data_ptr() + 3 * d * u.element_size()
    _run("backward", u, packed)
    return grad_u, grad_x, grad_bias.sum(0), grad_c, grad_v.sum(0)


def _register() -> torch.library.Library:
    """Make both passes operators of torch, so that compiled graphs may hold them."""
    tensors = "Tensor u, Tensor? x, Tensor bias, Tensor c0, Tensor? v, Tensor lengths, Tensor? mask"
    options = "str activation, bool reverse, float scale"
    library = torch.library.Library("trireme", "FRAGMENT")
    library.define(f"sru_forward({tensors}, {options}) -> (Tensor, Tensor)")
    library.define(
        f"sru_backward({tensors}, Tensor c, Tensor grad_h, Tensor grad_last, {options}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    for name, act in (("sru_forward", _forward), ("sru_backward", _backward)):
        library.impl(name, act, "CompositeExplicitAutograd")
    torch.library.register_fake("trireme::sru_forward", _shapes_forward, lib=library)
    torch.library.register_fake("trireme::sru_backward", _shapes_backward, lib=library)
    return library


def _shapes_forward(u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    made = u.new_empty((u.shape[0], *c0.shape))
    return made, torch.empty_like(made)


def _shapes_backward(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    empty = u.new_empty(0)
    return (
        torch.empty_like(u), empty if x is None else torch.empty_like(x), torch.empty_like(bias), torch.empty_like(c0),
        u.new_empty(2 * c0.shape[1]),
    )


# -- the reference ----------------------------------------------------------------------------------------------------


def reference(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor, mask: Tensor | None,
    activation: str, reverse: bool, scale: float,
) -> tuple[Tensor, Tensor]:
    """h and c [T, B, D] in torch, step by step; for any type of float, and for torch to differentiate."""
    d = c0.shape[1]
    g = {"identity": lambda c: c, "tanh": torch.tanh, "relu": torch.relu}[activation]
    c, outputs, states = c0, [c0] * len(u), [c0] * len(u)
    for t in reversed(range(len(u))) if reverse else range(len(u)):
        candidate, forget, reset, *more = u[t].split(d, dim=1)
        highway = more[0] if x is None else x[t]
        if v is not None:
            forget, reset = forget + v[:d] * c, reset + v[d:] * c
        f, r = torch.sigmoid(forget + bias[:d]), torch.sigmoid(reset + bias[d:])
        state = f * c + (1 - f) * candidate
        value = g(state) if mask is None else g(state) * mask[t]
        here = (t < lengths)[:, None]
        outputs[t] = torch.where(here, r * value + (1 - r) * (highway * scale), torch.zeros_like(c))
        states[t] = c = torch.where(here, state, c)
    return torch.stack(outputs), torch.stack(states)


def _reference_backward(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor, mask: Tensor | None,
    grad_h: Tensor, grad_last: Tensor, activation: str, reverse: bool, scale: float,
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = [None if t is None else t.detach().requires_grad_() for t in (u, x, bias, c0, v)]
        u_, x_, bias_, c0_, v_ = inputs
        h, c = reference(u_, x_, bias_, c0_, v_, lengths, mask, activation, reverse, scale)  # type: ignore[arg-type]
        wanted = [t for t in inputs if t is not None]
        found = iter(torch.autograd.grad([h, c[0] if reverse else c[-1]], wanted, [grad_h, grad_last]))
    return tuple(u.new_empty(0) if t is None else next(found) for t in inputs)


LIBRARY = _register()  # as long as it lives, so do the operators
