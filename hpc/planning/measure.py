"""What `trireme plan` measures: the costs of paper 002, section 2.1, of a recipe on the machine at hand.

The recipe's own task and model compute on batches of its own data; what quantizes, adds and updates is the strategies'
own code, on this rank's own gradients. All ranks that are there measure at once, for they share a node's memory and
its link; the slowest counts.

Started as `python -m mpi4py -m hpc.planning.measure SPEC` it is a rank that measures for a driver (`bench_crew.py`).

Legend: P floats of the flat buffer, N splits.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch

from collectives.comm import Comm
from collectives.plan import BLOCK
from collectives.strategy import Rate
from hpc.batches import make_order
from hpc.bench_crew import Gate
from hpc.build import make_model, make_task, registry
from hpc.config import Recipe, options, resolve
from hpc.everywhere import made_everywhere
from hpc.flat import Flat
from hpc.planning.link import beside, measure_link, message_seconds
from hpc.planning.powersgd import LOW_RANKS, Arithmetic
from hpc.runtime import Device
from hpc.shards import Dataset, read_manifest
from kernels.window import ADD, TreeSum
from models.task import Carry, Task

BUDGET_S = 2.0  # of a measurement, about
LEAST, MOST = 3, 15  # repetitions
ROWS = (1, 2, 4)  # of an owner
STREAMED = 1 << 20  # bytes of the exchanges that go on while a core computes
SMALL_RATE = 1e-9  # what is measured updates weights; they stay what they are


class Taken(NamedTuple):
    """Seconds of a batch, what the loss counted in it, and when the parameters' gradients were final in backward."""

    forward: float
    backward: float
    counted: int
    final: list[float]


class Learner:
    """One rank's model, and what learning a batch takes."""

    def __init__(self, recipe: Recipe, comm: Comm):
        fields = comm.on_root(lambda: read_manifest(Path(recipe.data.train))["fields"])
        self.recipe = recipe
        self.device = Device(recipe.device, recipe.precision, comm.local_rank, recipe.threads)
        self.task: Task = made_everywhere(comm, lambda: make_task(recipe, fields))
        opened: list[Dataset] = []
        comm.each(lambda: opened.append(Dataset(Path(recipe.data.train), self.task.fields, self.task.targets)))
        self.dataset = opened[0]
        made: list[torch.nn.Module] = []
        comm.each(lambda: made.append(make_model(self.task, self.device, recipe.seed)))
        self.model = made[0].train()
        self.alone = comm.apart()
        self.flat = Flat(self.model, self.zeros)
        self.flat.on_grad(self._is_final)
        self.gradient = self.zeros(self.flat.size)
        self.moments = [0.0] * len(self.flat.names)

    def zeros(self, count: int) -> torch.Tensor:
        return self.alone.memory.zeros(count, self.device.torch)

    def _is_final(self, parameter: int) -> None:
        self.moments[parameter] = time.perf_counter()

    def settle(self) -> float:
        """Now, when all that was begun is done."""
        if self.device.torch.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def whole(self, items: float) -> int:
        """The nearest size that a batch of this task can have."""
        lane = self.task.steps if self.task.unit == "stream" else 1
        return max(1, round(items / lane)) * lane

    def batches(self, items: int) -> tuple[Iterator[Callable[[], Any]], float]:
        """Batches of so many items (fewer, where the data has no more), for ever, each as what makes it; how much the
        loss counts in an item."""
        data = self.recipe.data
        order = make_order(
            self.dataset, self.task, 1, batch=items, split_frames=data.split_frames, runs=data.runs,
            seed=self.recipe.seed,
        )
        piece = order.load(0, 0, 0)
        piece.move_(self.device.place)
        full = range(0, max(1, len(piece) - order.share + 1), order.share)

        def make(low: int) -> Callable[[], Any]:
            return lambda: self.task.collate(piece, low, min(low + order.share, len(piece)))

        return cycle([make(low) for low in full]), order.counted / order.batch

    def learn(self, make: Callable[[], Any]) -> Taken:
        """Read, forward and backward of one batch, as the loop does them; its gradient is in `gradient`."""
        began = self.settle()
        batch = make()
        self.flat.bind_grads(self.gradient.zero_())
        torch.manual_seed(self.recipe.seed)
        carry: Carry = None
        with self.device.autocast():
            total, count, _ = self.task.loss(self.model, batch, carry)
        middle = self.settle()
        total.backward()
        float(total.detach())
        end = self.settle()
        return Taken(middle - began, end - middle, count, [(at - middle) / (end - middle) for at in self.moments])


