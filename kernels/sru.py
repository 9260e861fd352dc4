"""The recurrence of SRU in one pass over time, forward and backward.

Source: paper 001 (Lei, Zhang: Training RNNs as Fast as CNNs), equations (4) to (7) and algorithm 1, from the grouped
product of equation (8), length-major:

    f = sigmoid(u_f + b_f)          c_t = f c_{t-1} + (1 - f) u_x
    r = sigmoid(u_r + b_r)          h_t = r drop(g(c_t)) + (1 - r) x_t

u's fourth part, where there is one, is W_h x (appendix A.1) and stands for x_t. `drop` is standard dropout (section
2.1). Departure, only where asked for: the later SRU (Lei et al. 2018) with v_f c_{t-1} and v_r c_{t-1} in the gates and
`scale` before x_t.

A sequence that is shorter than the batch's longest keeps its state where it ends: outputs beyond it are 0, nothing
there is read by the recurrence, and its gradients there are 0. A layer's product does read its padding, and the
weights' gradient multiplies it by 0: it may be anything finite.

What is large may lie in memory as bfloat16: u, x, h and their gradients. All arithmetic, the states and the gates are
float32 all the same; so is c, which backward needs as exactly as forward had it.

Legend: T steps, B sequences, I inputs, D units, K = 3 or 4 parts of u.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from kernels import gpu, native
from kernels.product import product

ACTIVATIONS = {"identity": 0, "tanh": 1, "relu": 2}

Tensor = torch.Tensor

POINTERS = (
    "u", "highway", "bias", "v", "mask", "c0", "lengths", "h", "c", "grad_h", "grad_c", "grad_u", "grad_highway",
    "grad_bias", "grad_v",
)
NUMBERS = ("steps", "batch", "d", "u_row", "highway_row", "threads")
PACKED = np.dtype([
    *((name, np.uint64) for name in POINTERS), *((name, np.int64) for name in NUMBERS), ("scale", np.float64),
    ("activation", np.int32), ("reverse", np.int32),
])  # `Sru` of src/sru.cpp and src/sru.cu
PACK = struct.Struct(f"={len(POINTERS)}Q{len(NUMBERS)}qd2i").pack  # the same, quicker
THREADS = 128  # of a GPU's block
ENOUGH = 1 << 15  # units and steps; a second thread is not worth its start below
SUFFIX = {torch.float32: "", torch.bfloat16: "_bfloat16", torch.float64: "_double"}  # by what u is stored as


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
    lengths     whole numbers [B], 0 to T, where u is; None: all are T long
    mask_TBD    what g(c) is multiplied by: 0, or 1 / (1 - p); None: nothing is dropped
    activation  g: "tanh", "relu" or "identity"
    reverse     from the last step to the first; a short sequence begins at its own end
    scale       of the highway's input

    u, x and h are bfloat16 if u is; all else is taken as float32, unless u is float64. Raises ValueError if shapes or
    devices do not fit.
    """
    stored, kind = _kinds(u_TBKD.dtype)
    _check(u_TBKD.shape, x_TBD, bias, c0_BD, v, lengths, mask_TBD, activation, u_TBKD.device)
    u = u_TBKD.to(stored).contiguous()
    x = None if x_TBD is None else x_TBD.to(stored).contiguous()
    bias, c0 = bias.to(kind).contiguous(), c0_BD.to(kind).contiguous()
    v, mask = (None if t is None else t.to(kind).contiguous() for t in (v, mask_TBD))
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    if not len(u):
        return u.new_zeros((0, *c0.shape)), c0.clone()
    return _Recurrence.apply(u, x, bias, c0, v, lengths, mask, activation, reverse, scale)


