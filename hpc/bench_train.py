"""`trireme bench train`: a whole training step beside a plain torch loop, and several ranks beside one.

All sides live at once and take turns (see bench_crew.py). Trireme's sides run the real loop on a real recipe, from
shards on disk: with one split beside the loop, and with as many splits as the largest number of ranks for the
speed-up, so that every number of ranks learns the same. The limit of a speed-up is what the machine itself gives to as
many plain loops at once, each on its share of the batch, that never speak to each other.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from hpc.bench import in_turns, make_data, quotient, recipe_for, say, scratch, spread
from hpc.bench_crew import Crew

WARM_UP = 3  # steps of every side before anything is measured
SETTLE = 1  # steps of every turn that only bring the side's memory back into the caches
WIDTH, CONTEXT = 40, 5
RATE, MOMENTUM = 0.01, 0.9
PHASES = ("read", "forward", "backward", "exchange")

Steps = list[dict[str, float]]  # of every step: "seconds", "cpu", and Trireme's phases


class Side(NamedTuple):
    """One of those compared. splits: 0 for torch loops, of which `ranks` run at once."""

    ranks: int
    splits: int

    @property
    def label(self) -> str:
        if self.splits:
            return f"trireme, {self.ranks} of {self.splits}"
        return f"{self.ranks} torch loops" if self.ranks > 1 else "torch loop"


def sides_of(ranks: list[int]) -> list[Side]:
    """Who is measured: one split on one rank and the loop, then every number of ranks with the largest's splits."""
    most = max(ranks)
    sides = [Side(1, 1), Side(1, 0)]
    if most > 1:
        sides += [Side(k, most) for k in sorted({1, *ranks})] + [Side(k, 0) for k in sorted(ranks) if k > 1]
    return sides


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The records of all sides and what follows from them. Raises ValueError for a batch that cannot be split."""
    most = max(arguments.ranks)
    if arguments.batch % most:
        raise ValueError(f"--batch {arguments.batch} is no multiple of {most} ranks; use one that is")
    sides = sides_of(arguments.ranks)
    with scratch() as folder, ExitStack() as stack:
        make_data(folder / "data", frames_for(arguments), width=WIDTH, classes=arguments.classes)
        crews = {side: stack.enter_context(_crew(side, arguments, folder)) for side in sides}
        for side, crew in crews.items():
            say(f"warming up: {side.label}, {crew.hello[0]['parameters']:,} parameters")
            crew.take(WARM_UP)
        rounds: dict[Side, list[Steps]] = {side: [] for side in sides}
        for round_ in range(arguments.repeat):
            for side in in_turns(round_, sides):
                rounds[side].append(_joined(crews[side].take(SETTLE + arguments.steps))[SETTLE:])
            medians = ", ".join(f"{side.label} {_median(rounds[side][-1]):.4f} s" for side in sides)
            say(f"round {round_ + 1} of {arguments.repeat}: {medians}")
        hello = {side: crew.hello[0] for side, crew in crews.items()}
    common = {k: getattr(arguments, k) for k in ("precision", "threads", "batch", "layers", "width", "classes")}
    common["device"] = hello[sides[0]]["device"]
    for side in sides:
        yield _record(side, hello[side]["parameters"], [step for turn in rounds[side] for step in turn], common)
    yield from _summaries(rounds, common)


def frames_for(arguments: argparse.Namespace) -> int:
    """Frames of data that no side can use up."""
    return (WARM_UP + arguments.repeat * (SETTLE + arguments.steps) + 1) * arguments.batch


def _crew(side: Side, arguments: argparse.Namespace, folder: Path) -> Crew:
    model = {key: getattr(arguments, key) for key in ("layers", "width", "activation")}
    place = {key: getattr(arguments, key) for key in ("threads", "precision", "device")}
    name = side.label.replace(" ", "-").replace(",", "")
    if side.splits:
        recipe = recipe_for(
            folder / "data", folder / name, splits=side.splits, **place, task={"context": CONTEXT, **model},
            data={"batch": arguments.batch, "split_frames": frames_for(arguments)},
            optim={"name": "momentum", "learning_rate": RATE, "momentum": MOMENTUM},
        )
        return Crew(name, side.ranks, "hpc.bench_worker", {"recipe": recipe}, bind=arguments.bind, folder=folder)
    spec = {
        "inputs": (2 * CONTEXT + 1) * WIDTH, "classes": arguments.classes, "batch": arguments.batch // side.ranks,
        "learning_rate": RATE, "momentum": MOMENTUM, **model, **place,
    }
    return Crew(name, side.ranks, "hpc.bench_loop", spec, bind=arguments.bind, folder=folder)


def _joined(reports: list[Steps]) -> Steps:
    """A crew's steps: the slowest rank's seconds, and the means over ranks of the rest."""
    steps = []
    for ranks in zip(*reports, strict=True):
        mean = {key: statistics.fmean(rank[key] for rank in ranks) for key in ranks[0]}
        steps.append(mean | {"seconds": max(rank["seconds"] for rank in ranks)})
    return steps


def _median(steps: Steps, key: str = "seconds") -> float:
    return statistics.median(step[key] for step in steps)


def _record(side: Side, parameters: int, steps: Steps, common: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {"impl": "trireme" if side.splits else "torch loop", "ranks": side.ranks}
    if side.splits:
        own["splits"] = side.splits
        own |= {f"{phase}_s": _median(steps, phase) for phase in PHASES}
    timing = spread([step["seconds"] for step in steps])
    speed = common["batch"] / timing["median_s"]
    return {
        "what": "step", **own, **common, "parameters": parameters, **timing, "cpu_s": _median(steps, "cpu"),
        "frames_per_s": speed,
    }


def _summaries(rounds: dict[Side, list[Steps]], common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Quotients of whole turns: a pair is two turns of the same round."""
    turns = {side: [_median(turn) for turn in rounds[side]] for side in rounds}
    cpu = {side: [_median(turn, "cpu") for turn in rounds[side]] for side in rounds}
    ours, loop = Side(1, 1), Side(1, 0)
    yield {
        "what": "step against torch loop", **common, "pairs": len(turns[ours]), **quotient(turns[ours], turns[loop]),
        **quotient(cpu[ours], cpu[loop], "cpu_ratio"),
    }
    for side in rounds:
        if side.ranks > 1 and side.splits:
            limit = quotient(turns[loop], turns[Side(side.ranks, 0)], "limit_speedup")
            yield {
                "what": f"{side.ranks} ranks against 1", **common, "splits": side.splits, "pairs": len(turns[side]),
                **quotient(turns[Side(1, side.splits)], turns[side], "speedup"),
                "limit": "plain loops at once, without exchange", **limit,
            }
