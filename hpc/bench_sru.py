"""`trireme bench sru`: a layer of SRU beside LSTM, convolutions, and the time that its own parts must take.

Paper 001, figure 1: a layer of width d on a batch of sequences, forward, and forward with backward. Beside ours, in
turns: torch's LSTM, Conv1d with 2 and 3 inputs a step, the package `sru` where it is installed, the grouped matrix
product of equation (8) by itself as our layer makes it, the recurrence by itself, and a copy of as many bytes as that
reads and writes in float32.

The package compiles its CPU side when it is imported, for which it needs a C++ compiler and `ninja`. To keep it out of
the environment: pip install --no-deps --target FOLDER sru ninja, and PYTHONPATH=FOLDER PATH=FOLDER/bin:$PATH.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple

import torch

from hpc.bench import quotient, say, spread, timed
from hpc.quantities import counted
from hpc.runtime import keep_freed_memory
from kernels.product import product as multiplied
from kernels.sru import recurrence
from models.layers.recurrent import SRU

TURN_S = 0.02  # a timing repeats what is quick until it takes about so long
PASSES = ("forward", "forward+backward")
FLOATS = {"forward": 6, "forward+backward": 6 + 10}  # a unit and step: read and written by the recurrence


class Size(NamedTuple):
    """d units, `length` steps, `batch` sequences."""

    d: int
    length: int
    batch: int
    threads: int
    dtype: str

    def __str__(self) -> str:
        threads = counted(self.threads, "thread")
        return f"d {self.d}, length {self.length}, batch {self.batch}, {threads}, {self.dtype}"


class Side(NamedTuple):
    """A layer, as a function of its input, and the parameters that learn."""

    act: Callable[[torch.Tensor], torch.Tensor]
    given: torch.Tensor
    parameters: list[torch.nn.Parameter]


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record of every layer, size and pass, and how many times as fast ours is."""
    sizes = [
        Size(*one) for one in product(
            arguments.d, arguments.length, arguments.batch, arguments.threads, arguments.precision
        )
    ]  # fmt: skip
    found: list[dict[str, Any]] = []
    keep_freed_memory()  # as in training
    for number, size in enumerate(sizes):
        say(f"{number + 1} of {len(sizes)}: {size}")
        torch.set_num_threads(size.threads)
        sides = make_sides(size)
        for which in PASSES:
            seconds = _timed(sides, which, size, arguments.rounds, arguments.seconds)
            common = {**size._asdict(), "pass": which}
            found += [{"what": "layer", "layer": name, **common, **spread(taken)} for name, taken in seconds.items()]
            yield from found[-len(seconds) :]
            yield _summary(seconds, common)
    if arguments.plot:
        from hpc.bench_sru_picture import draw  # matplotlib: only where it is wanted

        arguments.plot.write_bytes(draw(found))
        say(f"drawn: {arguments.plot}")


def make_sides(size: Size) -> dict[str, Side]:
    """Every layer at a size; ours is "sru"."""
    torch.manual_seed(1)
    d = size.d
    steps_first = torch.randn(size.length, size.batch, d)
    batch_first = torch.randn(size.batch, d, size.length)
    ours = SRU(d, d)
    state = (torch.zeros(size.batch, d),)
    sides = {
        "sru": Side(lambda x: ours(x, None, state)[0], steps_first, list(ours.parameters())),
    }
    if lstm := _lstm(d, size.dtype):
        sides["lstm"] = Side(lambda x: lstm(x)[0], steps_first, list(lstm.parameters()))
    for grams in (2, 3):
        conv = torch.nn.Conv1d(d, d, grams, padding=grams - 1)
        sides[f"conv{grams}"] = Side(conv, batch_first, list(conv.parameters()))
    weight = torch.nn.Parameter(torch.randn(3 * d, d) / d)
    sides["product"] = Side(lambda x: _Product.apply(x, weight, size.dtype), steps_first, [weight])
    kind = getattr(torch, size.dtype)
    highway, u = steps_first.to(kind), torch.randn(size.length, size.batch, 3 * d).to(kind)
    sides["recurrence"] = Side(lambda u: recurrence(u, highway, ours.bias, state[0])[0], u, [ours.bias])
    if size.dtype == "float32" and (theirs := _package(d)):  # under autocast its kernel refuses what it is given
        sides["package sru"] = Side(lambda x: theirs(x)[0], steps_first, list(theirs.parameters()))
    return sides


class _Product(torch.autograd.Function):
    """Equation (8) by itself, as `kernels.sru.layer` makes it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, dtype: str) -> torch.Tensor:
        kind = getattr(torch, dtype)
        rows, weight = x.to(kind).flatten(0, 1), weight.to(kind)
        ctx.save_for_backward(rows, weight)
        return multiplied(rows, weight).view(*x.shape[:2], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad_rows = grad.flatten(0, 1)
        grad_x = multiplied(grad_rows, weight.t()).view(*grad.shape[:2], weight.shape[1])
        return grad_x, multiplied(grad_rows.t(), rows.t()), None


def _lstm(d: int, dtype: str) -> torch.nn.LSTM | None:
    """torch's LSTM, where this processor has it: of bfloat16 not all do."""
    lstm = torch.nn.LSTM(d, d)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            lstm(torch.zeros(1, 1, d))
    except RuntimeError as error:
        say(f"torch's LSTM is left out, in {dtype}: {' '.join(str(error).split())[:200]}")
        return None
    return lstm


def _package(d: int) -> Any:
    """A layer of the package `sru`, where it is installed; else None."""
    try:
        return import_module("sru").SRU(d, d, num_layers=1, dropout=0.0)
    except (ImportError, OSError, RuntimeError) as error:  # the last two: it does not compile
        if not isinstance(error, ModuleNotFoundError):
            say(f"the package sru is left out: {' '.join(str(error).split())[:200]}")
        return None


def _once(side: Side, which: str, dtype: str) -> Callable[[], object]:
    """One pass of a layer."""

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return side.act(given)

    def without_gradients() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    def both() -> None:
        for tensor in (given, *side.parameters):
            tensor.grad = None
        out = forward()
        out.backward(torch.ones_like(out))

    given = side.given.clone().requires_grad_(which != "forward")
    return without_gradients if which == "forward" else both


def _timed(sides: dict[str, Side], which: str, size: Size, rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds of a pass by layer, round by round; "copy" among them."""
    acts = {name: _once(side, which, size.dtype) for name, side in sides.items()}
    source = torch.zeros(FLOATS[which] * size.length * size.batch * size.d // 2)
    target = torch.empty_like(source)
    acts["copy"] = lambda: target.copy_(source)
    return timed(acts, rounds, TURN_S, budget)


def _summary(seconds: dict[str, list[float]], common: dict[str, Any]) -> dict[str, Any]:
    """How many times as fast as each peer ours is, and how near to its own product and one pass over its arrays."""
    record: dict[str, Any] = {"what": "sru against others", **common, "pairs": len(seconds["sru"])}
    for peer in ("lstm", "conv2", "conv3", "package sru"):
        if peer in seconds:
            record |= quotient(seconds[peer], seconds["sru"], f"times_{peer.replace(' ', '_')}")
    parts = [a + b for a, b in zip(seconds["product"], seconds["copy"], strict=True)]
    record |= quotient(seconds["sru"], parts, "of_product_and_pass")
    return record | quotient(seconds["recurrence"], seconds["copy"], "recurrence_over_copy")