def layer(
    x_TBI: Tensor, weight: Tensor, bias: Tensor, c0_BD: Tensor, *, given_TBI: Tensor | None = None,
    v: Tensor | None = None, lengths: Tensor | None = None, mask_TBD: Tensor | None = None, activation: str = "tanh",
    reverse: bool = False, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The grouped product of equation (8), and the recurrence: h [T, B, D] and the last states [B, D].

    x_TBI      the inputs
    weight     [K * D, I]: W, W_f, W_r, and W_h if K = 4; if K = 3, x is the highway's input, and I = D
    given_TBI  what is multiplied by the weights if it is not x itself: x with some of it dropped

    All else as in `recurrence`. Under autocast to bfloat16, x, the weights and h are bfloat16, unless x is float64.
    """
    device = x_TBI.device.type
    cast = torch.is_autocast_enabled(device) and x_TBI.dtype != torch.float64
    stored, kind = _kinds(torch.get_autocast_dtype(device) if cast else x_TBI.dtype)
    if len(weight) == 4 * c0_BD.shape[1] and given_TBI is not None:
        x_TBI, given_TBI = given_TBI, None
    highway = None if len(weight) == 4 * c0_BD.shape[1] else x_TBI
    shape = torch.Size((*x_TBI.shape[:2], len(weight)))
    _check(shape, highway, bias, c0_BD, v, lengths, mask_TBD, activation, x_TBI.device)
    bias, c0 = bias.to(kind).contiguous(), c0_BD.to(kind).contiguous()
    v, mask = (None if t is None else t.to(kind).contiguous() for t in (v, mask_TBD))
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    if not len(x_TBI):
        return x_TBI.new_zeros((0, *c0.shape), dtype=stored), c0.clone()
    return _Layer.apply(x_TBI, given_TBI, weight, bias, c0, v, lengths, mask, stored, activation, reverse, scale)


def _kinds(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """As what u, x and h lie in memory, and all else."""
    stored = dtype if dtype in SUFFIX else torch.float32
    return stored, torch.float64 if stored == torch.float64 else torch.float32


def _check(
    shape: torch.Size, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor | None,
    mask: Tensor | None, activation: str, device: torch.device,
) -> None:
    """Refuse what would have a fused pass read or write outside of its arrays; `shape` is u's."""
    steps, batch, width = shape
    d = c0.shape[-1]
    given = width == 3 * d and x is not None and x.shape == (steps, batch, d)
    if not (given or (width == 4 * d and x is None)):
        raise ValueError(
            f"u {tuple(shape)} and x {None if x is None else tuple(x.shape)} do not fit {d} units: u needs 3 parts and "
            "x as wide as the units, or 4 parts and no x"
        )
    for name, tensor, wanted in (
        ("bias", bias, (2 * d,)), ("the state", c0, (batch, d)), ("v", v, (2 * d,)), ("lengths", lengths, (batch,)),
        ("mask", mask, (steps, batch, d)),
    ):
        if tensor is not None and tensor.shape != wanted:
            raise ValueError(f"{name} {tuple(tensor.shape)} does not fit u {tuple(shape)}: expected {wanted}")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, u on {device}; put them on one")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation '{activation}' is unknown; choose from {', '.join(ACTIVATIONS)}")


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor | None,
        mask: Tensor | None, activation: str, reverse: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:
        h, c = torch.ops.trireme.sru_forward(u, x, bias, c0, v, lengths, mask, activation, reverse, scale)
        ctx.save_for_backward(u, x, bias, c0, v, lengths, mask, c)
        ctx.options = (activation, reverse, scale)
        return h, (c[0] if reverse else c[-1]).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        grad_u, grad_x, *rest = _gradients(ctx.saved_tensors, grad_h, grad_last, ctx.options)
        return (grad_u, grad_x, *rest, None, None, None, None, None)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, given: Tensor | None, weight: Tensor, bias: Tensor, c0: Tensor, v: Tensor | None,
        lengths: Tensor | None, mask: Tensor | None, stored: torch.dtype, activation: str, reverse: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:
        first = (x if given is None else given).to(stored).contiguous()
        weight = weight.to(stored)
        u = product(first.flatten(0, 1), weight).view(*x.shape[:2], len(weight))
        highway = None
        if len(weight) == 3 * c0.shape[1]:
            highway = first if given is None else x.to(stored).contiguous()
        h, c = torch.ops.trireme.sru_forward(u, highway, bias, c0, v, lengths, mask, activation, reverse, scale)
        ctx.save_for_backward(first, weight, u, highway, bias, c0, v, lengths, mask, c)
        ctx.options, ctx.apart = (activation, reverse, scale), given is not None
        return h, (c[0] if reverse else c[-1]).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        first, weight, *saved = ctx.saved_tensors
        grad_u, grad_highway, *rest = _gradients(saved, grad_h, grad_last, ctx.options)
        assert grad_u is not None
        grad_rows = grad_u.flatten(0, 1)
        grad_weight = product(grad_rows.t(), first.flatten(0, 1).t()) if ctx.needs_input_grad[2] else None
        grad_x, grad_given = grad_highway, None
        if ctx.apart and ctx.needs_input_grad[1]:
            grad_given = product(grad_rows, weight.t()).view(first.shape)
        if not ctx.apart and ctx.needs_input_grad[0]:  # both ways of x in one sum
            plus = None if grad_highway is None else grad_highway.flatten(0, 1)
            grad_x = product(grad_rows, weight.t(), plus).view(first.shape)
        return (grad_x, grad_given, grad_weight, *rest, None, None, None, None, None, None)


