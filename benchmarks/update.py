"""The update rules beside torch's fused optimizers and a copy of as many bytes, interleaved, one thread.

    python benchmarks/update.py
    python benchmarks/update.py --floats 262144,8388608 --rounds 15

Prints JSON lines: {"rule", "floats", "ours_s", "torch_s", "copy_s", "times_torch", "of_copy_bandwidth"}, medians over
the rounds. Counted are the bytes that a rule must move: every tensor once in, and once out if it changes. torch's side
is its fused kernel where it has one ("torch_kind"); null where it has no such rule. "of_copy_bandwidth" above 1 means
that what is only read costs less than what is copied. Small slices stay in the cache, as the exchange's blocks do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from hpc.bench import in_turns
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


def measure(rule: str, floats: int, rounds: int) -> dict[str, object]:
    weights, grad = torch.randn(floats), torch.randn(floats)
    slots = [torch.rand(floats) for _ in range(SLOTS[rule])]
    moved = 4 * floats * (3 + 2 * len(slots))
    source, target = torch.zeros(moved // 8), torch.zeros(moved // 8)
    kind, theirs = torch_side(rule, torch.randn(floats))
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: update_(rule, weights, grad, slots, CONSTANTS), "copy": lambda: target.copy_(source),
    }
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
    ours, copy, other = median["ours"], median["copy"], median.get("torch")
    return {
        "rule": rule, "floats": floats, "rounds": rounds, "ours_s": ours, "torch_s": other, "torch_kind": kind,
        "copy_s": copy, "times_torch": other and other / ours, "of_copy_bandwidth": copy / ours,
        "gbps": moved / ours / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floats", default="262144,8388608", help="(default 262144,8388608)")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for floats in map(int, arguments.floats.split(",")):
        for rule in SLOTS:
            print(json.dumps(measure(rule, floats, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
