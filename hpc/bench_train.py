"""`trireme bench train`: a whole training step beside a plain torch loop, several ranks beside one, and beside DDP.

All sides live at once and take turns (see bench_crew.py). Trireme's sides run the real loop on a real recipe, from
shards on disk: with one split beside the loop, and with as many splits as the largest number of ranks for the
speed-up, so that every number of ranks learns the same. The limit of a speed-up is what the machine itself gives to as
many plain loops at once, each on its share of the batch, that never speak to each other. The peer of several ranks is
torch's DistributedDataParallel on gloo. On several (pretend) hosts the question is how much of the exchange hides
behind backward, so our side is there with overlap and without.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from hpc.bench import in_turns, make_data, quotient, say, scratch, spread
from hpc.bench_crew import Crew
from hpc.bench_sides import PHASES, WIDTH, Setup, Steps, joined, median
from hpc.hosts import Hosts, missing_rights
from hpc.quantities import counted

WARM_UP = 3  # steps of every side before anything is measured
SETTLE = 1  # steps of every turn that only bring the side's memory back into the caches


class Side(NamedTuple):
    """One of those compared.

    splits   0 for torch loops, of which `ranks` run at once
    ddp      whether those are one of torch's DistributedDataParallel
    overlap  the recipe's `strategy.overlap`
    """

    ranks: int
    splits: int
    ddp: bool = False
    overlap: str = "on"

    @property
    def impl(self) -> str:
        return "trireme" if self.splits else "torch ddp" if self.ddp else "torch loop"

    @property
    def label(self) -> str:
        if self.splits:
            return f"trireme, {self.ranks} of {self.splits}{'' if self.overlap == 'on' else ', no overlap'}"
        return f"{self.ranks} {self.impl}s" if self.ranks > 1 and not self.ddp else f"{self.impl} {self.ranks}"


def sides_of(ranks: list[int], hosts: int = 1) -> list[Side]:
    """Who is measured: one split on one rank and the loop, then every number of ranks with the largest's splits.

    On several hosts: the numbers of ranks that can be spread over them. Raises ValueError if none can.
    """
    most = max(ranks)
    several = [k for k in sorted(ranks) if k > 1 and k % hosts == 0]
    ddp = [Side(k, 0, ddp=True) for k in several]
    if hosts > 1:
        if not several:
            raise ValueError(f"--ranks {','.join(map(str, ranks))}: none is a multiple of {hosts} hosts")
        return [Side(k, most, overlap=overlap) for k in several for overlap in ("on", "off")] + ddp
    sides = [Side(1, 1), Side(1, 0)]
    if most > 1:
        sides += [Side(k, most) for k in sorted({1, *ranks})] + [Side(k, 0) for k in several] + ddp
    return sides


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The records of all sides and what follows from them.

    Raises ValueError for a batch that cannot be split, or ranks that cannot be spread over the hosts; OSError where
    pretend hosts are asked for and cannot be made.
    """
    most = max(arguments.ranks)
    if arguments.batch % most:
        raise ValueError(f"--batch {arguments.batch} is no multiple of {counted(most, 'rank')}; use one that is")
    sides = sides_of(arguments.ranks, arguments.hosts)
    if arguments.hosts > 1 and (missing := missing_rights()):
        raise OSError(missing)
    with scratch() as folder, ExitStack() as stack:
        make_data(folder / "data", frames_for(arguments), width=WIDTH, classes=arguments.classes)
        hosts = stack.enter_context(Hosts(arguments.hosts, arguments.link)) if arguments.hosts > 1 else None
        same = ("batch", "layers", "width", "classes", "activation", "threads", "precision", "device", "bind")
        setup = Setup(
            data=folder / "data", split_frames=frames_for(arguments), folder=folder, hosts=hosts,
            **{key: getattr(arguments, key) for key in same},
        )
        crews = {side: stack.enter_context(_crew(side, arguments, setup)) for side in sides}
        for side, crew in crews.items():
            say(f"warming up: {side.label}, {crew.hello[0]['parameters']:,} parameters")
            crew.take(WARM_UP)
        rounds: dict[Side, list[Steps]] = {side: [] for side in sides}
        for round_ in range(arguments.repeat):
            for side in in_turns(round_, sides):
                rounds[side].append(joined(crews[side].take(SETTLE + arguments.steps))[SETTLE:])
            medians = ", ".join(f"{side.label} {median(rounds[side][-1]):.4f} s" for side in sides)
            say(f"round {round_ + 1} of {arguments.repeat}: {medians}")
        hello = {side: crew.hello[0] for side, crew in crews.items()}
    common = {k: getattr(arguments, k) for k in ("precision", "threads", "batch", "layers", "width", "classes")}
    common |= {"device": hello[sides[0]]["device"], "hosts": arguments.hosts}
    if arguments.hosts > 1:  # they are pretended: they share this machine's cores
        common |= {"link": arguments.link, "bucket": arguments.bucket, "shared_machine": True}
    for side in sides:
        yield _record(side, hello[side]["parameters"], [step for turn in rounds[side] for step in turn], common)
    yield from _summaries(rounds, common)


