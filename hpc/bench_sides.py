"""The sides that a benchmark of training steps compares: crews of Trireme's own loop, plain torch loops, torch's DDP.

All have the same model, batch, rule, threads and place; each in processes of its own. What a crew reports of its turns
is joined over its ranks here.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.bench import recipe_for
from hpc.bench_crew import Crew
from hpc.hosts import Hosts

WIDTH, CONTEXT = 40, 5
RATE, MOMENTUM = 0.01, 0.9
PHASES = ("read", "forward", "backward", "exchange")
SLOWEST = ("seconds", "alone")  # what a crew's slowest rank says; of all else its mean

# Of every step: "seconds", "cpu", bytes that crossed the link, and of Trireme's its phases, bytes counted, and perhaps
# "alone": an exchange by itself after this turn.
Steps = list[dict[str, float]]


@dataclass(frozen=True)
class Setup:
    """What all sides have in common.

    data        a data set that no side can use up, of WIDTH values a frame, and how many frames a split holds at once
    batch       frames of a step over all ranks
    layers, width, classes, activation   the DNN, on CONTEXT frames around each
    hosts       pretend hosts that ranks are spread over; None: all of them here
    folder      for run folders, sockets and logs; a short path
    """

    data: Path
    split_frames: int
    batch: int
    layers: int
    width: int
    classes: int
    activation: str
    folder: Path
    hosts: Hosts | None = None
    threads: int = 1
    precision: str = "float32"
    device: str = "cpu"
    bind: bool = False

    def trireme(self, name: str, ranks: int, splits: int, strategy: dict[str, Any], alone: bool = False) -> Crew:
        """Trireme's own loop; `alone`: its exchange is timed by itself, too, after every turn."""
        spec = {"recipe": self.recipe(name, splits, strategy), "alone": alone}
        return self._crew(name, ranks, "hpc.bench_worker", spec)

    def recipe(self, name: str, splits: int, strategy: dict[str, Any]) -> dict[str, Any]:
        """What that loop learns, as a recipe's tables."""
        model = {"context": CONTEXT, "layers": self.layers, "width": self.width, "activation": self.activation}
        return recipe_for(
            self.data, self.folder / name, splits=splits, **self._place(), task=model,
            data={"batch": self.batch, "split_frames": self.split_frames}, strategy=strategy,
            optim={"name": "momentum", "learning_rate": RATE, "momentum": MOMENTUM},
        )

    def loops(self, name: str, ranks: int) -> Crew:
        """Plain torch loops at once, each on its share of the batch, that exchange nothing."""
        return self._crew(name, ranks, "hpc.bench_loop", self._loop(ranks))

    def ddp(self, name: str, ranks: int, powersgd: int = 0) -> Crew:
        """Torch's DistributedDataParallel on gloo, with PowerSGD of this rank, or as it comes (0)."""
        meeting = {"store": str(self.folder / f"{name}.store"), "ranks": ranks, "powersgd": powersgd}
        interface = "eth0" if self.hosts else "lo"
        return self._crew(name, ranks, "hpc.bench_loop", self._loop(ranks) | meeting | {"interface": interface})

    def _place(self) -> dict[str, Any]:
        return {"threads": self.threads, "precision": self.precision, "device": self.device}

    def _loop(self, ranks: int) -> dict[str, Any]:
        return {
            "inputs": (2 * CONTEXT + 1) * WIDTH, "classes": self.classes, "batch": self.batch // ranks,
            "learning_rate": RATE, "momentum": MOMENTUM, "layers": self.layers, "width": self.width,
            "activation": self.activation, **self._place(),
        }

    def _crew(self, name: str, ranks: int, module: str, spec: dict[str, Any]) -> Crew:
        return Crew(name, ranks, module, spec, bind=self.bind, folder=self.folder, hosts=self.hosts)


def joined(reports: list[Steps]) -> Steps:
    """A crew's steps: the slowest rank's seconds and exchange alone, and the means over ranks of the rest."""
    steps = []
    for ranks in zip(*reports, strict=True):
        mean = {key: statistics.fmean(rank[key] for rank in ranks) for key in ranks[0]}
        slowest = {key: max(rank[key] for rank in ranks) for key in SLOWEST if key in ranks[0]}
        steps.append(mean | slowest)
    return steps


def median(steps: Steps, key: str = "seconds") -> float:
    return statistics.median(step[key] for step in steps)