def nothing() -> None:
    pass


def repeated(comm: Comm, act: Callable[[], Any], before: Callable[[], object] = nothing) -> list[Any]:
    """What `act` returned, time after time, all ranks at once, each after `before`; after two times that only settle
    (collective)."""
    before()
    act()
    comm.barrier()
    began = time.perf_counter()
    before()
    act()
    once = max(comm.gather(time.perf_counter() - began))
    found = []
    for _ in range(max(LEAST, min(MOST, int(BUDGET_S / max(once, 1e-9))))):
        before()
        comm.barrier()
        found.append(act())
    return found


def seconds_of(comm: Comm, learner: Learner, act: Callable[[], object], before: Callable[[], object]) -> float:
    """The median over repetitions of the slowest rank's seconds (collective).

    before  what a step does first, untimed: it leaves little in the caches of what `act` goes through
    """

    def once() -> float:
        began = learner.settle()
        act()
        return learner.settle() - began

    everyone = comm.gather(repeated(comm, once, before))
    return statistics.median(max(times) for times in zip(*everyone, strict=True))


def measure_compute(comm: Comm, learner: Learner, sizes: Sequence[int]) -> dict[str, Any]:
    """Forward and backward by size (in items), and when gradients are final; no sizes above one that takes long, for
    from there on seconds grow as items do (collective)."""
    forward: dict[float, float] = {}
    backward: dict[float, float] = {}
    final, counted = [], 1.0
    for size in sorted({learner.whole(size) for size in sizes}):
        batches, counted = learner.batches(size)
        everyone = comm.gather(repeated(comm, lambda: learner.learn(next(batches))))  # noqa: B023 (called at once)
        slowest = [Taken(*max(ranks, key=lambda t: t[0] + t[1])) for ranks in zip(*everyone, strict=True)]
        items = statistics.mean(taken.counted for taken in slowest) / counted
        for curve, name in ((forward, "forward"), (backward, "backward")):
            curve[items] = statistics.median(getattr(t, name) / t.counted for t in slowest) * items * counted
        final = [statistics.median(shares) for shares in zip(*(taken.final for taken in slowest), strict=True)]
        if forward[items] + backward[items] > BUDGET_S and len(forward) > 1:
            break
    if learner.device.torch.type == "cuda":  # what was queued when says nothing: as if all floats took equally long
        final = [1.0 - offset / learner.flat.size for offset in learner.flat.offsets]
    shares = [[offset, min(1.0, max(0.0, share))] for offset, share in zip(learner.flat.offsets, final, strict=True)]
    return {"forward": sorted(forward.items()), "backward": sorted(backward.items()), "final": shares,
            "counted": counted}


def measure_packed(comm: Comm, learner: Learner, batch: float) -> dict[str, Any]:
    """Of the 1-bit strategy: quantizing a gradient, an owner's work by rows, adding results (collective).

    batch  what the loss counts in a minibatch
    """
    recipe, flat = learner.recipe, learner.flat
    asked = options(recipe.strategy) if recipe.strategy.name == "onebit" else {}
    rule = registry()["optim"][recipe.optim.name](**options(recipe.optim))
    strategy = registry()["strategy"]["onebit"](
        learner.alone, flat, rule, batch, **asked | {"cold_start": 0.0, "double_buffering": False}
    )
    strategy.lenient, strategy.rate = True, Rate(SMALL_RATE, 1)
    batches, _ = learner.batches(learner.whole(16))
    strategy.span(1)

    def learned() -> None:
        strategy.enter(0)
        with learner.device.autocast():
            total, count, _ = learner.task.loss(learner.model, next(batches)(), None)
        total.backward()
        strategy.step(0, count)

    quantize = seconds_of(comm, learner, lambda: strategy.leave(0), learned)
    strategy.advance(1)
    exchange = strategy.exchange

    def post(rows: torch.Tensor) -> None:
        for block in exchange.mine.blocks:
            cut = slice(block.first, block.last)
            exchange.make(exchange.codec, rows[:, cut], block, exchange.results[0][0, cut])

    def update() -> None:
        for block, row in exchange.landed():
            exchange.codec.add_(flat.weights[block.low : block.high], row, block.columns, fresh=False)

    packed = {n: partial(post, exchange.incoming.repeat(n, 1)) for n in ROWS}
    line = fitted({n: seconds_of(comm, learner, act, learned) for n, act in packed.items()})
    return {"quantize": quantize, "post": line, "update": seconds_of(comm, learner, update, learned)}


