"""Whom `onebit_speed.py` and `plan.py` compare, where, and the JSON lines that are written."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc.bench import rounded, say
from hpc.bench_crew import Crew
from hpc.bench_options import bits_of
from hpc.bench_sides import Setup, Steps, joined

RANKS = 2  # one a host
BURST_S = 0.002  # of its rate, a link which rested lets through at once
RESTARTS = 3
WARM_UP = 4  # steps


@dataclass(frozen=True)
class Side:
    """One of those compared.

    strategy  of Trireme's recipe; None: torch's DistributedDataParallel
    powersgd  the rank of PowerSGD's matrices there; 0: plain
    period    post-local SGD there: steps between averages of the models; 0: plain
    start     where the search for the learning rate begins
    like      the side whose learning rate it has, as it learns the same; "": its own
    beside    whom it is compared with
    """

    text: str
    strategy: dict[str, Any] | None = None
    powersgd: int = 0
    period: int = 0
    start: float = 0.2
    like: str = ""
    beside: list[str] = field(default_factory=list)


BLOCK = 31  # steps between averages: a part of the default --every
PEERS = ["float32", "ddp", "powersgd1", "powersgd4"]
SIDES = {
    "float32": Side(
        "float32 all-reduce", {"name": "allreduce", "algorithm": "owners", "bucket_mib": 1.0}, beside=["ddp"]
    ),
    "onebit": Side("1-bit", {"name": "onebit"}, beside=PEERS),
    "onebit-db": Side(
        "1-bit, double buffering", {"name": "onebit", "double_buffering": True}, beside=["onebit", *PEERS]
    ),
    "ddp": Side("torch DDP", like="float32"),
    "powersgd1": Side("torch DDP, PowerSGD of rank 1", powersgd=1),
    "powersgd4": Side("torch DDP, PowerSGD of rank 4", powersgd=4),
    "bmuf": Side("BMUF-NBM", {"name": "bmuf", "block_steps": BLOCK}),
    "postlocal": Side("torch DDP, post-local SGD", period=BLOCK),
}
OF_SPEED = list(SIDES)[:6]  # what exchanges every step


class Team:
    """A side's processes, started again where they ended by themselves (gloo's do, now and then).

    name   of SIDES
    stack  ends them
    """

    def __init__(self, name: str, setup: Setup, stack: ExitStack):
        self.name, self.setup, self.starts = name, setup, 0
        self.crew: Crew | None = None
        stack.callback(self.close)

    def take(self, steps: int) -> Steps:
        """So many steps' costs, joined over ranks. Raises OSError where processes end again and again."""
        while True:
            try:
                crew = self.crew or self._start()
                return joined(crew.take(steps))
            except OSError as error:
                self.close()
                if self.starts > RESTARTS:
                    raise
                say(f"{self.name} is started again: {error}")

    def close(self) -> None:
        """End the processes that are there."""
        crew, self.crew = self.crew, None
        if crew is not None:
            crew.__exit__()

    def _start(self) -> Crew:
        side, label = SIDES[self.name], f"{self.name}-{self.starts}"
        self.starts += 1
        if side.strategy is None:
            crew = self.setup.ddp(label, RANKS, side.powersgd)
        else:
            crew = self.setup.trireme(label, RANKS, RANKS, side.strategy)
        self.crew = crew
        self.parameters = crew.hello[0]["parameters"]
        crew.take(WARM_UP)
        return crew


def burst_kib(link: str) -> int:
    """What a link lets through at once after a pause; with less, this machine does not reach the rate."""
    return max(32, round(bits_of(link) * BURST_S / 8192))


class Lines:
    """The JSON lines of --out: those that are there, and those that come."""

    def __init__(self, path: Path):
        self.path = path
        self.records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, records: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = [{"bench": "onebit_speed", **rounded(record)} for record in records]
        self.records += new
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in new)

    def of(self, what: str, **values: Any) -> list[dict[str, Any]]:
        wanted = {"what": what, **values}
        return [r for r in self.records if all(r.get(key) == value for key, value in wanted.items())]