def _gradients(
    saved: Sequence[Tensor], grad_h: Tensor, grad_last: Tensor, options: tuple[str, bool, float]
) -> tuple[Tensor | None, ...]:
    """Of u, x, bias, c0 and v; None for what there is not."""
    u, x, bias, c0, v, lengths, mask, c = saved
    grad_u, grad_x, grad_bias, grad_c, grad_v = torch.ops.trireme.sru_backward(
        u, x, bias, c0, v, lengths, mask, c, grad_h.contiguous(), grad_last, *options
    )
    return grad_u, None if x is None else grad_x, grad_bias, grad_c, None if v is None else grad_v


def _fused(u: Tensor) -> bool:
    """Whether a fused side serves this tensor."""
    if u.is_cuda:
        return u.dtype != torch.float64 and not gpu.missing()
    return u.device.type == "cpu" and native.library() is not None


def _packed(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor | None,
    mask: Tensor | None, c: Tensor, h: Tensor | None, grads: Sequence[Tensor | None], activation: str, reverse: bool,
    scale: float,
) -> bytes:
    """grads: of h, the last state, u, x, the bias and v, as POINTERS has them; those that are None are not there."""
    steps, batch, width = u.shape
    d = c0.shape[1]
    grad_h, grad_c, grad_u, grad_x, grad_bias, grad_v = grads
    assert all(t is None or (t.dtype == u.dtype and t.is_contiguous()) for t in (u, x, h, grad_h, grad_u, grad_x))
    real = (bias, v, mask, c0, c, grad_c, grad_bias, grad_v)
    assert all(t is None or (t.dtype == bias.dtype and t.is_contiguous()) for t in real)
    assert lengths is None or (lengths.dtype == torch.int64 and lengths.is_contiguous())
    highway, grad_highway, row = x, grad_x, d
    if x is None:  # the fourth part of u
        highway, row = u.view(-1)[3 * d :], width
        grad_highway = None if grad_u is None else grad_u.view(-1)[3 * d :]
    pointers = (u, highway, bias, v, mask, c0, lengths, h, c, grad_h, grad_c, grad_u, grad_highway, grad_bias, grad_v)
    return PACK(
        *[0 if tensor is None else tensor.data_ptr() for tensor in pointers], steps, batch, d, width, row,
        torch.get_num_threads() if steps * batch * d >= ENOUGH else 1, scale, ACTIVATIONS[activation], reverse,
    )