def frames_for(arguments: argparse.Namespace) -> int:
    """Frames of data that no side can use up."""
    return (WARM_UP + arguments.repeat * (SETTLE + arguments.steps) + 1) * arguments.batch


def _crew(side: Side, arguments: argparse.Namespace, setup: Setup) -> Crew:
    name = side.label.replace(" ", "-").replace(",", "")
    if side.splits:
        strategy: dict[str, Any] = {"name": "allreduce", "overlap": side.overlap}
        if setup.hosts:  # both sides of a comparison have to use the same
            strategy |= {"algorithm": "owners", "bucket_mib": arguments.bucket / (1 << 20)}
        return setup.trireme(name, side.ranks, side.splits, strategy, alone=setup.hosts is not None)
    return setup.ddp(name, side.ranks) if side.ddp else setup.loops(name, side.ranks)


def _record(side: Side, parameters: int, steps: Steps, common: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {"impl": side.impl, "ranks": side.ranks}
    if side.splits:
        own |= {"splits": side.splits, "overlap": side.overlap}
        own |= {f"{phase}_s": median(steps, phase) for phase in PHASES}
    timing = spread([step["seconds"] for step in steps])
    speed = common["batch"] / timing["median_s"]
    return {
        "what": "step", **own, **common, "parameters": parameters, **timing, "cpu_s": median(steps, "cpu"),
        "frames_per_s": speed,
    }


def _summaries(rounds: dict[Side, list[Steps]], common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Quotients of whole turns: a pair is two turns of the same round."""
    turns = {side: [median(turn) for turn in rounds[side]] for side in rounds}
    ours, loop = Side(1, 1), Side(1, 0)
    if loop in rounds:
        cpu = {side: [median(turn, "cpu") for turn in rounds[side]] for side in (ours, loop)}
        yield {
            "what": "step against torch loop", **common, "pairs": len(turns[ours]),
            **quotient(turns[ours], turns[loop]), **quotient(cpu[ours], cpu[loop], "cpu_ratio"),
        }
    for side in rounds:
        if side.ranks > 1 and side.splits and loop in rounds:
            limit = quotient(turns[loop], turns[Side(side.ranks, 0)], "limit_speedup")
            yield {
                "what": f"{side.ranks} ranks against 1", **common, "splits": side.splits, "pairs": len(turns[side]),
                **quotient(turns[Side(1, side.splits)], turns[side], "speedup"),
                "limit": "plain loops at once, without exchange", **limit,
            }
    for side in rounds:
        if side.ranks > 1 and side.splits and side.overlap == "on":
            yield _against_ddp(side, turns[side], turns[Side(side.ranks, 0, ddp=True)], common)
            bare = side._replace(overlap="off")
            if bare in rounds:
                yield _overlap(side, rounds[side], rounds[bare], common)


def _against_ddp(side: Side, ours: list[float], ddp: list[float], common: dict[str, Any]) -> dict[str, Any]:
    """How many times DDP's frames a second ours are, with the spread over the pairs."""
    pairs = [b / a for a, b in zip(ours, ddp, strict=True)]
    return {
        "what": f"{side.ranks} ranks against DDP", **common, "splits": side.splits, "pairs": len(pairs),
        "frames_per_s": common["batch"] / statistics.median(ours),
        "ddp_frames_per_s": common["batch"] / statistics.median(ddp),
        **quotient(ddp, ours), "ratio_min": min(pairs), "ratio_max": max(pairs),
    }


def _overlap(side: Side, with_: list[Steps], without: list[Steps], common: dict[str, Any]) -> dict[str, Any]:
    """What share of the exchange hid behind backward: (step without overlap - step with) / exchange alone."""
    slow, fast = ([median(turn) for turn in turns] for turns in (without, with_))
    alone = [turn[0]["alone"] for turn in without]
    pairs = [(a - b) / c for a, b, c in zip(slow, fast, alone, strict=True)]
    medians = [statistics.median(taken) for taken in (slow, fast, alone)]
    return {
        "what": "overlap", **common, "ranks": side.ranks, "splits": side.splits, "pairs": len(pairs),
        "hidden": (medians[0] - medians[1]) / medians[2], "hidden_of_pairs": statistics.median(pairs),
        "hidden_of_minima": (min(slow) - min(fast)) / min(alone), "hidden_quartiles": spread(pairs)["quartiles_s"],
        "without_s": medians[0], "with_s": medians[1], "exchange_alone_s": medians[2],
        "backward_s": statistics.median(median(turn, "backward") for turn in without),
        "exchange_left_s": statistics.median(median(turn, "exchange") for turn in with_),
    }