def measure_float32(comm: Comm, learner: Learner, batch: float) -> dict[str, Any]:
    """Of float32 gradients: an owner's work by partial sums, in the blocks of `collectives/plan.py` (collective)."""
    flat, recipe = learner.flat, learner.recipe
    rule = registry()["optim"][recipe.optim.name](**options(recipe.optim))
    slots = {name: learner.zeros(flat.size) for name in rule.slots}
    other, block = learner.zeros(flat.size), BLOCK if learner.device.torch.type == "cpu" else flat.size
    out, rate = learner.zeros(min(block, flat.size)), Rate(SMALL_RATE, 1)
    cuts = [slice(low, min(low + block, flat.size)) for low in range(0, flat.size, block)]
    batches, _ = learner.batches(learner.whole(16))

    def learned() -> None:
        learner.learn(next(batches))

    def work(rows: int) -> Callable[[], None]:
        program = [0, *(step for row in range(1, rows) for step in (row, ADD))]
        leaves = [learner.gradient, *[other] * (rows - 1)]
        sums = [TreeSum([leaf[cut] for leaf in leaves], program, out[: cut.stop - cut.start]) for cut in cuts]

        def act() -> None:
            for cut, add_up in zip(cuts, sums, strict=True):
                held = {name: slot[cut] for name, slot in slots.items()}
                rule(flat.weights[cut], add_up(), held, rate, 1, 1.0 / batch)

        return act

    return {"post32": fitted({rows: seconds_of(comm, learner, work(rows), learned) for rows in ROWS})}


def measure_low_rank(comm: Comm, learner: Learner) -> dict[str, Any]:
    """PowerSGD's arithmetic and torch's update, as pairs of its rank and seconds (collective)."""
    batches, _ = learner.batches(learner.whole(16))
    found = []
    for rank in LOW_RANKS:
        act = Arithmetic(learner.flat.shapes, learner.gradient, rank)
        found.append((rank, seconds_of(comm, learner, act, lambda: learner.learn(next(batches)))))
    return {"low_rank": found}


def fitted(times: dict[int, float]) -> list[float]:
    """[base, row] of the straight line nearest to seconds by rows; neither is below 0."""
    rows, seconds = list(times), list(times.values())
    slope, base = statistics.linear_regression(rows, seconds)
    slope = max(0.0, slope)
    return [max(0.0, base if slope else min(seconds)), slope]


def measure(recipe: Recipe, comm: Comm, sizes: Sequence[int], link: bool) -> dict[str, Any]:
    """The costs of a recipe, and of the link between ranks, as JSON values (collective).

    sizes  of sub-batches, in items
    link   whether to measure what is between ranks too (there are at least two)

    Raises ValueError or OSError for a recipe or data that cannot be trained with.
    """
    learner = Learner(recipe, comm)
    compute = measure_compute(comm, learner, sizes)
    batch = recipe.data.batch * compute["counted"]
    costs = compute | measure_packed(comm, learner, batch) | measure_float32(comm, learner, batch)
    costs |= measure_low_rank(comm, learner)
    cores = len(os.sched_getaffinity(0)) // comm.local_size
    costs["contended"] = learner.device.torch.type == "cuda" or cores <= recipe.threads
    found: dict[str, Any] = {
        "costs": costs, "noun": learner.task.noun, "parameters": learner.flat.count, "floats": learner.flat.size,
        "shapes": learner.flat.shapes, "device": str(learner.device.torch), "ranks": comm.size,
        "busy": comm.local_size, "message": message_seconds(comm),
    }
    if link:
        found["link"] = measure_link(comm, learner.flat.size)
        if costs["contended"] and comm.threads and learner.device.torch.type == "cpu":
            batches, _ = learner.batches(learner.whole(sizes[len(sizes) // 2]))
            size = min(STREAMED, 4 * learner.flat.size)
            found["link"]["core"] = beside(comm, lambda: learner.learn(next(batches)), size)
    return found


def work(spec: dict[str, Any]) -> None:
    """A rank that measures for a driver, and tells it when asked."""
    logging.getLogger("trireme").setLevel(logging.WARNING)
    comm = Comm.start()
    gate = Gate(spec["address"], {"rank": comm.rank})
    while gate.wait():
        if spec["recipe"]:
            gate.report(measure(resolve(spec["recipe"], registry()), comm, spec["sizes"], spec["link"]))
        else:
            gate.report({"link": measure_link(comm, spec["floats"])})
    comm.finish()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