def _run(side: str, u: Tensor, units: int, packed: bytes) -> None:
    """One pass over as many units of sequences."""
    function = f"trireme_sru_{side}{SUFFIX[u.dtype]}"
    if not u.is_cuda:
        getattr(native.library(), function)(packed)
    elif units:
        argument = np.frombuffer(packed, PACKED)[0]
        gpu.launch("sru.cu", function, -(-units // THREADS), THREADS, (argument,), u.device)


def _forward(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor | None,
    mask: Tensor | None, activation: str, reverse: bool, scale: float,
) -> tuple[Tensor, Tensor]:
    if not _fused(u):
        return reference(u, x, bias, c0, v, lengths, mask, activation, reverse, scale)
    shape = (u.shape[0], *c0.shape)
    h, c = u.new_empty(shape), c0.new_empty(shape)
    packed = _packed(u, x, bias, c0, v, lengths, mask, c, h, (None,) * 6, activation, reverse, scale)
    _run("forward", u, c0.numel(), packed)
    return h, c


def _backward(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor | None,
    mask: Tensor | None, c: Tensor, grad_h: Tensor, grad_last: Tensor, activation: str, reverse: bool, scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of u, x, bias, c0 and v; an empty one for what there is not."""
    if not _fused(u):
        return _reference_backward(
            u, x, bias, c0, v, lengths, mask, grad_h, grad_last, activation, reverse, scale
        )
    batch, d = c0.shape
    grad_u, grad_c = torch.empty_like(u), grad_last.clone(memory_format=torch.contiguous_format)
    grad_x, empty = None if x is None else torch.empty_like(x), u.new_empty(0)
    grad_bias = bias.new_zeros((batch, 2 * d))
    grad_v = None if v is None else v.new_zeros((batch, 2 * d))
    grads = (grad_h, grad_c, grad_u, grad_x, grad_bias, grad_v)
    _run("backward", u, c0.numel(), _packed(
        u, x, bias, c0, v, lengths, mask, c, None, grads, activation, reverse, scale
    ))
    return (
        grad_u, empty if grad_x is None else grad_x, grad_bias.sum(0), grad_c,
        bias.new_zeros(0) if grad_v is None else grad_v.sum(0),
    )


def _register() -> torch.library.Library:
    """Make both passes operators of torch, so that compiled graphs may hold them."""
    tensors = "Tensor u, Tensor? x, Tensor bias, Tensor c0, Tensor? v, Tensor? lengths, Tensor? mask"
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
    shape = (u.shape[0], *c0.shape)
    return u.new_empty(shape), c0.new_empty(shape)


def _shapes_backward(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(u), u.new_empty(0) if x is None else torch.empty_like(x), torch.empty_like(bias),
        torch.empty_like(c0), bias.new_empty(0 if v is None else 2 * c0.shape[1]),
    )


# -- the reference ----------------------------------------------------------------------------------------------------


def reference(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor | None,
    mask: Tensor | None, activation: str, reverse: bool, scale: float,
) -> tuple[Tensor, Tensor]:
    """h and c [T, B, D] in torch, step by step; for any type of float, and for torch to differentiate."""
    d, stored = c0.shape[1], u.dtype
    u, x = u.to(c0.dtype), None if x is None else x.to(c0.dtype)
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
        out = r * value + (1 - r) * (highway * scale)
        if lengths is not None:
            here = (t < lengths)[:, None]
            out, state = torch.where(here, out, torch.zeros_like(c)), torch.where(here, state, c)
        outputs[t], states[t] = out, state
        c = state
    return torch.stack(outputs).to(stored), torch.stack(states)


def _reference_backward(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor, v: Tensor | None, lengths: Tensor | None,
    mask: Tensor | None, grad_h: Tensor, grad_last: Tensor, activation: str, reverse: bool, scale: float,
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = [None if t is None else t.detach().requires_grad_() for t in (u, x, bias, c0, v)]
        u_, x_, bias_, c0_, v_ = inputs
        h, c = reference(u_, x_, bias_, c0_, v_, lengths, mask, activation, reverse, scale)  # type: ignore[arg-type]
        wanted = [t for t in inputs if t is not None]
        found = iter(torch.autograd.grad([h, c[0] if reverse else c[-1]], wanted, [grad_h, grad_last]))
    return tuple((u, u, bias, bias, bias)[k].new_empty(0) if t is None else next(found) for k, t in enumerate(inputs))


LIBRARY = _register()  # as long as it lives, so do the operators
