"""The update rules, and a block's update, beside torch and a copy of as many bytes, interleaved, one thread.

    python benchmarks/update.py
    python benchmarks/update.py --floats 262144,8388608 --rounds 15

Prints JSON lines: {"rule", "floats", "ours_s", "torch_s", "copy_s", "times_torch", "of_copy_bandwidth"}, medians over
the rounds. Counted are the bytes that a rule must move: every tensor once in, and once out if it changes. torch's side
is its fused kernel where it has one ("torch_kind"); null where it has no such rule. Of "block" (paper 003, equations
(2) to (6)) and "departure" (how far a split's model went) it is the same in torch's operations. "of_copy_bandwidth"
above 1 means that what is only read costs less than what is copied. Small slices stay in the cache, as the exchange's
blocks do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from hpc.bench import in_turns
from kernels.block import BlockConstants, block_, depart_
from kernels.update import SLOTS, Constants, update_

CONSTANTS = Constants(rate=1e-3, momentum=0.9, fresh=0.1, beta2=0.999, fresh2=0.001, epsilon=1e-8)
TURN_S = 0.05


def torch_side(rule: str, weights: torch.Tensor) -> tuple[str, Callable[[], object] | None]:
    """How torch's optimizer for a rule computes, and a step of it; None if there is no such optimizer."""
    parameter = torch.nn.Parameter(weights)
    parameter.grad = torch.randn(len(weights))
    fused = {"fused": True} if rule in ("sgd", "momentum", "nesterov", "adagrad", "adam") else {}
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD([parameter], 1e-3, **fused),
        "momentum": lambda: torch.optim.SGD([parameter], 1e-3, momentum=0.9, **fused),
        "nesterov": lambda: torch.optim.SGD([parameter], 1e-3, momentum=0.9, nesterov=True, **fused),
        "adagrad": lambda: torch.optim.Adagrad([parameter], 1e-3, **fused),
        "adam": lambda: torch.optim.Adam([parameter], 1e-3, **fused),
        "adamax": lambda: torch.optim.Adamax([parameter], 1e-3),
    }
    if rule not in made:
        return "none", None
    return "fused" if fused else "not fused", made[rule]().step


def rule_sides(rule: str, floats: int) -> tuple[int, Callable[[], object], str, Callable[[], object] | None]:
    """Bytes moved, our step, how torch has it, and torch's step."""
    weights, grad = torch.randn(floats), torch.randn(floats)
    slots = [torch.rand(floats) for _ in range(SLOTS[rule])]
    kind, theirs = torch_side(rule, torch.randn(floats))
    return 4 * floats * (3 + 2 * len(slots)), lambda: update_(rule, weights, grad, slots, CONSTANTS), kind, theirs


def block_sides(what: str, floats: int) -> tuple[int, Callable[[], object], str, Callable[[], object]]:
    """The same of a block's update, or of a departure."""
    total, weights, change, start = (torch.randn(floats) * 1e-3 for _ in range(4))
    momentum, scale = 0.9, 0.125

    def block() -> None:
        change.mul_(momentum).add_(total, alpha=scale)
        weights.add_(change)
        torch.add(weights, change, alpha=momentum, out=start)
        assert torch.isfinite(total).all()

    def departure() -> None:
        torch.sub(weights, start, out=total).mul_(scale)

    if what == "departure":
        return 12 * floats, lambda: depart_(weights, start, scale, total), "operations", departure
    constants = BlockConstants(scale, momentum, 1.0, 1.0, momentum)
    return 24 * floats, lambda: block_(total, weights, change, start, constants), "operations", block


def measure(rule: str, floats: int, rounds: int) -> dict[str, object]:
    moved, ours, kind, theirs = (rule_sides if rule in SLOTS else block_sides)(rule, floats)
    source, target = torch.zeros(moved // 8), torch.zeros(moved // 8)
    sides: dict[str, Callable[[], object]] = {"ours": ours, "copy": lambda: target.copy_(source)}
    if theirs:
        sides["torch"] = theirs
    taken: dict[str, list[float]] = {name: [] for name in sides}
    repeats = max(1, int(TURN_S / (moved / 1e10)))
    for turn in range(rounds + 1):
        for name in in_turns(turn, list(sides)):
            sides[name]()
            began = time.perf_counter()
            for _ in range(repeats):
                sides[name]()
            taken[name].append((time.perf_counter() - began) / repeats)
    median = {name: statistics.median(taken[name][1:]) for name in sides}
    taken_s, copy, other = median["ours"], median["copy"], median.get("torch")
    return {
        "rule": rule, "floats": floats, "rounds": rounds, "ours_s": taken_s, "torch_s": other, "torch_kind": kind,
        "copy_s": copy, "times_torch": other and other / taken_s, "of_copy_bandwidth": copy / taken_s,
        "gbps": moved / taken_s / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floats", default="262144,8388608", help="(default 262144,8388608)")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for floats in map(int, arguments.floats.split(",")):
        for rule in (*SLOTS, "block", "departure"):
            print(json.dumps(measure(rule, floats, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
